"""The CPU's operations by the versions for other instruction sets, as far as this processor has them."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pydrone.ops import native

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

ISAS = ("baseline", "x86-64-v3", "x86-64-v4")


def results() -> dict[str, torch.Tensor]:
    """The estimators in both orders and precisions, a rollout's rows and minibatches, a step of Adam, the learner, and
    drones; odd sizes."""
    import pydrone
    from pydrone.buffer import RolloutBuffer
    from pydrone.ppo import clipped_step

    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.float64):
        for n, t in ((1, 1), (131, 37), (2100, 5)):
            given = torch.randn(n, t, dtype=dtype), torch.randn(n, t, dtype=dtype), torch.rand(n, t) < 0.1
            flags = {"truncated": given[2] & (torch.rand(n, t) < 0.5), "valid": torch.rand(n, t) < 0.9}
            last, name = torch.randn(n, dtype=dtype), f"gae of {n}, {t}, {dtype}"
            options = {"timeout_bootstrap": "stored_value", "stats": True, "gamma": 0.97, "lam": 0.9}
            turned = {key: x.t().contiguous() for key, x in flags.items()}
            across = [x.t().contiguous() for x in given]
            rows = pydrone.gae(*given, last, **flags, **options)
            columns = pydrone.gae(*across, last, **turned, **options, time_dim=0)
            log_rhos = torch.randn(n, t, dtype=dtype)
            off_policy = pydrone.vtrace(*given, last, log_rhos, rho_clip=2.0, **flags, **options)
            del options["stats"]
            across.insert(1, torch.randn(t, n, dtype=dtype))
            q = pydrone.retrace(*across, last, log_rhos.t().contiguous(), **turned, **options, time_dim=0)
            found |= {f"{name}, {i}": x for i, x in enumerate((*rows, *columns, *off_policy, q))}
    buffer = RolloutBuffer(67, 9, 17, 4)
    for _ in range(9):
        row = {"obs": torch.randn(67, 17), "actions": torch.randn(67, 4), "dones": torch.rand(67) < 0.1}
        buffer.append(**row, **{name: torch.randn(67) for name in ("rewards", "values", "log_probs")})
    buffer.compute_gae(torch.randn(67))
    batch = next(iter(buffer.minibatches(2)))
    found |= {f"minibatch, {x}": getattr(batch, x) for x in ("obs", "actions", "log_probs", "indices", "advantages")}
    parameter = torch.nn.Parameter(torch.randn(1003))
    parameter.grad = torch.randn(1003)
    optimizer = torch.optim.Adam([parameter])
    found["norm"] = clipped_step(optimizer, [[parameter]], 0.7)
    found["parameter"] = parameter.detach()
    return found | learnt() | flown()


def flown() -> dict[str, torch.Tensor]:
    """Steps of drones with all options, and what they leave."""
    from step_cases import ALL, TASK

    from pydrone.envs.quadrotor import QuadrotorCourse

    env = QuadrotorCourse(71, seed=1, randomization=ALL, max_episode_length=4, fused=True, **TASK)
    results = [env.step(torch.randn(71, 4) * 0.3) for _ in range(5)]
    found = {f"step {i}, {name}": x for i, y in enumerate(results) for name, x in y.log.items()}
    found |= {f"step {i}, {name}": getattr(y, name) for i, y in enumerate(results) for name in ("dones", "final_obs")}
    return found | {f"drones, {name}": x for name, x in env.state_dict().items() if x.is_floating_point()}


def learnt() -> dict[str, torch.Tensor]:
    """Gradients, metrics and actions. Rows and columns leave every remainder of the versions' blocks and vectors."""
    from torch import nn

    from pydrone.ppo import FusedAct, FusedUpdate

    def network(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
        layers = [x for i, o in itertools.pairwise(widths) for x in (nn.Linear(i, o), activation())]
        return nn.Sequential(*layers[:-1])

    found = {}
    for rows, inputs, hidden, activation in (
        (1, 1, (), nn.Tanh),
        (131, 17, (128, 128), nn.Tanh),
        (141, 23, (33, 47), nn.ELU),
        (13, 9, (7, 31), nn.ReLU),
        (250, 45, (52,), nn.SiLU),
    ):
        for categories in ((), (2, 3)):
            outputs = sum(categories) or 3
            actor, critic = (network((inputs, *hidden, x), activation) for x in (outputs, 1))
            actions = torch.randint(0, 2, (rows, 2)) if categories else torch.randn(rows, outputs)
            given = {x: torch.randn(rows) for x in ("log_probs", "advantages", "returns", "values")}
            if not categories:
                given |= {"mu": torch.randn(rows, outputs) * 0.3, "sigma": torch.rand(rows, outputs) + 0.5}
            std = None if categories else (torch.rand(outputs) + 0.5).requires_grad_()
            obs, name = torch.randn(rows, inputs), f"learner of {rows}, {activation.__name__}, {categories}"
            update = FusedUpdate(actor, critic, value_clip=0.2, entropy_coef=0.01, categories=categories)
            found[f"{name}, metrics"] = update(std, obs=obs, actions=actions, **given)
            parameters = [*actor.parameters(), *critic.parameters(), *([] if categories else [std])]
            found |= {f"{name}, gradient {i}": x.grad for i, x in enumerate(parameters)}
            acted = FusedAct(actor, critic, categories=categories)(None if categories else std.detach(), obs)
            found |= {f"{name}, {x}": y for x, y in acted._asdict().items() if not (categories and x == "actions")}
    return found


def by(isa: str, path: Path) -> dict[str, torch.Tensor]:
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, env=os.environ | {"PYDRONE_ISA": isa}, capture_output=True, text=True)
    if "PYDRONE_ISA: expected" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory) -> dict[str, torch.Tensor]:
    return by("baseline", tmp_path_factory.mktemp("isa") / "baseline.pt")


