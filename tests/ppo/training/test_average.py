"""The average of the weights: by hand, in a training, and in what eval and export take from a checkpoint."""

import math

import pytest
import torch

from pydrone.envs import make
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.export import policy_of
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.average import WeightAverage, deployed
from pydrone.report import runs


def trainer(run_dir=None, resume=None, iterations=3, **ppo) -> Trainer:
    ppo = PPOConfig(**{"hidden_dims": (8,), "num_epochs": 2, "learning_rate": 1e-2, **ppo})
    config = TrainConfig(
        "quadrotor", num_steps=8, iterations=iterations, tensorboard=False, resume=resume, save_interval=1, ppo=ppo
    )
    return Trainer(make("quadrotor", num_envs=4, seed=3), config, run_dir, echo=lambda _: None)


def averaged(average: WeightAverage, policy) -> dict:
    return deployed({"policy": policy.state_dict(), "average": average.state_dict()})


def test_by_hand():
    layer = torch.nn.Linear(1, 1)
    average = WeightAverage(layer, 0.5)
    for weight, expected in ((1.0, 1.0), (2.0, (0.5 * 1 + 2) / 1.5), (4.0, (0.25 * 1 + 0.5 * 2 + 4) / 1.75)):
        with torch.no_grad():
            layer.weight.fill_(weight)
            layer.bias.fill_(-weight)
        average.update()
        found = averaged(average, layer)
        assert found["weight"].item() == pytest.approx(expected, rel=1e-6)
        assert found["bias"].item() == pytest.approx(-expected, rel=1e-6)
        assert layer.weight.item() == weight  # what learns is left alone


@pytest.mark.parametrize("decay", [0.5, 0.93, 0.999])
def test_a_training_averages_the_weights_after_each_iteration(decay):
    """Against the sum in float64; before the first iteration the weights are their own average."""
    training, weights = trainer(ema_decay=decay, normalize_obs=True), []
    assert all(torch.equal(x, training.policy.state_dict()[name]) for name, x in deployed(training.learnt()).items())
    for _ in range(4):
        training.iterate()
        weights.append({name: x.detach().double().clone() for name, x in training.policy.named_parameters()})
    found, own = deployed(training.learnt()), training.policy.state_dict()
    factors = [decay ** (3 - k) for k in range(4)]
    for name, x in own.items():
        if name in weights[0]:
            expected = sum(f * w[name] for f, w in zip(factors, weights, strict=True)) / sum(factors)
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found[name], x)  # running statistics
    assert not torch.equal(found["actor.0.weight"], own["actor.0.weight"])


@pytest.mark.parametrize("recurrent", ["none", "gru"])
def test_eval_and_export_take_the_averages(recurrent, tmp_path):
    training = trainer(tmp_path, ema_decay=0.8, recurrent=recurrent, rnn_dim=4)
    training.train()
    state = checkpoint.load(tmp_path / "model_3.pt")
    expected = deployed(state)
    run = runs.load(tmp_path)
    for policy in (runs.load_policy(run, training.env), policy_of(state)):
        for name, x in policy.named_parameters():
            assert torch.equal(x, expected[name]) and not torch.equal(x, state["policy"][name]), name


def test_what_learns_is_the_same_with_and_without(tmp_path):
    found = []
    for decay in (0.0, 0.9):  # in turn: both draw from torch's generator
        training = trainer(tmp_path / str(decay), ema_decay=decay)
        training.train()
        found.append(checkpoint.load(tmp_path / str(decay) / "model_3.pt"))
    without, with_average = (state["policy"] for state in found)
    assert all(torch.equal(x, with_average[name]) for name, x in without.items())
    assert [("average" in state) for state in found] == [False, True]


def test_a_training_resumed_with_an_average_begins_it_there(tmp_path):
    trainer(tmp_path / "without").train()
    path = str(tmp_path / "without" / "model_2.pt")
    training = trainer(tmp_path / "with", resume=path, ema_decay=0.9)
    training.train()
    found = deployed(checkpoint.load(tmp_path / "with" / "model_3.pt"))
    for name, x in training.policy.named_parameters():  # of one iteration
        torch.testing.assert_close(found[name], x.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average", [3, {}, {"sums": {}, "total": torch.ones(())}, {"sums": {"a": 1}, "total": "x"}])
def test_what_is_no_average_is_refused(average, tmp_path):
    trainer(tmp_path, ema_decay=0.9).train()
    path = tmp_path / "model_3.pt"
    state = checkpoint.load(path) | {"average": average}
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match=r"model_3.pt: expected averages of these weights"):
        trainer(resume=str(path), ema_decay=0.9, iterations=4)
    if average != {"sums": {}, "total": torch.ones(())}:
        with pytest.raises(ValueError, match="expected the weights of a policy"):
            policy_of(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan, "0.9", True])
def test_a_decay_that_is_none(decay):
    with pytest.raises(ValueError, match=r"ema_decay: expected a number of at least 0 and below 1, got"):
        PPOConfig(ema_decay=decay)
