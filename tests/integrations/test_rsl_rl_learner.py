"""rsl_rl's PPO acting and learning by the fused operations, against rsl_rl's own code with the same seeds."""

from __future__ import annotations

import copy
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("rsl_rl")

import rsl_rl_ranks
from rsl_rl.algorithms import ppo
from rsl_rl.models import MLPModel
from rsl_rl.modules.distribution import GaussianDistribution
from tensordict import TensorDict
from test_rsl_rl import CLASS_NAME, RND, SYMMETRY, Drones, config, construct, fused, learn, mirrored

from pydrone.integrations import rsl_rl_learner
from pydrone.integrations.rsl_rl import patch, unpatch
from pydrone.ops import native

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")
OURS = {"shuffle": "rsl_rl"}
Change = Callable[[object], None]


@pytest.fixture(autouse=True)
def _unpatched():
    rsl_rl_learner._told.clear()
    yield
    unpatch()


def made(
    ours: bool, env=Drones, change: Change | None = None, critic=("policy",), gaussian=None, model=None, **options
):
    """A runner; ``change`` is called with its algorithm."""
    cfg = config(CLASS_NAME, critic=critic, **OURS, **options) if ours else config(critic=critic, **options)
    for name in ("actor", "critic"):
        cfg[name] |= model or {}
    cfg["actor"]["distribution_cfg"] = {**cfg["actor"]["distribution_cfg"], **(gaussian or {})}
    runner = construct(env(), cfg)
    if change is not None:
        change(runner.alg)
    return runner


def weights(algorithm) -> torch.Tensor:
    return torch.cat(
        [x.detach().flatten() for model in (algorithm.actor, algorithm.critic) for x in model.parameters()]
    )


def rates(runner) -> list[float]:
    """The learning rate of each minibatch, as the list that training fills."""
    found, (group,) = [], runner.alg.optimizer.param_groups
    kept = type("Kept", (dict,), {"__setitem__": lambda x, k, v: (found.append(v), dict.__setitem__(x, k, v))[1]})
    runner.alg.optimizer.param_groups[0] = kept(group)
    return found


def assert_alike(ours, theirs, tolerance: float = 1e-4) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