@pytest.mark.parametrize("isa", ISAS[1:])
def test_versions_agree(isa, baseline, tmp_path):
    """Up to fused multiply-adds, which the baseline lacks; what is copied, to the bit."""
    found = by(isa, tmp_path / "found.pt")
    assert found.keys() == baseline.keys()
    for name, x in found.items():
        copied = name.startswith("minibatch") and not name.endswith("advantages")
        tolerance = {"rtol": 0, "atol": 0} if copied else {"rtol": 1e-5, "atol": 1e-5}
        if "gradient" in name:
            assert (x - baseline[name]).norm() <= 1e-5 * baseline[name].norm() + 1e-9, name
            continue
        tolerance["equal_nan"] = name.endswith("metrics")  # discrete actions have no divergence
        torch.testing.assert_close(x, baseline[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert any(not torch.equal(x, baseline[name]) for name, x in found.items()), "PYDRONE_ISA had no effect"


@pytest.fixture(scope="module")
def running() -> dict[str, subprocess.Popen]:
    """tests/versions.py for each instruction set, side by side."""
    command = [sys.executable, Path(__file__).parents[1] / "versions.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {isa: subprocess.Popen(command, env=os.environ | {"PYDRONE_ISA": isa}, **pipes) for isa in ISAS}


@pytest.mark.parametrize("isa", ISAS)
def test_every_operation_runs_the_version_that_is_asked_for(isa, running):
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("tests/versions.py knows the registers of Linux on x86-64 only")
    output, errors = running[isa].communicate()
    if "PYDRONE_ISA: expected" in errors:
        pytest.skip(f"this processor has no {isa}")
    if "PermissionError" in errors and "ptrace" in errors:
        pytest.skip("this machine does not let a process trace its child")
    assert running[isa].returncode == 0, errors
    found = json.loads(output)
    if not any(found.values()):
        pytest.skip("the library has one version only: it was built by Clang")
    assert {call for call, ran in found.items() if isa not in ran} == set()
    also = {"x86-64-v3"} if isa == "x86-64-v4" else set()  # append has no 64-byte stores: they are no faster
    others = {call: {*ran} - {isa} - (also if call in ("append", "ppo_step") else set()) for call, ran in found.items()}
    assert not any(others.values()), others


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
