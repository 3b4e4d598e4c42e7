"""How many kernels a step and a minibatch launch on CUDA: Triton's, interpreted on CPU tensors, and torch's; and what
the prepared operations compute there.

test_triton.py runs them.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from pydrone.buffer import RolloutBuffer
from pydrone.ops import triton
from pydrone.ppo import FusedAct, FusedUpdate
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner.acting import FusedActing
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.make import make_policy

if not triton.interpreted():
    raise RuntimeError("set TRITON_INTERPRET=1")

N, T = 3, 2
MINIBATCH = ["clamp_", "ppo_gradients_kernel", "add_partials_kernel", "squares_kernel", "adam_kernel"]
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """The names of launched kernels. pydrone's operations are Triton's in it, as on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if func.namespace == "pydrone":
            more = [kwargs.get(x.name, x.default_value) for x in func._schema.arguments[len(args) :]]
            with self:
                return getattr(triton, name)(*args, *more)
        if func.namespace != "profiler" and name not in NO_LAUNCH and not _is_view(func):
            self.names.append(name)
        return func(*args, **kwargs)


def _is_view(func: torch._ops.OpOverload) -> bool:
    """Whether it only returns its argument's memory. lift_fresh does, but is a copy from the host on CUDA."""
    aliases = [x.alias_info for x in func._schema.returns]
    return "lift" not in func._schema.name and bool(aliases) and all(x is not None and not x.is_write for x in aliases)


@pytest.fixture
def seen(monkeypatch) -> Launches:
    launches, call = Launches(), GridExecutor.__call__

    def launch(kernel, *args, **kwargs) -> None:
        names = [*launches.names, kernel.fn.__name__]
        call(kernel, *args, **kwargs)
        launches.names = names  # without the interpreter's own work

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(triton, "serves", lambda device: True)
    return launches


def made(**settings) -> tuple[Learner, RolloutBuffer]:
    torch.manual_seed(0)
    config = PPOConfig(hidden_dims=(2,), num_minibatches=1, num_epochs=2, **settings)
    learner = Learner(make_policy({"policy": 5, "critic": 3}, 2, config), config)
    assert learner.not_fused is None
    buffer = RolloutBuffer(N, T, obs=learner.policy.obs, actions=2, fields=learner.policy.fields())
    buffer._storage.ops = buffer._storage.ops._replace(checks=False)  # as Triton's
    return learner, buffer


def collect(learner: Learner, buffer: RolloutBuffer, seen: Launches) -> list[list[str]]:
    """Fills the buffer; returns what each step launched."""
    acting, ends, launched = learner.acting(buffer), None, []
    assert isinstance(acting, FusedActing)
    for t in range(T):
        obs = {"policy": torch.randn(N, 5), "critic": torch.randn(N, 3)}
        seen.names = []
        with seen:
            acting(obs, ends)
        launched.append(seen.names)
        ends = {"rewards": obs["critic"][:, 0], "dones": torch.arange(N) == t, "truncated": torch.arange(N) == t}
    buffer.end(**ends)
    buffer.compute_gae(learner.policy.value(obs), timeout_bootstrap="stored_value", check=False)
    return launched


SETTINGS = [
    {"schedule": "adaptive", "entropy_coef": 0.01, "normalize_obs": True, "normalize_values": True},
    {"schedule": "fixed", "entropy_coef": 0.0, "captured": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_launches(settings, seen):
    learner, buffer = made(**{name: x for name, x in settings.items() if name != "captured"})
    buffer.advance(0)
    with buffer.as_captured() if "captured" in settings else contextlib.nullcontext():
        first, *steps = collect(learner, buffer, seen)
        assert [x for x in first if x != "new_zeros"] == ["clamp_", "randn_like", "step_kernel"]
        assert steps == [["randn_like", "step_kernel"]] * (T - 1)
        learner.update(buffer)  # makes Adam's state
        seen.names = []
        with seen:
            learner.update(buffer)
    at = seen.names.index(MINIBATCH[0])
    assert seen.names[at : at + 12] == [*MINIBATCH * 2, "stack", "mean"]


def test_prepared_operations_with_discrete_actions(seen):
    """The same numbers as the CPU's operations, by Triton's launchers."""
    torch.manual_seed(0)
    categories, size = [3, 2], 5
    actor, critic = (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, x)) for x in (5, 1))
    act, obs = FusedAct(actor, critic, categories=categories), torch.randn(size, 4)
    update = FusedUpdate(actor, critic, categories=categories, entropy_coef=0.1, value_clip=0.2, value_max=False)
    found = []
    for launches in (contextlib.nullcontext(), seen):
        for p in (*actor.parameters(), *critic.parameters()):
            p.grad = None
        torch.manual_seed(1)
        with launches:
            acted = act(None, obs)
            minibatch = {"obs": obs, "actions": acted.actions.long(), "log_probs": acted.log_probs - 0.1}
            minibatch |= {"advantages": obs[:, 0], "returns": obs[:, 1], "values": acted.values}
            metrics = update(None, **minibatch)
        found.append([*acted, metrics, *[p.grad for p in (*actor.parameters(), *critic.parameters())]])
    assert [x for x in seen.names if "kernel" in x] == ["step_kernel", "ppo_gradients_kernel", "add_partials_kernel"]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)
