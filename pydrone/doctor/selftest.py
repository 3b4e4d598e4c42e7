"""Self-tests of a backend's kernels against the reference, in seconds, and their speed relative to a memcpy.

``pydrone doctor`` runs :func:`main` in its own process for each backend, so that a kernel that crashes or hangs becomes
a line of the report. The thorough tests are in ``tests/``; these detect a library that does not fit the machine.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.estimators import gae as estimate
from pydrone.ops import reference, triton
from pydrone.ops.schema import loss_workspace_size

# Environments x steps: a single one, less than a vector, multiples of nothing, more than a block.
SHAPES = ((1, 1), (3, 7), (37, 13), (131, 33))
# As docs/conventions.md promises, relative to the largest advantage.
TOLERANCE = 1e-5

OBS = {"policy": 17, "image": ((3, 5), torch.uint8)}
FIELDS = {"mu": 4, "sigma": 4}


class Wrong(Exception):
    """The result of a kernel is wrong; the message says where."""


def kernels(backend: str) -> dict[str, Callable[[str, str], int]]:
    """The tests by kernel. Each takes a backend and a device and returns the number of cases checked.

    The PPO loss is included for backends that implement it: the native libraries do not.
    """
    tests = {"gae": check_gae, "append": check_append, "gather": check_gather}
    return tests | {"ppo_loss": check_ppo_loss} if backend in LOSSES else tests


# -------------------------------------------------------------------------------------------------------- self-tests


def check_gae(backend: str, device: str) -> int:
    """A rollout computed by hand, then random ones in both memory orders with every bootstrap."""
    # gamma 0.5, lam 0.5. Backwards, with V_4 = 8 after the last step:
    #   t=3 running:    delta = 1 + 4 - 2 = 3,    A = 3
    #   t=2 terminated: delta = 1 + 0 - 4 = -3,   A = -3
    #   t=1 truncated, final value 6: delta = 1 + 3 - 2 = 2,   A = 2
    #   t=0 running:    delta = 1 + 1 - 2 = 0,    A = 0 + 0.25 * 2 = 0.5
    nan = float("nan")
    rollout = {
        "rewards": torch.ones(1, 4),
        "values": torch.tensor([[2.0, 2.0, 4.0, 2.0]]),
        "dones": torch.tensor([[0, 1, 1, 0]]),
        "last_values": torch.tensor([8.0]),
        "truncated": torch.tensor([[0, 1, 0, 0]]),
        "final_values": torch.tensor([[nan, 6.0, nan, nan]]),
    }
    found = _gae(rollout, backend, device, gamma=0.5, lam=0.5)
    expected = ([[0.5, 2.0, -3.0, 3.0]], [[2.5, 4.0, 1.0, 5.0]])
    for name, wanted, got in zip(("advantages", "returns"), expected, found):
        _same(f"{name} of the rollout worked out by hand", torch.tensor(wanted), got)
    cases = 1
    for num_envs, num_steps in SHAPES:
        for time_dim in (0, 1):
            for bootstrap in ("final_values", "stored_value", "next_value"):
                rollout = _rollout(num_envs, num_steps, bootstrap)
                if time_dim == 0:
                    rollout = {name: x if x.dim() == 1 else x.t().contiguous() for name, x in rollout.items()}
                options: dict[str, Any] = {"time_dim": time_dim}
                if bootstrap != "final_values":
                    options["timeout_bootstrap"] = bootstrap
                expected = _gae(rollout, "reference", "cpu", **options)
                found = _gae(rollout, backend, device, **options)
                where = f"of {num_envs} x {num_steps}, time_dim={time_dim}, {bootstrap}"
                for name, wanted, got in zip(("advantages", "returns", "statistics"), expected, found):
                    _close(f"{name} {where}", wanted, got)
                cases += 1
    return cases


def check_append(backend: str, device: str) -> int:
    """Stored values equal the given ones bit for bit; ends and final observations equal those of the reference."""
    cases = 0
    for num_envs, num_steps in SHAPES:
        steps = _steps(num_envs, num_steps)
        found, expected = (_filled(steps, *where) for where in ((backend, device), ("reference", "cpu")))
        where = f"of {num_envs} x {num_steps}"
        for name, stored in _stored(found).items():
            _same(f"{name} {where}", torch.stack([_given(step)[name] for step in steps], dim=1), stored)
        _same(f"dones {where}", expected.dones, found.dones)
        for buffer in (found, expected):
            # The order of the pool is free, its contents are not.
            last = torch.zeros(num_envs, device=buffer.device)
            buffer.compute_gae(last, value_fn=lambda obs: obs["policy"].float().sum(-1) + obs["image"].sum((1, 2)))
        _close(f"values of the final observations {where}", expected.advantages, found.advantages)
        cases += 1
    return cases


def check_gather(backend: str, device: str) -> int:
    """Two epochs of three minibatches: the permutation of the reference, each sample once, fields that match it."""
    cases = 0
    for num_envs, num_steps in SHAPES:
        steps, parts = _steps(num_envs, num_steps), min(3, num_envs * num_steps)
        epochs = []
        for where in ((backend, device), ("reference", "cpu")):
            buffer = _filled(steps, *where)
            buffer.compute_gae(torch.ones(num_envs, device=buffer.device), timeout_bootstrap="stored_value")
            epochs.append(list(buffer.minibatches(num_minibatches=parts, num_epochs=2)))
        for i, (got, wanted) in enumerate(zip(*epochs, strict=True)):
            where = f"of {num_envs} x {num_steps}, minibatch {i % parts} of epoch {i // parts}"
            _same(f"indices {where}", wanted.indices, got.indices)
            env, step = (wanted.indices // num_steps).tolist(), (wanted.indices % num_steps).tolist()
            for name, gathered in _gathered(got).items():
                own = torch.stack([_given(steps[t])[name][n] for n, t in zip(env, step)])
                _same(f"{name} {where}", own.to(gathered.dtype), gathered)
            for name in ("advantages", "returns"):
                _close(f"{name} {where}", getattr(wanted, name), getattr(got, name))
        for epoch in range(2):
            seen = torch.cat([x.indices for x in epochs[0][epoch * parts : (epoch + 1) * parts]]).cpu().sort().values
            _same(f"samples of epoch {epoch} of {num_envs} x {num_steps}", torch.arange(num_envs * num_steps), seen)
        cases += 1
    return cases


def check_ppo_loss(backend: str, device: str) -> int:
    """A sample computed by hand, then random minibatches, of one program and of several, with every option."""
    # One action: mean 0.5, std 2, sampled 1.5, so z = 1/2; ratio 1, advantage 3. The old policy is N(0.25, 1). Value 1,
    # old 0.9, return 3: within the clip of 0.2.
    log_prob = -0.125 - math.log(2) - 0.5 * math.log(2 * math.pi)
    sample = {"mean": 0.5, "std": 2.0, "actions": 1.5, "log_probs": log_prob, "advantages": 3.0}
    sample |= {"new_values": 1.0, "values": 0.9, "returns": 3.0, "mu": 0.25, "sigma": 1.0}
    given = {name: torch.tensor([x]) for name, x in sample.items()}
    given |= {name: given[name][None] for name in ("mean", "actions", "mu", "sigma")}
    found = _ppo_loss(given, LOSSES[backend], device, value_clip=0.2, coefs=(1.0, 0.0))
    entropy, kl = 0.5 + 0.5 * math.log(2 * math.pi) + math.log(2), math.log(2) + 1.0625 / 8 - 0.5
    expected = ([-0.75], [-4.0], [1.125], [-3.0, 4.0, entropy, kl])
    for name, wanted, got in zip(OUTPUTS, expected, found):
        _close(f"{name} of the sample worked out by hand", torch.tensor(wanted), got.flatten())
    cases = 1
    for size, actions in ((1, 1), (37, 3), (513, 4), (1500, 17)):
        for value_clip, with_kl, moments in ((0.2, True, None), (-1.0, False, (0.7, 1.9))):
            given = _minibatch(size, actions)
            options: dict[str, Any] = {"value_clip": value_clip, "moments": moments}
            if not with_kl:
                given["mu"] = given["sigma"] = None
            wide = {name: None if x is None else x.double() for name, x in given.items()}
            expected = _ppo_loss(wide, reference.ppo_loss, "cpu", **options)
            found = _ppo_loss(given, LOSSES[backend], device, **options)
            for name, wanted, got in zip(OUTPUTS, expected, found):
                where = f"{name} of {size} x {actions}, value_clip={value_clip:g}"
                if name == "metrics" and not with_kl:
                    _same(f"{where}: the divergence", torch.tensor([True]), got[3:].isnan())
                    wanted, got = wanted[:3], got[:3]
                _close(where, size * wanted, size * got)  # means of numbers of order 1
            cases += 1
    return cases


# The loss does not belong to a buffer, so dispatch.Backend does not have it.
LOSSES: dict[str, Callable[..., None]] = {"reference": reference.ppo_loss, "triton": triton.ppo_loss}
OUTPUTS = ("mean_grad", "value_grad", "std_grad", "metrics")


def _ppo_loss(
    given: dict[str, Tensor | None],
    loss: Callable[..., None],
    device: str,
    value_clip: float,
    moments: tuple[float, float] | None = None,
    coefs: tuple[float, float] = (0.7, 0.01),
) -> list[Tensor]:
    """OUTPUTS, NaN before the launch. Launched twice: the first launch must leave the workspace ready for the next."""
    on = {name: None if x is None else x.to(device) for name, x in given.items()}
    mean = on["mean"]
    size, actions = mean.shape
    shift_and_std = (None, None) if moments is None else [mean.new_tensor(x) for x in moments]
    workspace = torch.zeros(loss_workspace_size(size, actions), dtype=torch.float64, device=device)
    runs = []
    for _ in range(2):
        outputs = [mean.new_full(shape, math.nan) for shape in ((size, actions), (size,), (actions,), (4,))]
        loss(*on.values(), 0.2, value_clip, *coefs, *shift_and_std, size, *outputs, workspace)
        runs.append(outputs)
    for name, first, second in zip(OUTPUTS, *runs):
        _same(f"{name} of {size} x {actions} from launch to launch", first.nan_to_num(), second.nan_to_num())
    return runs[0]


def _minibatch(size: int, actions: int) -> dict[str, Tensor]:
    """Arguments of ``ppo_loss``, in its order, with ratios and values on both sides of their clip limits."""
    draw = torch.Generator().manual_seed(size)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=draw) * scale

    mean, std = normal(size, actions, scale=0.3), torch.rand(actions, generator=draw) + 0.5
    drawn = normal(size, actions)
    log_probs = (-0.5 * ((drawn - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(1)
    return {
        "mean": mean,
        "std": std,
        "actions": drawn,
        "log_probs": log_probs + normal(size, scale=0.3),
        "advantages": normal(size),
        "new_values": normal(size, scale=0.3),
        "values": normal(size, scale=0.3),
        "returns": normal(size, scale=2),
        "mu": normal(size, actions, scale=0.1),
        "sigma": torch.rand(size, actions, generator=draw) + 0.5,
    }


def _gae(rollout: dict[str, Tensor], backend: str, device: str, **options: Any) -> tuple[Tensor, ...]:
    given = {name: x.to(device) for name, x in rollout.items()}
    # Outputs have the strides of the inputs; what is not written stays NaN.
    out = tuple(torch.full_like(given["rewards"], float("nan")) for _ in range(2))
    return estimate(**given, **options, out=out, stats=True, backend=backend)


def _rollout(num_envs: int, num_steps: int, bootstrap: str) -> dict[str, Tensor]:
    draw, shape = torch.Generator().manual_seed(num_envs), (num_envs, num_steps)
    ends = torch.rand(shape, generator=draw)
    rollout = {
        "rewards": torch.randn(shape, generator=draw),
        "values": torch.randn(shape, generator=draw),
        "dones": ends < 0.3,
        "truncated": ends < 0.15,
        "last_values": torch.randn(num_envs, generator=draw),
    }
    if bootstrap == "final_values":
        rollout["final_values"] = torch.randn(shape, generator=draw)
    if bootstrap == "next_value":
        rollout["valid"] = torch.rand(shape, generator=draw) > 0.1
    return rollout


def _steps(num_envs: int, num_steps: int) -> list[dict[str, Any]]:
    """Arguments of ``append``: random fields, with an end in one of five steps."""
    draw = torch.Generator().manual_seed(num_steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_envs, *shape, generator=draw)

    def observation() -> dict[str, Tensor]:
        # Exact in half precision.
        numbers = torch.randint(-99, 99, (num_envs, 17), generator=draw).float()
        return {
            "policy": numbers,
            "image": torch.randint(0, 256, (num_envs, 3, 5), generator=draw, dtype=torch.uint8),
        }

    steps = []
    for _ in range(num_steps):
        ends = torch.rand(num_envs, generator=draw)
        steps.append(
            {
                "obs": observation(),
                "actions": torch.randint(0, 9, (num_envs,), generator=draw),
                "rewards": normal(),
                "values": normal(),
                "log_probs": normal(),
                "mu": normal(4),
                "sigma": normal(4),
                "dones": ends < 0.2,
                "truncated": ends < 0.1,
                "final_obs": observation(),
            }
        )
    return steps


def _filled(steps: list[dict[str, Any]], backend: str, device: str) -> RolloutBuffer:
    num_envs = len(steps[0]["rewards"])
    buffer = RolloutBuffer(
        num_envs,
        len(steps),
        OBS,
        ((), torch.int64),
        device=device,
        obs_dtype=torch.float16,
        fields=FIELDS,
        seed=5,
        final_obs_rows=num_envs * len(steps),
        backend=backend,
    )
    for step in steps:
        moved = {
            name: {group: y.to(device) for group, y in x.items()} if isinstance(x, dict) else x.to(device)
            for name, x in step.items()
        }
        buffer.append(**moved)
    return buffer


NAMES = ("actions", "values", "log_probs")


def _given(step: dict[str, Any]) -> dict[str, Tensor]:
    """The fields passed to ``append``, by the names of :func:`_stored`."""
    return {
        "obs.policy": step["obs"]["policy"].half(),
        "obs.image": step["obs"]["image"],
        **{name: step[name] for name in (*NAMES, *FIELDS, "rewards")},
    }


def _stored(buffer: RolloutBuffer) -> dict[str, Tensor]:
    groups = {f"obs.{name}": x for name, x in buffer.obs.items()}
    fields = {name: getattr(buffer, name) for name in (*NAMES, "rewards")}
    return groups | fields | {name: buffer[name] for name in FIELDS}


def _gathered(minibatch: Any) -> dict[str, Tensor]:
    groups = {f"obs.{name}": x for name, x in minibatch.obs.items()}
    fields = {name: getattr(minibatch, name) for name in NAMES}
    return groups | fields | {name: minibatch[name] for name in FIELDS}


def _same(what: str, wanted: Tensor, got: Tensor) -> None:
    if not torch.equal(wanted.cpu(), got.cpu()):
        raise Wrong(f"{what}: differs from the expected in {int((wanted.cpu() != got.cpu()).sum())} places")


def _close(what: str, wanted: Tensor, got: Tensor) -> None:
    wanted, got = wanted.double().cpu(), got.double().cpu()
    # Relative to the scale of the rollout, as in docs/conventions.md. NaN fails the comparison.
    bound = TOLERANCE * max(1.0, wanted.abs().max().item())
    worst = (wanted - got).abs().max().item()
    if not worst <= bound:
        raise Wrong(f"{what}: off by {worst:.3g}, at most {bound:.3g} is rounding")


# ------------------------------------------------------------------------------------------------------------- speed


def speed(backend: str, device: str, threads: int) -> dict[str, Any]:
    """Time of each kernel relative to a memcpy of the bytes that it reads and writes: minima of ten alternating runs.

    On the CPU, kernel and memcpy run on ``threads`` threads. Also the speed of the last memcpy, of a rollout, in GB/s
    read and written.
    """
    num_envs, num_steps = (8192, 100) if device.startswith("cuda") else (2048, 50)
    samples = num_envs * num_steps
    shapes = {"obs": (17,), "actions": (4,), "mu": (4,), "sigma": (4,)}
    shapes |= dict.fromkeys(("rewards", "values", "log_probs"), ())
    step = {name: torch.randn(num_envs, *shape, device=device) for name, shape in shapes.items()}
    step["dones"] = torch.rand(num_envs, device=device) < 0.01
    buffer = RolloutBuffer(num_envs, num_steps, 17, 4, device=device, fields=FIELDS, backend=backend)
    last_values = torch.zeros(num_envs, device=device)

    def fill() -> None:
        buffer.clear()
        for _ in range(num_steps):
            buffer.append(**step)

    row = 4 * sum(x[0].numel() for name, x in step.items() if name not in ("rewards", "dones"))  # bytes of a sample
    # append fills what the other two read; gae reads 9 bytes per sample and writes 8.
    calls = {
        "append": (fill, 2 * (row + 5) * samples),
        "gae": (lambda: buffer.compute_gae(last_values), 17 * samples),
        "gather": (lambda: [None for _ in buffer.minibatches(4, reuse=True)], 2 * (row + 8) * samples),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ratios, rate = {}, 0.0
        for name, (call, nbytes) in calls.items():
            source, target = torch.ones(nbytes // 8, device=device), torch.empty(nbytes // 8, device=device)
            copy_all = functools.partial(target.copy_, source)
            times = [(_seconds(call, device), _seconds(copy_all, device)) for _ in range(10)]
            ours, copy = (min(column) for column in zip(*times))
            ratios[name], rate = round(ours / copy, 2), nbytes / copy / 1e9
    finally:
        torch.set_num_threads(before)
    return {
        "device": device,
        "backend": backend,
        "threads": threads if device == "cpu" else None,
        "num_envs": num_envs,
        "num_steps": num_steps,
        "ratios": ratios,
        "memcpy_gb_per_s": round(rate, 1),
    }


def _seconds(call: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


# ----------------------------------------------------------------------------------------------------------- process


def run(backend: str, device: str) -> Iterator[dict[str, Any]]:
    """The result of each kernel's test: ``kernel``, ``cases``, and ``error``, None if it passed."""
    for kernel, check in kernels(backend).items():
        cases, error = 0, None
        try:
            cases = check(backend, device)
        except Exception as failure:
            error = " ".join(f"{type(failure).__name__ if not isinstance(failure, Wrong) else ''} {failure}".split())
        yield {"kernel": kernel, "cases": cases, "error": error}


def main(backend: str, device: str, threads: list[int]) -> None:
    """Prints a line of JSON for each kernel as soon as it is tested, then one for each speed check."""
    for result in run(backend, device):
        print(json.dumps(result), flush=True)
    for count in threads:
        print(json.dumps(speed(backend, device, count)), flush=True)