CASES = {
    "scalar": {},
    "log": {"gaussian": {"std_type": "log"}},
    "scalar, outside of its range": {"gaussian": {"std_range": (0.2, 0.7)}},
    "log, outside of its range": {"gaussian": {"std_type": "log", "std_range": (1.5, 2.0)}},
    "not learnt": {"gaussian": {"learn_std": False}},
    "without normalisers": {"model": {"obs_normalization": False}},
    "groups that differ": {"env": lambda: Drones(two_groups=True), "critic": ("policy", "height")},
    "advantages by minibatch": {"normalize_advantage_per_mini_batch": True},
    "plain value loss": {"use_clipped_value_loss": False},
    "fixed schedule": {"schedule": "fixed"},
    "small steps": {"learning_rate": 1e-5, "desired_kl": 1e-3},
    "large steps": {"learning_rate": 1e-2, "num_learning_epochs": 3},
    "coefficients": {"entropy_coef": 0.1, "value_loss_coef": 0.3, "clip_param": 0.1, "max_grad_norm": 0.05},
    "tanh, three layers": {"model": {"activation": "tanh", "hidden_dims": [32, 16, 8]}},
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd"},
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns_what_rsl_rl_learns(case):
    (theirs, expected, rate, drawn), (ours, found, our_rate, our_drawn) = (
        trained(x, **CASES[case]) for x in (False, True)
    )
    assert fused(ours) and not fused(theirs)
    for name in ("actions", "values", "actions_log_prob"):
        mine, other = found[0][name], expected[0][name]
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max(), name
    for mine, other in zip(found, expected, strict=True):
        assert list(mine["losses"]) == list(other["losses"])
        for name, loss in other["losses"].items():
            assert abs(mine["losses"][name] - loss) <= 1e-4 * (1 + abs(loss)), name
    assert our_rate == rate and (len(set(rate)) > 2 or "schedule" in CASES[case])
    assert_alike(weights(ours.alg), weights(theirs.alg))
    for name in ("actor", "critic"):
        mine, other = (getattr(x.alg, name).obs_normalizer.state_dict() for x in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.alg.actor.output_std, theirs.alg.actor.output_std, rtol=1e-4, atol=0)
    assert torch.equal(our_drawn, drawn), "the next rollout would draw other numbers"


def trained(ours: bool, **options) -> tuple:
    """A runner after ten iterations, what it did, the rate of each minibatch, and the generator's state."""
    runner = made(ours, **options)
    rate = rates(runner)
    return runner, learn(runner), rate, torch.get_rng_state()


@pytest.mark.parametrize("num_envs", [3, 10, 64])
@pytest.mark.parametrize("num_actions", [1, 4])
def test_a_step_is_recorded_as_rsl_rl_records_it(num_envs, num_actions):
    obs = TensorDict({"policy": torch.randn(num_envs, 5)}, [num_envs])
    seen = []
    for ours in (False, True):
        algorithm = made(ours).alg
        torch.manual_seed(5)
        groups = {"actor": ["policy"], "critic": ["policy"]}
        gaussian = {"class_name": "GaussianDistribution", "init_std": 0.3}
        algorithm.actor = MLPModel(obs, groups, "actor", num_actions, [8], distribution_cfg=gaussian)
        algorithm.critic = MLPModel(obs, groups, "critic", 1, [8], obs_normalization=True)
        algorithm.critic.update_normalization(obs)
        with torch.inference_mode():
            returned = algorithm.act(obs)
        transition, actor = algorithm.transition, algorithm.actor
        assert fused(type("Runner", (), {"alg": algorithm})) == ours and returned is transition.actions
        assert transition.observations is obs and transition.hidden_states == (None, None)
        recorded = transition.actions, transition.values, transition.actions_log_prob, *transition.distribution_params
        seen.append((*recorded, actor.output_mean, actor.output_std, torch.get_rng_state()))
    for mine, other in zip(seen[1], seen[0], strict=True):
        assert mine.dtype == other.dtype and not mine.requires_grad and mine.is_inference() == other.is_inference()
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def saved(runner) -> dict:
    file = io.BytesIO()
    torch.save(runner.alg.save(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("ours", [False, True])
def test_a_checkpoint_of_one_goes_on_in_the_other(ours):
    first = made(ours)
    learn(first, 3)
    resumed = []
    for other in (ours, not ours):
        runner = made(other)
        runner.alg.load(saved(first), None, True)
        assert runner.alg.learning_rate == first.alg.learning_rate
        torch.manual_seed(11)
        losses = [x["losses"] for x in learn(runner, 3)]
        resumed.append((losses, runner.alg.learning_rate, weights(runner.alg), runner.alg.optimizer.state_dict()))
    (losses, rate, parameters, adam), (others, other_rate, other_parameters, other_adam) = resumed
    assert losses == [pytest.approx(x, rel=1e-4, abs=1e-4) for x in others] and rate == other_rate
    assert_alike(parameters, other_parameters)
    assert adam["param_groups"] == other_adam["param_groups"]
    for mine, theirs in zip(adam["state"].values(), other_adam["state"].values(), strict=True):
        assert mine.keys() == theirs.keys() and mine["step"] == theirs["step"]
        (
            assert_alike(mine["exp_avg"], theirs["exp_avg"], 1e-2),
            assert_alike(mine["exp_avg_sq"], theirs["exp_avg_sq"], 1e-2),
        )


def test_two_processes_learn_what_rsl_rls_learn(tmp_path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, rsl_rl_ranks.__file__, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all((tmp_path / f"{rank}.pt").exists() for rank in range(2)), "\n".join(said)
    (theirs, ours), (_, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert ours["fused"] and not theirs["fused"]
    assert ours["rate"] == theirs["rate"] == other["rate"] != 1e-3
    assert torch.equal(ours["weights"], other["weights"])
    assert_alike(ours["weights"], theirs["weights"])
    assert ours["losses"] == [pytest.approx(x, rel=1e-4, abs=1e-4) for x in theirs["losses"]]


class OwnModel(MLPModel):
    def get_latent(self, *arguments):
        return 2 * super().get_latent(*arguments)


class OwnDistribution(GaussianDistribution):
    def sample(self):
        return super().sample() / 2


def hooked(find: Callable) -> Change:
    return lambda algorithm: find(algorithm).register_forward_hook(lambda module, given, output: 1.1 * output) and None


def own_forward(algorithm) -> None:
    forward = algorithm.actor.get_latent
    algorithm.actor.get_latent = lambda *arguments: 2 * forward(*arguments)


def shared(algorithm) -> None:
    algorithm.critic.mlp[0] = algorithm.actor.mlp[0]
    algorithm.optimizer = torch.optim.Adam({*algorithm.actor.parameters(), *algorithm.critic.parameters()}, lr=1e-3)


UNSUPPORTED = {
    "rnd is on": {"rnd_cfg": RND},
    "symmetry is on": {"symmetry_cfg": {"data_augmentation_func": mirrored, **SYMMETRY}},
    "mixed precision is on": {"use_mixed_precision": True},
    "actor is OwnModel": {"change": lambda x: setattr(x.actor, "__class__", OwnModel)},
    "critic has hooks or functions of its own in its MLP,": {"change": hooked(lambda x: x.critic.mlp)},
    "actor has hooks or functions of its own in its Linear": {"change": hooked(lambda x: x.actor.mlp[2])},
    "actor has hooks or functions of its own in its MLPModel": {"change": own_forward},
    "actor.mlp is Sequential": {"change": lambda x: setattr(x.actor, "mlp", torch.nn.Sequential(*x.actor.mlp))},
    "critic.obs_normalizer is Tanh": {
        "model": {"obs_normalization": False},
        "change": lambda x: setattr(x.critic, "obs_normalizer", torch.nn.Tanh()),
    },
    "distributions are OwnDistribution": {
        "change": lambda x: setattr(x.actor.distribution, "__class__", OwnDistribution)
    },
    "distributions are HeteroscedasticGaussianDistribution": {
        "gaussian": {"class_name": "HeteroscedasticGaussianDistribution"}
    },
    "actor: expected tanh, elu": {"model": {"activation": "lrelu"}},
    "critic: expected the actor's activation": {"change": lambda x: activate(x.critic, torch.nn.Tanh())},
    "actor and critic share parameters": {"change": shared},
}


def activate(model, activation) -> None:
    for i in range(1, len(model.mlp), 2):
        model.mlp[i] = activation


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_is_not_supported_goes_rsl_rls_way(reason, caplog):
    options = copy.deepcopy(UNSUPPORTED[reason])
    theirs = learn(made(False, **options), 2)
    with caplog.at_level(logging.WARNING, "pydrone.integrations.rsl_rl"):
        runner = made(True, **options)
        ours = learn(runner, 2)
        learn(made(True, **options), 1)
    assert not fused(runner)
    (record,) = caplog.records
    assert record.name == "pydrone.integrations.rsl_rl" and reason.rstrip(",") in record.getMessage()
    assert torch.equal(ours[0]["actions"], theirs[0]["actions"])
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-4, abs=1e-4)


def test_settings_of_torch_and_of_rsl_rl_that_it_does_not_know(caplog, monkeypatch):
    algorithm = made(True).alg
    obs = algorithm.storage.observations[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert rsl_rl_learner._prepared(algorithm, obs, rsl_rl_learner.FusedAct) is None
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert rsl_rl_learner._prepared(algorithm, obs, rsl_rl_learner.FusedAct) is None
    handle.remove()
    assert rsl_rl_learner._prepared(algorithm, obs, rsl_rl_learner.FusedAct) is not None
    compiled = copy.copy(algorithm)
    compiled.actor = torch.compile(algorithm.actor, backend="eager")
    assert rsl_rl_learner._prepared(compiled, obs, rsl_rl_learner.FusedAct) is None
    assert rsl_rl_learner._prepared(algorithm, obs.double(), rsl_rl_learner.FusedAct) is None
    monkeypatch.setattr(rsl_rl_learner, "_minor", 6)
    assert rsl_rl_learner._prepared(algorithm, obs, rsl_rl_learner.FusedAct) is None
    said = [record.getMessage() for record in caplog.records]
    expected = ("mixed precision", "hooks for all modules", "OptimizedModule", "float64", "5.0 to 5.5")
    assert len(said) == 5 and all(x in line for x, line in zip(expected, said))


def test_the_learner_can_be_turned_off_and_every_way_back(caplog):
    original = ppo.PPO.act, ppo.PPO.update
    for learner in ("fused", "rsl_rl"):
        patch("rsl_rl", learner)
        runner = construct(Drones(), config())
        learn(runner, 1)
        assert fused(runner) == (learner == "fused")
        cfg = config(CLASS_NAME, learner=learner)
        runner = construct(Drones(), cfg)
        learn(runner, 1)
        assert fused(runner) == (learner == "fused")
    assert (ppo.PPO.act, ppo.PPO.update) != original
    unpatch()
    assert (ppo.PPO.act, ppo.PPO.update) == original and not caplog.records
    for call in (lambda: patch(learner="torch"), lambda: construct(Drones(), config(CLASS_NAME, learner=None))):
        with pytest.raises(ValueError, match="learner"):
            call()


def test_a_replaced_layer_and_a_hook_take_effect_at_the_next_rollout():
    runner = made(True)
    learn(runner, 1)
    runner.alg.actor.mlp[0] = torch.nn.Linear(*runner.alg.actor.mlp[0].weight.shape[::-1])
    learn(runner, 1)
    assert fused(runner) and runner.alg.actor.mlp[0].weight.grad is not None
    hooked(lambda x: x.actor.mlp)(runner.alg)
    learn(runner, 1)
    assert not fused(runner)
