"""Rollouts and updates as graphs, emulated on the CPU: a captured training is the uncaptured one to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from capture_emulation import emulated

import pydrone
from pydrone.envs.quadrotor import Quadrotor
from pydrone.envs.randomization import Randomization
from pydrone.ppo import fused_loss, graphs
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.distributed import ALONE
from pydrone.ppo.trainer import Trainer

cpu = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=str(pydrone.backends()["cpu"]))
N, T, ITERATIONS = 12, 6, 4


@pytest.fixture
def on_the_cpu(monkeypatch) -> list[str]:
    """Graphs as if the CPU had them. Returns what was captured."""
    seen, capture = [], emulated(monkeypatch)

    def recorded(run, generators):
        seen.append(run.__name__)
        return capture(run, generators)

    monkeypatch.setattr(graphs, "why_not", lambda trainer: None)
    monkeypatch.setattr(graphs, "aside", lambda run: run())
    monkeypatch.setattr(graphs, "capture", recorded)
    return seen


def trained(capture: bool, ppo: dict, env: dict | None = None) -> tuple[Trainer, list[dict[str, float]]]:
    settings = PPOConfig(hidden_dims=(16,), num_epochs=2, num_minibatches=3, learner="torch", **ppo)
    env = Quadrotor(N, seed=3, max_episode_length=9, **(env or {}))
    config = TrainConfig(num_steps=T, iterations=ITERATIONS, capture=capture, ppo=settings)
    trainer = Trainer(env, config, echo=lambda line: None)
    trainer.learner.fused_loss = fused_loss.FusedLoss()  # as on CUDA
    return trainer, [trainer.iterate() for _ in range(ITERATIONS)]


CASES = [
    ({}, {}),
    ({"normalize_obs": True, "normalize_values": True, "normalize_rewards": True}, {}),
    ({"schedule": "linear", "advantage_scope": "minibatch", "obs_dtype": "bfloat16"}, {}),
    ({}, {"randomization": Randomization(mass=(0.8, 1.2), motor_lag=(0.01, 0.05), latency=(0, 2), wind=(0, 0.02))}),
]


@cpu
@pytest.mark.parametrize(("ppo", "env"), CASES, ids=["plain", "normalised", "minibatches", "randomised"])
def test_a_captured_training_is_the_uncaptured_one(ppo, env, on_the_cpu):
    eager, expected = trained(False, ppo, env)
    assert on_the_cpu == []
    replayed, found = trained(True, ppo, env)
    assert on_the_cpu == ["_collect", "_learn"]
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs:
            if not name.startswith(("time/", "steps_per_second")):
                assert ours[name] == pytest.approx(theirs[name], abs=0, rel=0, nan_ok=True), name
    assert len({figures["surrogate_loss"] for figures in found}) == ITERATIONS
    assert sum(figures["episodes"] for figures in found) > 0
    for name, x in eager.policy.state_dict().items():
        assert torch.equal(x, replayed.policy.state_dict()[name]), name
    assert torch.equal(eager.env.pos, replayed.env.pos)


def test_what_cannot_be_captured_is_refused_with_the_reason():
    def reason(**change) -> str | None:
        trainer = SimpleNamespace(
            device=torch.device("cuda"),
            env=SimpleNamespace(capturable=True, autoreset="same_step"),
            config=SimpleNamespace(ppo=PPOConfig(**change.pop("ppo", {}))),
            policy=SimpleNamespace(recurrent=False),
            ranks=ALONE,
        )
        vars(trainer).update(change)
        return graphs.why_not(trainer)

    assert reason() is None
    assert reason(device=torch.device("cpu")) == "it needs a CUDA device, the environment is on cpu"
    assert "SimpleNamespace does not say" in reason(env=SimpleNamespace(autoreset="same_step"))
    assert "autoreset is 'next_step'" in reason(env=SimpleNamespace(capturable=True, autoreset="next_step"))
    assert "recurrent" in reason(policy=SimpleNamespace(recurrent=True))
    assert "max_kl" in reason(ppo={"max_kl": 0.1})
    assert "autocast" in reason(ppo={"autocast": True})
    assert "several processes" in reason(ranks=SimpleNamespace(several=True))
    with pytest.raises(ValueError, match=r"^capture: expected False here: it needs a CUDA device"):
        Trainer(Quadrotor(4), TrainConfig(num_steps=2, capture=True, ppo=PPOConfig(num_minibatches=1)))


@cpu
def test_observations_that_move_are_refused(on_the_cpu, monkeypatch):
    step = Quadrotor.step

    def elsewhere(self, actions):
        result = step(self, actions)
        return result._replace(obs=result.obs.clone())

    monkeypatch.setattr(Quadrotor, "step", elsewhere)
    with pytest.raises(RuntimeError, match="writes its observations to the same memory"):
        trained(True, {})
