"""The fused update of skrl's PPO agent against skrl's own, from the same seed and with the same minibatches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("skrl")
pytest.importorskip("gymnasium")

from gymnasium import spaces
from skrl import config as skrl_config
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.memories.torch import RandomMemory
from skrl.models import torch as models
from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model, MultiCategoricalMixin
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR
from skrl.utils.model_instantiators.torch import categorical_model, deterministic_model, gaussian_model, shared_model

from pydrone.integrations import skrl as ours
from pydrone.integrations import skrl_learner
from pydrone.ops import native

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

T, N = 10, 8
BOX = spaces.Box(-np.inf, np.inf, (5,), np.float32)
STATES = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)


class Network(Model):
    """An MLP of observations (or states); ``change`` is what compute does besides."""

    def __init__(self, outputs, given, reads="observations", change=lambda x: x, layer=nn.Tanh):
        Model.__init__(self, **given)
        self.reads, self.change = reads, change
        width = self.num_states if reads == "states" else self.num_observations
        self.net = nn.Sequential(nn.Linear(width, 8), layer(), nn.Linear(8, outputs))

    def compute(self, inputs, role=""):
        return self.change(self.net(inputs[self.reads])), {}


class Value(DeterministicMixin, Network):
    def __init__(self, given, **more):
        Network.__init__(self, 1, given, **more)
        DeterministicMixin.__init__(self)


class Discrete(CategoricalMixin, Network):
    def __init__(self, given, unnormalized_log_prob=True, **more):
        Network.__init__(self, self_size(given), given, **more)
        CategoricalMixin.__init__(self, unnormalized_log_prob=unnormalized_log_prob)


class MultiDiscrete(MultiCategoricalMixin, Network):
    def __init__(self, given, **more):
        Network.__init__(self, self_size(given), given)
        MultiCategoricalMixin.__init__(self, **more)


def self_size(given):
    space = given["action_space"]
    return int(space.n if isinstance(space, spaces.Discrete) else space.nvec.sum())


class Deviating:
    """A log_std, which ``log_std`` changes."""

    def compute(self, inputs, role=""):
        return super().compute(inputs, role)[0], {"log_std": self.of(self.log_std_parameter)}


class Gaussian(Deviating, GaussianMixin, Network):
    mixin = GaussianMixin

    def __init__(self, given, start=-0.5, log_std=lambda x: x, clip_mean_actions=False, reads="observations", **more):
        network = {name: more.pop(name) for name in ("change", "layer") if name in more}
        Network.__init__(self, 2, given, reads, **network)
        self.mixin.__init__(self, clip_mean_actions=clip_mean_actions, **more)
        self.of, self.log_std_parameter = log_std, nn.Parameter(torch.full((2,), start))


class Multivariate(Deviating, models.MultivariateGaussianMixin, Network):
    mixin = models.MultivariateGaussianMixin
    __init__ = Gaussian.__init__


class Shared(GaussianMixin, DeterministicMixin, Model):
    """One trunk, whose output the value takes over: ``detached``, without its gradients; ``stale``, for good."""

    def __init__(self, given, detached=False, scaled=1, width=8, stale=False):
        Model.__init__(self, **given)
        GaussianMixin.__init__(self)
        DeterministicMixin.__init__(self)
        self.value = nn.Linear(width, 1)
        self.net, self.mean = nn.Sequential(nn.Linear(5, width), nn.ELU()), nn.Linear(width, 2)
        self.log_std_parameter = nn.Parameter(torch.zeros(2))
        self.detached, self.scaled, self.stale, self.kept = detached, scaled, stale, None

    def act(self, inputs, role=""):
        if role == "policy":
            actions, outputs = GaussianMixin.act(self, inputs, role=role)
            outputs["log_prob"] = outputs["log_prob"] * self.scaled
            return actions, outputs
        return DeterministicMixin.act(self, inputs, role=role)

    def compute(self, inputs, role=""):
        if role == "policy":
            self.kept = self.net(inputs["observations"])
            return self.mean(self.kept), {"log_std": self.log_std_parameter}
        x = self.net(inputs["observations"]) if self.kept is None else self.kept
        self.kept = self.kept if self.stale else None
        return self.value(x.detach() if self.detached else x), {}


LAYERS = [{"name": "net", "input": "OBSERVATIONS", "layers": [8, 8], "activations": "elu"}]


def instantiated(given, policy=gaussian_model):
    return {
        "policy": policy(**given, network=LAYERS, output="ACTIONS"),
        "value": deterministic_model(**given, network=LAYERS, output="ONE"),
    }


def instantiated_shared(given, single=True):
    made = shared_model(
        **given,
        structure=["GaussianMixin", "DeterministicMixin"],
        roles=["policy", "value"],
        parameters=[{"network": LAYERS, "output": "ACTIONS"}, {"network": LAYERS, "output": "ONE"}],
        single_forward_pass=single,
    )
    made.init_state_dict(role="policy"), made.init_state_dict(role="value")
    return {"policy": made, "value": made}


def separate(policy, value=Value, /, **more):
    return lambda given: {"policy": policy(given, **more), "value": value(given)}


def together(**more):
    return lambda given: dict.fromkeys(("policy", "value"), Shared(given, **more))


class Recording:
    """An agent of one of the two classes on a memory with one random rollout; its losses and what it tracks."""

    def __init__(self, kind, make=None, actions=ACTIONS, states=None, prepare=lambda x: None, **options):
        torch.manual_seed(3)
        make = make or separate(Gaussian)
        given = {"observation_space": BOX, "state_space": states, "action_space": actions, "device": "cpu"}
        memory = {"shuffle": "skrl"} if kind is ours.PPO else {}
        memory = (ours.RandomMemory if memory else RandomMemory)(memory_size=T, num_envs=N, device="cpu", **memory)
        options = {"learning_epochs": 2, "mini_batches": 5, "learning_rate": 1e-2, "rollouts": T} | options
        options["experiment"] = {"write_interval": 0, "checkpoint_interval": 0}
        self.agent = agent = kind(models=make(given), memory=memory, cfg=PPO_CFG(**options), **given)
        agent.init()
        prepare(agent)
        self.losses, self.tracked = [], {}
        agent.track_data = self.tracked.__setitem__

    def update(self, monkeypatch):
        agent, backward, call = self.agent, torch.Tensor.backward, skrl_learner.FusedUpdate.__call__
        self.rollout()
        before = len(self.losses)

        def recorded(loss, *args, **kwargs):
            self.losses.append(loss.item())
            return backward(loss, *args, **kwargs)

        def called(update, *args, **kwargs):
            metrics = call(update, *args, **kwargs)
            surrogate, value, entropy = metrics[:3].tolist()
            cfg = agent.cfg
            self.losses.append(surrogate + cfg.value_loss_scale * value - cfg.entropy_loss_scale * entropy)
            return metrics

        agent.enable_models_training_mode(True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", recorded)
            patch.setattr(skrl_learner.FusedUpdate, "__call__", called)
            torch.manual_seed(4)
            agent.update(timestep=0, timesteps=0)
        self.random = torch.rand(1).item()
        return len(self.losses) - before

    def rollout(self):
        """As the trainer collects one, of a random environment."""
        agent, numbers = self.agent, torch.Generator().manual_seed(5)
        torch.manual_seed(6)
        states = agent.state_space and torch.randn(T + 1, N, 3, generator=numbers)
        observations = torch.randn(T + 1, N, 5, generator=numbers) * 2 + 1
        for t in range(T + 1):
            seen = {"observations": observations[t], "states": None if states is None else states[t]}
            if t == T:
                agent._current_next_observations, agent._current_next_states = seen.values()
                return
            with torch.no_grad():
                agent.training = True
                actions, _ = agent.act(*seen.values(), timestep=0, timesteps=0)
                columns = {"log_prob": agent._current_log_prob, "values": agent._current_values}
            columns["terminated"] = torch.rand(N, 1, generator=numbers) < 0.1
            columns["truncated"] = torch.rand(N, 1, generator=numbers) < 0.1
            columns["rewards"] = torch.randn(N, 1, generator=numbers)
            agent.memory.add_samples(**seen, actions=actions, **columns)

    def parameters(self):
        return [x.detach().clone() for x in self.agent.optimizer.param_groups[0]["params"]]


def run(kind, monkeypatch, updates=2, **case):
    found = Recording(kind, **case)
    return found, [(found.update(monkeypatch), found.parameters()) for _ in range(updates)]


def told(caplog):
    return [x.getMessage() for x in caplog.records if x.name == "pydrone.integrations.skrl"]


@pytest.fixture(autouse=True)
def _each_reason_again():
    skrl_learner._tell.cache_clear()
    yield
    ours.unpatch()


SCALED = {
    **{"observation_preprocessor": RunningStandardScaler, "observation_preprocessor_kwargs": {"size": BOX}},
    **{"value_preprocessor": RunningStandardScaler, "value_preprocessor_kwargs": {"size": 1}},
}
MULTI = spaces.MultiDiscrete([2, 3])
KL = 0.02
SERVED = {
    "defaults": {},
    "scaled": SCALED,
    "shared": {"make": together(), **SCALED, "entropy_loss_scale": 0.01},
    "instantiated": {"make": instantiated, "entropy_loss_scale": 0.01},
    "instantiated shared": {"make": instantiated_shared, **SCALED},
    "instantiated shared, two passes": {"make": lambda given: instantiated_shared(given, False), **SCALED},
    "multivariate": {"make": separate(Multivariate), "entropy_loss_scale": 0.01},
    "categorical": {"make": separate(Discrete), "actions": spaces.Discrete(3), "entropy_loss_scale": 0.02, **SCALED},
    "instantiated categorical": {
        "make": lambda given: instantiated(given, categorical_model),
        "actions": spaces.Discrete(3),
    },
    "multicategorical": {"make": separate(MultiDiscrete), "actions": MULTI, "entropy_loss_scale": 0.02},
    "states": {
        "make": lambda given: {"policy": Gaussian(given), "value": Value(given, reads="states")},
        **{"states": STATES, "state_preprocessor": RunningStandardScaler, "state_preprocessor_kwargs": {"size": 3}},
        **SCALED,
    },
    "no clipping": {"value_clip": 0.0, "grad_norm_clip": 0.0},
    "strong clipping": {"value_clip": 0.01, "grad_norm_clip": 0.01, "ratio_clip": 0.02},
    "kl_threshold": {"kl_threshold": KL, "learning_epochs": 6},
    "kl_threshold, scaled": {"kl_threshold": 0.1, "learning_epochs": 6, **SCALED},
    "KLAdaptiveLR": {
        **{"learning_rate_scheduler": KLAdaptiveLR, "learning_rate_scheduler_kwargs": {"kl_threshold": 0.002}},
        **{"kl_threshold": KL, "learning_epochs": 6},
    },
    "another scheduler": {
        "learning_rate_scheduler": torch.optim.lr_scheduler.ExponentialLR,
        "learning_rate_scheduler_kwargs": {"gamma": 0.5},
    },
    "log_std at its bound": {"make": separate(Gaussian, max_log_std=-0.49, min_log_std=-0.51)},
    "log_std beyond its bound": {"make": separate(Gaussian, max_log_std=-0.7)},
    "a fixed log_std": {
        "make": separate(Gaussian),
        "prepare": lambda x: x.policy.log_std_parameter.requires_grad_(False),
    },
    "an unclipped log_std": {"make": separate(Gaussian, start=2.5, clip_log_std=False)},
    "clip_actions": {"make": separate(Gaussian, clip_actions=True)},
}


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_as_skrl(case, monkeypatch, caplog):
    (theirs, expected), (mine, got) = (run(kind, monkeypatch, **case) for kind in (PPO, ours.PPO))
    assert not told(caplog)
    for (_, x), (_, y) in zip(expected, got, strict=True):
        assert all((a - b).norm() <= 1e-4 * a.norm() for a, b in zip(x, y, strict=True))
    breaks = "kl_threshold" in case
    assert breaks or len(theirs.losses) == len(mine.losses) >= 20
    if not breaks:  # skrl has no losses where it breaks
        for x, y in zip(theirs.losses[:10], mine.losses):
            assert abs(x - y) <= 1e-4 * (1 + abs(x))
    assert theirs.random == mine.random
    assert theirs.tracked.keys() == mine.tracked.keys() and len(mine.tracked) >= 3
    for name, x in theirs.tracked.items():
        assert mine.tracked[name] == pytest.approx(x, rel=1e-4, abs=1e-5, nan_ok=True), name
    rates = [x.agent.optimizer.param_groups[0]["lr"] for x in (theirs, mine)]
    assert rates[0] == pytest.approx(rates[1])
    states = [x.agent.checkpoint_modules for x in (theirs, mine)]
    for name in ("observation_preprocessor", "state_preprocessor", "value_preprocessor"):
        for x, y in zip(*(list(state[name].buffers()) if name in state else [] for state in states), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["kl_threshold", "kl_threshold, scaled", "KLAdaptiveLR"])
def test_some_minibatches_of_these_cases_take_no_step(name, monkeypatch):
    _, ((steps, _), _) = run(PPO, monkeypatch, **SERVED[name])
    assert 0 < steps < 30 and steps % 5


def attached(agent):
    agent.policy.net.register_forward_hook(lambda *_: None)


def distributed(patch):
    patch.setattr(type(skrl_config.torch), "is_distributed", property(lambda x: True))
    patch.setattr(Model, "broadcast_parameters", lambda *_, **__: None)
    patch.setattr(Model, "reduce_parameters", lambda *_: None)


class Own(Gaussian):
    def get_entropy(self, *, role=""):
        return 2 * super().get_entropy(role=role)


class OwnAct(Gaussian):
    def act(self, inputs, *, role=""):
        return super().act(inputs, role=role)


class Buffered(Gaussian):
    def __init__(self, given):
        super().__init__(given)
        self.register_buffer("calls", torch.zeros(()))


DISCRETE = spaces.Discrete(3)
BESIDE = "before, between or after their layers"
REFUSED = {
    "tanh of the mean": ({"make": separate(Gaussian, change=lambda x: 2 * torch.tanh(x))}, BESIDE),
    "mean in place": ({"make": separate(Gaussian, change=lambda x: x.mul_(2))}, "in place"),
    "a gradient cut off": ({"make": together(detached=True)}, BESIDE),
    "the policy's last features": ({"make": together(stale=True)}, BESIDE),
    "a wide trunk of both": ({"make": together(width=8000)}, "share a trunk of more than 40000 parameters"),
    "an act that changes": ({"make": together(scaled=0.5)}, "something else than their layers and their distribution"),
    "an act of its own": ({"make": separate(OwnAct)}, "act or a get_entropy of its own"),
    "an entropy of its own": ({"make": separate(Own), "entropy_loss_scale": 0.1}, "act or a get_entropy of its own"),
    "buffers": ({"make": separate(Buffered)}, "Buffered has buffers"),
    "a mean of log-probabilities": (
        {"make": separate(Gaussian, reduction="mean")},
        "something else than their layers and their distribution",
    ),
    "a computed log_std": ({"make": separate(Gaussian, log_std=lambda x: 2 * x)}, "expected a parameter log_std"),
    "clip_mean_actions": ({"make": separate(Gaussian, clip_mean_actions=True)}, "clip_mean_actions is on"),
    "probabilities": (
        {
            "make": separate(Discrete, unnormalized_log_prob=False, change=lambda x: torch.softmax(x, 1)),
            "actions": DISCRETE,
        },
        "the policy's outputs are probabilities",
    ),
    "a mean over actions": (
        {"make": separate(MultiDiscrete, reduction="mean"), "actions": MULTI},
        "something else than their layers and their distribution",
    ),
    "dropout": ({"make": separate(Gaussian, layer=nn.Dropout)}, "Gaussian has a layer Dropout"),
    "two activations": (
        {"make": lambda given: {"policy": Gaussian(given, layer=nn.ReLU), "value": Value(given)}},
        "expected the actor's activation",
    ),
    "hooks": ({"prepare": attached}, "Gaussian has hooks"),
    "another optimiser": (
        {"prepare": lambda x: setattr(x, "optimizer", torch.optim.AdamW(x.optimizer.param_groups[0]["params"]))},
        "optimizer: it takes the steps of torch.optim.Adam",
    ),
    "fewer parameters": (
        {"prepare": lambda x: setattr(x, "optimizer", torch.optim.Adam(x.policy.parameters()))},
        "optimizer: expected the models' parameters",
    ),
    "mixed precision": ({"mixed_precision": True}, "mixed_precision is on"),
}


@pytest.mark.parametrize(("case", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_computed_by_skrl(case, reason, monkeypatch, caplog):
    (theirs, expected), (mine, got) = (run(kind, monkeypatch, **case) for kind in (PPO, ours.PPO))
    (line,) = told(caplog)
    assert line.startswith("skrl's own PPO update runs, not the fused one: ") and reason in line
    for (_, x), (_, y) in zip(expected, got, strict=True):
        assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(x, y, strict=True))
    assert len(mine.losses) == len(theirs.losses) and theirs.random == mine.random
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)


def test_several_processes(monkeypatch, caplog):
    distributed(monkeypatch)
    run(ours.PPO, monkeypatch, updates=1)
    assert "several processes train" in told(caplog)[0]


def test_a_change_of_the_model_is_seen_at_the_next_update(monkeypatch, caplog):
    found, _ = run(ours.PPO, monkeypatch)
    assert not told(caplog)
    found.agent.policy.change = torch.tanh
    found.update(monkeypatch)
    assert len(told(caplog)) == 1


def test_patch_replaces_the_update_unless_told_not_to(monkeypatch, caplog):
    original = PPO.update
    ours.patch(learner="skrl")
    assert PPO.update is original
    ours.unpatch()
    ours.patch()
    assert PPO.update is skrl_learner.update
    found, _ = run(PPO, monkeypatch, updates=1)
    assert len(found.losses) == 10 and not told(caplog)
    ours.unpatch()
    assert PPO.update is original
    with pytest.raises(ValueError, match="learner: expected 'fused' or 'skrl', got 'both'"):
        ours.patch(learner="both")


@pytest.mark.parametrize("kinds", [(PPO, ours.PPO), (ours.PPO, PPO)])
def test_checkpoints_of_either_go_on_in_the_other(kinds, tmp_path, monkeypatch):
    first, _ = run(kinds[0], monkeypatch, **SCALED)
    first.agent.save(str(tmp_path / "agent.pt"))
    second = Recording(kinds[1], **SCALED)
    second.agent.load(str(tmp_path / "agent.pt"))
    for found in (first, second):
        found.losses.clear()
        found.update(monkeypatch)
    for x, y in zip(first.losses, second.losses, strict=True):
        assert abs(x - y) <= 1e-4 * (1 + abs(x))
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm()
