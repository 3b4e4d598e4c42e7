"""The precision of matrix products: which a configuration asks for, and that torch's setting is only lent to it."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from pydrone.ops.schema import MATMUL
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy import matmul
from pydrone.ppo.policy.make import make_policy

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SETTINGS = torch.backends.cuda.matmul, torch.backends.cudnn.rnn


def settings() -> list[str]:
    return [x.fp32_precision for x in SETTINGS]


def test_the_default_is_the_devices():
    assert [matmul.chosen(None, x) for x in (CPU, CUDA)] == ["float32", "tf32"]
    assert all(matmul.chosen(x, device) == x for x in MATMUL for device in (CPU, CUDA))


def test_autocast_is_an_alias():
    config = PPOConfig(autocast=True)
    assert config.matmul == "bfloat16" and config == PPOConfig(matmul="bfloat16") and PPOConfig().matmul is None
    assert PPOConfig(autocast=True, matmul="bfloat16") == config
    with pytest.raises(ValueError, match=r"^autocast: expected False with matmul 'tf32', got True"):
        PPOConfig(autocast=True, matmul="tf32")
    with pytest.raises(ValueError, match=r"^matmul: expected None, 'float32', 'tf32' or 'bfloat16', got 'half'$"):
        PPOConfig(matmul="half")


@pytest.mark.parametrize(("asked", "set_to"), [(None, "tf32"), ("tf32", "tf32"), ("float32", "ieee")])
@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_a_cuda_devices_setting_is_restored(asked, set_to, before):
    was = settings()
    try:
        for x in SETTINGS:
            x.fp32_precision = before
        given = settings()
        with matmul.products(asked, CUDA), matmul.forward(asked, CUDA):
            assert settings() == [set_to] * 2
        assert settings() == given
        with pytest.raises(ZeroDivisionError), matmul.products(asked, CUDA):
            raise ZeroDivisionError
        assert settings() == given
    finally:
        for x, value in zip(SETTINGS, was):
            x.fp32_precision = value


def test_legacy_settings_of_the_caller_can_still_be_read():
    """torch refuses to read allow_tf32 where the newer name was set to something else."""
    was = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            for asked in ("float32", "tf32"):
                with matmul.products(asked, CUDA):
                    pass
                assert torch.backends.cuda.matmul.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was


def test_a_cpus_products_leave_it_alone():
    given = settings()
    for asked in (None, "float32", "tf32"):
        with matmul.products(asked, CPU), matmul.forward(asked, CPU):
            assert settings() == given and not torch.is_autocast_enabled("cpu")


class Batch(SimpleNamespace):
    """A minibatch's fields, as attributes and as items."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name)


@pytest.mark.parametrize("kind", ["plain", "discrete", "gru"])
def test_every_product_of_a_policy_is_within_it(kind, monkeypatch):
    """Forward, when acting and learning, and backward; Adam and the loss are of no matter."""
    depth, seen = [0], []

    @contextlib.contextmanager
    def lent(asked, device):
        assert asked == "tf32"
        depth[0] += 1
        yield
        depth[0] -= 1

    monkeypatch.setattr(matmul, "products", lent)
    config = PPOConfig(matmul="tf32", learner="torch", hidden_dims=(8,), recurrent="gru" if kind == "gru" else "none")
    actions, number = (((), torch.int64), 3) if kind == "discrete" else (2, None)
    policy = make_policy(5, actions, config, number)
    for layer in [x for x in policy.modules() if isinstance(x, (torch.nn.Linear, torch.nn.GRU))]:
        layer.register_forward_hook(lambda *_: seen.append(depth[0]))
    obs = torch.randn(6, 5)
    step = policy.act(obs)
    policy.value(obs), policy.mode(obs)
    learner = Learner(policy, config)
    if kind != "gru":
        for p in policy.parameters():
            p.register_hook(lambda _: seen.append(depth[0]))
        of_gae = {name: torch.randn(6) for name in ("advantages", "returns")}
        learner.compute_gradients(Batch(obs=obs, **step._asdict(), **policy.stored(step), **of_gae))
    assert len(seen) > 4 and min(seen) > 0 and depth == [0]


def test_tf32_on_a_cpu_is_float32():
    obs = torch.randn(33, 5)
    found = []
    for asked in (None, "float32", "tf32"):
        torch.manual_seed(0)
        config = PPOConfig(matmul=asked, hidden_dims=(8,))
        policy = make_policy(5, 2, config)
        learner = Learner(policy, config)
        found.append(torch.cat([learner.act(obs).mean, policy.mean(obs).detach()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
