"""What the learner launches on CUDA, where the CPU's operations stand in for Triton's launchers.

A tensor that is made without a device would be on the CPU, or here on "meta", which no operation takes.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.buffer import RolloutBuffer
from pydrone.ops import native, triton
from pydrone.ops.schema import MATMUL, PPO_SCHEMAS
from pydrone.ppo import clipped_step, fused_update
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner.acting import FusedActing
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.make import make_policy

N, T = 6, 3
KERNELS = {"ppo_gradients": "ppo_gradients", "ppo_act": "ppo_act", "ppo_step": "ppo_act"}
KERNELS["clipped_adam"] = "clipped_adam"
on_cpu = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")


class Launches(TorchDispatchMode):
    """The calls of pydrone's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pydrone":
            names = [x.name for x in func._schema.arguments]
            self.calls.append((func._schema.name.removeprefix("pydrone::"), dict(zip(names, args)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Triton, with every kernel, serves this device. Returns what each kernel was asked about."""
    asked: list[tuple] = []
    monkeypatch.setattr(triton, "serves", lambda device: True)
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(triton, "why_not", lambda *subject: asked.append(subject))
    return asked


def made(checks: bool = False, **settings) -> tuple[Learner, RolloutBuffer]:
    """``checks``: whether the buffer's operations check their arguments; Triton's check only some."""
    torch.manual_seed(0)
    config = PPOConfig(hidden_dims=(16, 16), num_minibatches=2, num_epochs=1, **settings)
    learner = Learner(make_policy(5, 2, config), config)
    buffer = RolloutBuffer(N, T, obs=5, actions=2, fields=learner.policy.fields())
    buffer._storage.ops = buffer._storage.ops._replace(checks=checks)
    return learner, buffer


def collect(learner: Learner, buffer: RolloutBuffer) -> None:
    acting, ends, obs = learner.acting(buffer), None, torch.arange(N * 5.0, device="cpu").view(N, 5).sin()
    for t in range(T):
        acting(obs + t, ends)
        ends = {"rewards": obs[:, 0] + t, "dones": obs[:, 1] > 0.8}
    buffer.end(**ends)
    buffer.compute_gae(learner.policy.value(obs), check=False)


def launched(learner: Learner, buffer: RolloutBuffer) -> Launches:
    """By a rollout and an update."""
    torch.manual_seed(1)
    with torch.device("meta"), Launches() as seen:
        collect(learner, buffer)
        learner.update(buffer)
    return seen


@on_cpu
@pytest.mark.parametrize("matmul", MATMUL)
def test_every_step_and_minibatch_is_served_by_the_operations(matmul, as_on_cuda):
    learner, buffer = made(matmul=matmul)
    number = MATMUL.index(matmul)
    assert learner.not_fused is None and learner.fused_loss is None
    assert [(kernel, len(actor), len(critic), asked) for kernel, actor, critic, asked in as_on_cuda] == [
        ("ppo_gradients", 6, 6, number),
        ("ppo_act", 6, 6, number),
    ]
    assert isinstance(learner.acting(buffer), FusedActing)
    if matmul == "bfloat16" and not torch.ops.pydrone.has_bf16():
        return
    seen = launched(learner, buffer)
    assert seen.names == ["ppo_step"] * T + ["append", "gae"] + ["ppo_gradients", "clipped_adam"] * 2
    (_, of_minibatch), (_, of_adam) = seen.calls[-2:]
    assert of_minibatch["matmul"] == seen.calls[0][1]["matmul"] == number
    assert of_minibatch["drawn"][0] == T  # read in the ring
    assert of_adam["kl"].shape == () and of_adam["schedule"] == [0.01, 1e-6, 1.5, 1e-5, 1e-2]


@on_cpu
def test_captured_steps_and_minibatches_get_the_devices_counters(as_on_cuda):
    learner, buffer = made()
    buffer.advance(T)
    with buffer.as_captured():
        seen = launched(learner, buffer)
    assert seen.names == ["ppo_step"] * T + ["append", "gae"] + ["ppo_gradients", "clipped_adam"] * 2
    of_ring = [call["cursor"] for name, call in seen.calls if name in ("ppo_step", "ppo_gradients")]
    assert len(of_ring) == T + 2 and all(x is buffer._storage.cursor for x in of_ring)


@on_cpu
def test_the_kinds_of_checks_store_the_same(as_on_cuda):
    (first, ours), (second, theirs) = made(), made(checks=True)
    assert launched(first, ours).names == launched(second, theirs).names
    for name, x in theirs.state_dict().items():
        assert torch.equal(x, ours.state_dict()[name]) if isinstance(x, torch.Tensor) else True
    assert all(torch.equal(x, y) for x, y in zip(first.policy.parameters(), second.policy.parameters()))


@on_cpu
@pytest.mark.parametrize("checks", [False, True])
def test_a_mistake_in_a_step_is_named(checks, as_on_cuda):
    learner, buffer = made(checks)
    acting = learner.acting(buffer)
    acting(torch.zeros(N, 5))
    with pytest.raises(ValueError, match=r"^rewards: expected shape \[6\] or \[6, 1\], got \[5\]"):
        acting(torch.zeros(N, 5), {"rewards": torch.zeros(5), "dones": torch.zeros(N)})
    assert len(buffer) == 0


@on_cpu
def test_a_kernel_that_cannot_serve_leaves_the_networks_to_torch(as_on_cuda, monkeypatch):
    def reason(kernel, *subject):
        return "weights of 3 MB do not fit" if kernel == "ppo_gradients" else None

    monkeypatch.setattr(triton, "why_not", reason)
    learner, buffer = made()
    assert learner.not_fused == "weights of 3 MB do not fit" and learner.fused_loss is not None
    torch.manual_seed(1)
    with Launches() as seen:
        collect(learner, buffer)
        learner.update(buffer)
    layers = sum(isinstance(x, torch.nn.Linear) for x in learner.policy.modules())
    minibatch = ["gather", *["activate"] * layers, "ppo_loss", *["activate_backward"] * layers, "clipped_adam"]
    assert seen.names == [*["append"] * 2 * T, "gae", *minibatch * 2]


@on_cpu
def test_torch_alone_does_without(as_on_cuda):
    learner, buffer = made(learner="torch")
    assert learner.not_fused == "learner is torch" and learner.fused_loss is None and not as_on_cuda
    assert launched(learner, buffer).names == [*["append"] * 2 * T, "gae", *["gather"] * 2]


@on_cpu
def test_functions_for_other_codebases(as_on_cuda, monkeypatch):
    policy, fields = made()[0].policy, {"obs": torch.randn(4, 5), "actions": torch.randn(4, 2)}
    fields |= {x: torch.randn(4) for x in ("log_probs", "advantages", "returns", "values")}
    with torch.device("meta"), Launches() as seen:
        fused_update(policy.actor, policy.critic, policy.std, **fields)
        optimizer = torch.optim.Adam(policy.parameters(), lr=torch.tensor(1e-3, device="cpu"))
        clipped_step(optimizer, [list(policy.parameters())], 1.0)
    assert seen.names == ["ppo_gradients", "clipped_adam"] and seen.calls[0][1]["matmul"] == 0
    assert [kernel for kernel, *_ in as_on_cuda][-2:] == ["ppo_gradients", "clipped_adam"]
    monkeypatch.setattr(triton, "why_not", lambda kernel, *_: f"no {kernel} here")
    with pytest.raises(RuntimeError, match=r"^no ppo_gradients here$"):
        fused_update(policy.actor, policy.critic, policy.std, **fields)
    with pytest.raises(RuntimeError, match=r"^optimizer: no clipped_adam here$"):
        clipped_step(optimizer, [list(policy.parameters())], 1.0)


@on_cpu
@pytest.mark.parametrize("kl", [0.1, 0.0201, 0.02, 0.0199, 0.01, 0.005, 0.0049, 1e-5, 1e-6, 1e-7, 0.0, -1.0, torch.nan])
@pytest.mark.parametrize("rate", [1e-3, 1e-2, 9e-3, 1e-5, 1.2e-5, 1e-6, 1.0, torch.nan])
def test_the_operation_adapts_the_learning_rate_as_the_learner_does(kl, rate):
    found = []
    for max_kl in (None, 1e9):  # with which the learner does it
        learner, _ = made(max_kl=max_kl)
        learner.learning_rate.fill_(rate)
        for p in learner.policy.parameters():
            p.grad = torch.ones_like(p)
        learner.compute_gradients = lambda minibatch: torch.tensor([0.0, 0.0, 0.0, kl])
        with Launches() as seen:
            learner.step(None)
        assert seen.names == ["clipped_adam"] and (seen.calls[0][1].get("kl") is None) == (max_kl is not None)
        found.append((learner.learning_rate.clone(), [p.detach() for p in learner.policy.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) or found[1][0].isnan() == found[0][0].isnan() == True  # noqa: E712
    assert all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in zip(found[0][1], found[1][1]))


@pytest.mark.parametrize("operation", PPO_SCHEMAS)
def test_triton_serves_cuda_tensors(operation, monkeypatch):
    """The dispatcher calls the launcher of this name."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pydrone::{operation}", "CUDA")
    called = []
    monkeypatch.setattr(triton, operation, lambda *arguments: called.append(arguments))
    native._triton(operation)(1, 2)
    assert called == [(1, 2)]


@pytest.mark.parametrize("operation", KERNELS)
def test_launchers_take_the_schemas_arguments(operation):
    pytest.importorskip("triton")
    name = f"pydrone._triton.{KERNELS[operation]}"
    if find_spec(name) is None:
        assert triton.why_not(KERNELS[operation]) is not None
        return
    launcher = getattr(import_module(name), operation)
    arguments = [x.name for x in getattr(torch.ops.pydrone, operation).default._schema.arguments]
    assert list(inspect.signature(launcher).parameters) == arguments


def test_a_missing_kernel_says_so(monkeypatch):
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert triton.why_not("no_such_kernel", [], [], 0) == "there is no Triton kernel no_such_kernel yet"
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    assert triton.why_not("gae") == "triton is not installed"
