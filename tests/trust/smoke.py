"""A quick test of an installed pydrone with nothing but torch; install.py runs it outside the source tree.

    python -I smoke.py [--cpu missing] [--without PACKAGE ...]

Prints the versions it ran on as JSON; ends with a traceback on a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

# torch warns if numpy is not installed; nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402
from torch import nn  # noqa: E402

import pydrone  # noqa: E402
from pydrone.doctor import selftest  # noqa: E402
from pydrone.envs import make  # noqa: E402
from pydrone.ppo import fused_update  # noqa: E402
from pydrone.ppo.config import PPOConfig, TrainConfig  # noqa: E402
from pydrone.ppo.trainer import Trainer  # noqa: E402
from pydrone.ppo.training import checkpoint  # noqa: E402

N, T, GAMMA, LAM = 37, 13, 0.97, 0.9
ROUNDING = 1e-5


def near(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    difference, scale = (got.double() - expected.double()).abs().max(), expected.double().abs().max()
    assert difference <= ROUNDING * scale, f"{what}: off by {difference:g}, of {scale:g}"


def check_rollout(backend: str | None) -> None:
    """append, GAE and minibatches against a loop over Python floats."""
    draw = torch.Generator().manual_seed(1)
    rewards, values = (torch.randn(N, T, generator=draw) for _ in range(2))
    dones, last = torch.rand(N, T, generator=draw) < 0.2, torch.randn(N, generator=draw)
    advantages = torch.zeros(N, T, dtype=torch.float64)
    for n in range(N):
        after, carry = last[n].item(), 0.0
        for t in reversed(range(T)):
            reward, value = rewards[n, t].item(), values[n, t].item()
            if dones[n, t]:
                after = carry = 0.0
            carry = reward + GAMMA * after - value + GAMMA * LAM * carry
            advantages[n, t], after = carry, value
    buffer = pydrone.RolloutBuffer(N, T, obs=3, actions=2, backend=backend)
    number = torch.arange(N * T, dtype=torch.float32).view(N, T)
    for t in range(T):
        obs = torch.stack((number[:, t], -number[:, t], torch.ones(N)), 1)
        scalars = {"rewards": rewards[:, t], "values": values[:, t], "dones": dones[:, t], "log_probs": number[:, t]}
        buffer.append(obs=obs, actions=obs[:, :2], **scalars)
    buffer.compute_gae(last, GAMMA, LAM)
    near("advantages", buffer.advantages, advantages)
    near("returns", buffer.returns, advantages + values)
    normalized = (advantages - advantages.mean()) / advantages.std()
    seen = []
    for minibatch in buffer.minibatches(4, normalize_advantages=True):
        i = minibatch.log_probs.long()
        assert torch.equal(minibatch.indices, i) and torch.equal(minibatch.obs[:, 0], number.flatten()[i])
        assert torch.equal(minibatch.actions[:, 1], -number.flatten()[i])
        near("normalised advantages", minibatch.advantages, normalized.flatten()[i])
        seen += i.tolist()
    assert sorted(seen) == list(range(N * T)), "an epoch must contain every sample once"


def check_update(cpu_is_missing: bool) -> None:
    """fused_update's gradients against autograd in float64."""
    torch.manual_seed(2)
    actor, critic = (nn.Sequential(nn.Linear(5, 16), nn.ELU(), nn.Linear(16, out)) for out in (2, 1))
    std = torch.full((2,), 0.7, requires_grad=True)
    obs, actions, advantages, returns = (torch.randn(200, *shape) for shape in ((5,), (2,), (), ()))
    values, log_probs = torch.randn(200), torch.randn(200) * 0.3 - 2.5
    parameters = [*actor.parameters(), *critic.parameters(), std]
    given = {"obs": obs, "actions": actions, "log_probs": log_probs, "advantages": advantages}
    try:
        fused_update(actor, critic, std, **given, returns=returns, values=values)
    except RuntimeError as error:
        assert cpu_is_missing, error
        return
    assert not cpu_is_missing, "fused_update runs without its library"
    got = [x.grad for x in parameters]
    for x in parameters:
        x.grad = None
    actor, critic, std = actor.double(), critic.double(), std.detach().double().requires_grad_()
    own = torch.distributions.Normal(actor(obs.double()), std).log_prob(actions.double()).sum(-1)
    ratio, a = (own - log_probs).exp(), advantages.double()
    surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    (surrogate + (critic(obs.double()).squeeze(-1) - returns).square().mean()).backward()
    for x, grad in zip([*actor.parameters(), *critic.parameters(), std], got):
        near("gradients", grad, x.grad)


def check_training(folder: Path) -> None:
    """Two iterations on the quadrotor, and two more resumed from the checkpoint."""
    ppo, path = PPOConfig(hidden_dims=(16,), num_minibatches=2, num_epochs=2), None
    for iterations in (2, 4):
        settings = {"env": "quadrotor", "num_steps": 8, "tensorboard": False, "iterations": iterations}
        config = TrainConfig(**settings, resume=path, ppo=ppo)
        trainer = Trainer(make("quadrotor", num_envs=8), config, folder / str(iterations), echo=lambda line: None)
        path = str(trainer.train().checkpoint)
        assert trainer.buffer.nbytes == trainer.planned_nbytes
    assert checkpoint.load(path)["iteration"] == 4


def command(*arguments: str, status: int = 0) -> str:
    """Runs the console script; returns its stdout, or its stderr if it must fail."""
    script = Path(sys.prefix, "bin", "pydrone")
    done = subprocess.run([script, *arguments], capture_output=True, text=True)
    assert done.returncode == status, f"pydrone {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if status == 0 else done.stderr


def check_commands(folder: Path, without: list[str]) -> None:
    assert "doctor" in command("--help") and pydrone.__version__ in command("--version")
    assert "75,366,400" in command("memory")
    report = json.loads(command("doctor", "--json", "--no-speed"))
    assert report["passed"] and report["self_tests"]
    if "tyro" in without:
        assert 'pip install "pydrone-rl[train]"' in command("train", "--run-dir", str(folder / "run"), status=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", choices=["built", "missing"], default="built")
    parser.add_argument("--without", nargs="*", default=[], metavar="PACKAGE")
    options = parser.parse_args()
    package = Path(pydrone.__file__).resolve().parent
    assert package.is_relative_to(Path(sys.prefix).resolve()), f"{package}: not the installed one"
    for name in options.without:
        assert find_spec(name) is None, f"{name} is installed"
    requires = [x for x in metadata.requires("pydrone-rl") if "extra ==" not in x]
    assert requires == ["torch>=2.10"], requires
    missing, library = pydrone.backends()["cpu"], package / "_native_cpu.so"
    if options.cpu == "built":
        assert missing is None, missing
    else:
        assert missing is not None and not library.exists()
        assert missing.startswith("there was no C++ compiler at install time"), missing
    for backend in (None, "reference", *(["cpu"] if missing is None else [])):
        check_rollout(backend)
    default = "cpu" if missing is None else "reference"
    for check in selftest.kernels(default).values():
        check(default, "cpu")
    check_update(missing is not None)
    with tempfile.TemporaryDirectory() as folder:
        check_training(Path(folder))
        check_commands(Path(folder), options.without)
    library = hashlib.sha256(library.read_bytes()).hexdigest()[:12] if missing is None else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pydrone": pydrone.__version__}
    print(json.dumps(versions | {"cpu": missing, "library": library}))


if __name__ == "__main__":
    main()
