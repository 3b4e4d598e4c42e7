# ruff: noqa: E402 (imports that need the peer follow the check that it is installed)
"""pydrone's advantages for TorchRL: by hand, against its own functions and module, and in its real trainer."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("torchrl")
gym = pytest.importorskip("gymnasium")

from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase, GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE as TheirGAE
from torchrl.objectives.value import functional as theirs
from torchrl.trainers.algorithms import PPOTrainer

from pydrone.envs.adapters import GymnasiumEnv
from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import torchrl as ours

GAMMA, LAMBDA = 0.97, 0.9
NAMES = ("generalized_advantage_estimate", "vec_generalized_advantage_estimate")


def close(got, expected, tolerance=1e-5):
    """Equal to 1e-5 of the largest value."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.abs().max()), check_dtype=False)


def test_by_hand():
    # gamma = lambda = 1/2, T = 4. Step 1 is a time-out, so its next value 8 counts and the trace is cut; step 2
    # terminates, so its next value is not used; step 0's next value differs from the value of step 1.
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    following = torch.tensor([6.0, 8.0, 100.0, 2.0])
    done, terminated = torch.tensor([0, 1, 1, 0]).bool(), torch.tensor([0, 0, 1, 0]).bool()
    # A3 = 1 + 1 - 4 = -2;  A2 = 1 - 3 = -2;  A1 = 1 + 4 - 2 = 3;  A0 = 1 + 3 - 1 + 3/4 = 3.75
    for name in NAMES:
        got = getattr(ours, name)(0.5, 0.5, value, following, torch.ones(4), done, terminated, time_dim=-1)
        assert got[0].tolist() == [3.75, 3.0, -2.0, -2.0]
        assert got[1].tolist() == [4.75, 5.0, 1.0, 2.0]
    # without terminated, a time-out counts as a termination: A1 = 1 - 2 = -1, A0 = 3 - 1/4
    got = ours.generalized_advantage_estimate(0.5, 0.5, value, following, torch.ones(4), done, time_dim=0)
    assert got[0].tolist() == [2.75, -1.0, -2.0, -2.0]


def signals(shape, dtype=torch.float32):
    """A fifth of the steps end an episode, half of them by termination; next values are independent of the values."""
    value, following, reward = torch.randn(3, *shape, dtype=dtype).unbind()
    done = torch.rand(shape) < 0.2
    return value, following, reward, done, done & (torch.rand(shape) < 0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "shape, time_dim",
    [
        ((17, 1), -2),
        ((17, 3), -2),
        ((6, 17, 1), -2),
        ((6, 17, 4), -2),
        ((6, 17, 4), 1),
        ((2, 3, 17, 1), -2),
        ((2, 3, 17, 2), 2),
        ((17, 6, 1), 0),
        ((17, 6, 1), -3),
        ((6, 17), -1),
        ((6, 17), 1),
        ((2, 17, 3, 2), 1),
        ((17,), -1),
        ((6, 1, 1), -2),
        ((1, 1), -2),
    ],
)
def test_against_its_own_functions(name, shape, time_dim):
    given = signals(shape)
    for got, expected in zip(
        getattr(ours, name)(GAMMA, LAMBDA, *given, time_dim=time_dim),
        getattr(theirs, name)(GAMMA, LAMBDA, *given, time_dim=time_dim),
    ):
        assert got.dtype == expected.dtype
        close(got, expected)


def test_scalar_tensors_float64_and_strides():
    given = signals((5, 40, 1), torch.float64)
    # Theirs would convert a plain number to float32.
    gamma, lmbda = torch.tensor(GAMMA, dtype=torch.float64), torch.tensor([LAMBDA], dtype=torch.float64)
    expected = theirs.generalized_advantage_estimate(gamma, lmbda, *given)
    strided = [torch.stack((x, x), 2)[:, :, 0].transpose(0, 1) for x in given]
    got = ours.generalized_advantage_estimate(gamma, lmbda, *strided, time_dim=0)
    for x, y in zip(got, expected):
        assert x.dtype == torch.float64
        close(x.transpose(0, 1), y, 1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_flags_and_rewards_of_other_dtypes(dtype):
    value, following, reward, done, terminated = signals((3, 20, 1))
    reward = (reward * 4).long()
    expected = theirs.generalized_advantage_estimate(GAMMA, LAMBDA, value, following, reward, done, terminated)
    flags = done.to(dtype) * 2, terminated.to(dtype) * 2
    for got, x in zip(ours.generalized_advantage_estimate(GAMMA, LAMBDA, value, following, reward, *flags), expected):
        close(got, x)


def test_what_follows_a_termination_does_not_count():
    """Tests NaN as the next value of a termination; TorchRL would multiply it by zero and get NaN."""
    value, following, reward, done, terminated = signals((3, 20, 1))
    expected = ours.generalized_advantage_estimate(GAMMA, LAMBDA, value, following, reward, done, terminated)
    following = following.masked_fill(terminated, float("nan"))
    got = ours.generalized_advantage_estimate(GAMMA, LAMBDA, value, following, reward, done, terminated)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_factor_for_each_step_is_theirs():
    given = signals((3, 20, 1))
    gamma = torch.rand(3, 20, 1)
    for got, expected in zip(
        ours.vec_generalized_advantage_estimate(gamma, LAMBDA, *given),
        theirs.vec_generalized_advantage_estimate(gamma, LAMBDA, *given),
    ):
        close(got, expected)


def test_errors_name_the_argument():
    value, following, reward, done, terminated = signals((3, 20, 1))
    estimate = ours.generalized_advantage_estimate
    with pytest.raises(RuntimeError, match=r"done: expected the shape of reward, \[3, 20, 1\], got \[3, 20\]"):
        estimate(GAMMA, LAMBDA, value, following, reward, done[..., 0], terminated)
    with pytest.raises(RuntimeError, match="time_dim: expected a dimension of a tensor of shape"):
        estimate(GAMMA, LAMBDA, value, following, reward, done, terminated, time_dim=3)
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\], got 1.5"):
        estimate(1.5, LAMBDA, value, following, reward, done, terminated)
    with pytest.raises(ValueError, match=r"^state_value: expected it in the tensordict"):
        ours.GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=None)(rollout(envs=2, steps=3))


def rollout(envs=4, steps=12, value=False):
    """[envs, steps], as from a collector: without an end, the next observation is that of the following step."""
    obs = torch.randn(envs, steps + 1, 3)
    _, _, reward, done, terminated = signals((envs, steps, 1))
    following = torch.where(done, torch.randn(envs, steps, 3), obs[:, 1:])
    after = {
        "obs": following,
        "reward": reward,
        "done": done,
        "terminated": terminated,
        "truncated": done & ~terminated,
    }
    data = TensorDict({"obs": obs[:, :-1], "next": after, "task": torch.randint(3, (envs, steps))}, [envs, steps])
    if value:
        data["state_value"], data["next", "state_value"] = torch.randn(2, envs, steps, 1).unbind()
    return data


def critic():
    torch.manual_seed(1)
    return TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"average_gae": True},
        {"average_gae": True, "group_key": "task"},
        {"shifted": True, "shifted_budget": 3, "average_gae": True},
        {"auto_reset_env": True},
        {"vectorized": False, "deactivate_vmap": True},
        {"differentiable": True, "num_chunks": 2},
        {"skip_existing": True},
        {"time_dim": 0},
    ],
    ids=str,
)
def test_module_against_its_own(arguments):
    data = rollout()
    runs = [cls(gamma=GAMMA, lmbda=LAMBDA, value_network=critic(), **arguments) for cls in (TheirGAE, ours.GAE)]
    expected, got = (module(data.clone()) for module in runs)
    assert sorted(map(str, expected.keys(True))) == sorted(map(str, got.keys(True)))
    for key in ("advantage", "value_target", "state_value", ("next", "state_value")):
        assert not got[key].requires_grad
        close(got[key], expected[key].detach())


@pytest.mark.parametrize("arguments", [{}, {"group_key": "task"}, {"shifted": True, "shifted_budget": 1}], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_normalised_advantage_of_one_sample_is_0(arguments):
    """In every integration; TorchRL's own is NaN, but for groups and masks."""
    module = ours.GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=critic(), average_gae=True, **arguments)
    assert module(rollout(1, 1))["advantage"].flatten().tolist() == [0]
    theirs = TheirGAE(gamma=GAMMA, lmbda=LAMBDA, value_network=critic(), average_gae=True)(rollout(1, 1))["advantage"]
    assert theirs.isnan().all()


def test_module_with_values_of_other_keys_and_n_step_targets():
    data = rollout(value=True).rename_key_("state_value", "v").rename_key_(("next", "reward"), ("next", "r"))
    data["next"].rename_key_("state_value", "v")
    data["steps_to_next_obs"] = torch.randint(1, 4, (4, 12, 1))
    for steps in (True, False):
        if not steps:
            del data["steps_to_next_obs"]
        found = []
        for cls in (TheirGAE, ours.GAE):
            module = cls(gamma=GAMMA, lmbda=LAMBDA, value_network=None)
            module.set_keys(value="v", reward="r", advantage="adv")
            found.append(module(data.clone()))
        close(found[1]["adv"], found[0]["adv"])
        close(found[1]["value_target"], found[0]["value_target"])


def test_module_called_with_tensors():
    data = rollout()
    after = {f"next_{key}": data["next", key] for key in ("obs", "reward", "done", "terminated")}
    runs = [
        cls(gamma=GAMMA, lmbda=LAMBDA, value_network=critic())(obs=data["obs"], **after) for cls in (TheirGAE, ours.GAE)
    ]
    for got, expected in zip(runs[1], runs[0]):
        close(got, expected)


def gradients(estimate, needed, dtype=torch.bool):
    """What a weighted sum of ``estimate``'s results gives each argument in ``needed``."""
    torch.manual_seed(3)
    value, following, reward, done, terminated = signals((3, 20, 1))
    arguments = {"gamma": torch.tensor(GAMMA), "lmbda": torch.tensor([LAMBDA])}
    arguments |= {"state_value": value, "next_state_value": following, "reward": reward}
    given = [arguments[name].requires_grad_() for name in needed]
    results = estimate(**arguments, done=done.to(dtype), terminated=terminated.to(dtype))
    weighted = sum((x * torch.linspace(0, 1, 60).view_as(x)).sum() for x in results)
    return *results, *torch.autograd.grad(weighted, given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "needed",
    [["gamma"], ["lmbda"], ["state_value"], ["next_state_value"], ["reward"], ["gamma", "lmbda", "state_value"]],
    ids=str,
)
def test_no_gradient_is_dropped(name, needed):
    expected = gradients(theirs.generalized_advantage_estimate, needed)  # the other loses a part of gamma's
    for dtype in (torch.bool, torch.uint8):
        got = gradients(getattr(ours, name), needed, dtype)
        assert len(got) == 2 + len(needed)
        for x, y in zip(got, expected):
            close(x, y)
    with torch.no_grad():
        value, following, reward, done, terminated = (
            x.requires_grad_() if x.is_floating_point() else x for x in signals((3, 20, 1))
        )
        gamma = torch.tensor(GAMMA, requires_grad=True)
        for x in getattr(ours, name)(gamma, LAMBDA, value, following, reward, done, terminated):
            assert not x.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_no_tangent_is_dropped(name):
    value, following, reward, done, terminated = signals((3, 20, 1))
    primals = torch.tensor(GAMMA), torch.tensor(LAMBDA), value, following, reward
    for i, x in enumerate(primals):
        found = []
        for estimate in (theirs.generalized_advantage_estimate, getattr(ours, name)):

            def of_one(x, estimate=estimate, i=i):
                return estimate(*primals[:i], x, *primals[i + 1 :], done, terminated)

            found.append(torch.func.jvp(of_one, (x,), (torch.ones_like(x),)))
        for got, expected in zip(found[1], found[0]):
            close(got[0], expected[0])
            close(got[1], expected[1])


def test_gradients_through_the_module():
    for average in (False, True):
        found = []
        for cls in (TheirGAE, ours.GAE):
            torch.manual_seed(4)
            data = rollout(value=True)
            value = data["state_value"].requires_grad_()
            module = cls(
                gamma=GAMMA, lmbda=LAMBDA, value_network=None, differentiable=True, average_gae=average,
                vectorized=False,
            )  # fmt: skip
            out = module(data)
            assert out["advantage"].requires_grad
            found.append(torch.autograd.grad((out["advantage"] ** 3).sum(), value)[0])
            module.differentiable = False
            assert not module(data)["advantage"].requires_grad
        close(found[1], found[0], 1e-4)


def test_compiles_as_one_graph():
    """Numbers, and tensors of one element, which Python must not read while it traces."""
    estimate, given = ours.generalized_advantage_estimate, signals((20, 3))
    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    for gamma, lmbda in (
        (GAMMA, LAMBDA),
        (0.5, LAMBDA),  # a number that changes is traced as a symbol
        (torch.tensor(GAMMA), torch.tensor([LAMBDA])),
        (GAMMA, torch.tensor(LAMBDA, dtype=torch.float64)),
    ):
        for got, expected in zip(
            compiled(gamma, lmbda, *given, time_dim=0), estimate(gamma, lmbda, *given, time_dim=0)
        ):
            close(got, expected)


def test_module_compiles_as_one_graph():
    data = rollout(value=True)
    module = ours.GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=None, average_gae=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, expected = compiled(data.clone()), module(data.clone())
    for key in ("advantage", "value_target"):
        close(got[key], expected[key])


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("values", DTYPES, ids=str)
@pytest.mark.parametrize("rewards", [*DTYPES, torch.int32], ids=str)
def test_every_dtype_comes_out_as_it_went_in(values, rewards):
    value, following, reward, done, terminated = signals((3, 20, 1))
    given = [value.to(values), following.to(values), (reward * 4).to(rewards), done, terminated]
    expected = theirs.vec_generalized_advantage_estimate(GAMMA, LAMBDA, *(x.double() for x in given[:3]), *given[3:])
    dtypes = [x.dtype for x in theirs.generalized_advantage_estimate(GAMMA, LAMBDA, *given)]
    if rewards in (values, torch.int32):
        assert set(dtypes) == {values}
    for got, x in zip(ours.generalized_advantage_estimate(GAMMA, LAMBDA, *given), expected):
        assert got.dtype == torch.promote_types(values, rewards)
        close(got, x, max(1e-5, 2 * torch.finfo(got.dtype).eps))
    if rewards == values:
        data = TensorDict({"state_value": given[0]}, [3, 20])
        data["next"] = {"state_value": given[1], "reward": given[2], "done": done, "terminated": terminated}
        for average in (False, True):
            module = ours.GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=None, average_gae=average)
            out = module(data.clone())
            assert out["advantage"].dtype == out["value_target"].dtype == values


def test_modules_are_copied_saved_and_loaded():
    data, made = rollout(value=True), ours.GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=None)
    loaded = ours.GAE(gamma=0.1, lmbda=0.2, value_network=None)
    loaded.load_state_dict(made.state_dict())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        assert torch.equal(other(data.clone())["advantage"], made(data.clone())["advantage"])


def test_versions(monkeypatch):
    supported = r"pydrone supports torchrl from 0\.14 to before 0\.15$"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.0")
    with pytest.raises(ImportError, match=r"^torchrl 0\.6\.0 is installed; " + supported):
        importlib.reload(ours)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="^torchrl is not installed; " + supported):
        importlib.reload(ours)


def test_nothing_is_imported_before():
    code = "import sys, pydrone.integrations.peer; assert not {'torchrl', 'tensordict'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


class Wrapped(EnvBase):
    """Any pydrone environment for TorchRL, which asks for resets: SAME_STEP has already done them, NEXT_STEP does them
    in the next step, which TorchRL takes as an ordinary one."""

    def __init__(self, env, action_spec) -> None:
        super().__init__(batch_size=[env.num_envs])
        self.env = env
        (width,) = env.obs if isinstance(env.obs, tuple) else (env.obs,)
        self.observation_spec = Composite(observation=Unbounded((env.num_envs, width)), shape=self.batch_size)
        self.action_spec, self.reward_spec = action_spec, Unbounded((env.num_envs, 1))
        flags = {
            key: Categorical(2, (env.num_envs, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")
        }
        self.done_spec = Composite(flags, shape=self.batch_size)

    def _reset(self, tensordict, **kwargs):
        if tensordict is None or tensordict.get("_reset", None) is None:
            self.obs = self.env.reset().clone()
        return TensorDict({"observation": self.obs.clone()}, self.batch_size)

    def _step(self, tensordict):
        result = self.env.step(tensordict["action"])
        self.obs = result.obs.clone()
        final = self.obs if result.final_obs is None else result.final_obs
        ended = {"done": result.dones, "terminated": result.dones & ~result.truncated, "truncated": result.truncated}
        out = {key: x.clone().unsqueeze(1) for key, x in ended.items()}
        out["observation"] = torch.where(result.truncated[:, None], final, self.obs)
        return TensorDict({**out, "reward": result.rewards.clone().unsqueeze(1)}, self.batch_size)

    def _set_seed(self, seed) -> None:
        pass


def make(name):
    if name == "quadrotor":
        env = Quadrotor(4, seed=1, max_episode_length=7, max_tilt=15.0)
        env.randomize_episode_lengths()
        return Wrapped(env, Bounded(-1, 1, (4, 4)))
    mode = gym.vector.AutoresetMode("NextStep" if name == "NextStep" else "SameStep")
    venv = gym.make_vec(
        "CartPole-v1", 4, vectorization_mode="sync", max_episode_steps=16, vector_kwargs={"autoreset_mode": mode}
    )
    if name == "GymWrapper":  # TorchRL's own wrapper does not support NEXT_STEP
        env = GymWrapper(venv, categorical_action_encoding=True)
        env.set_seed(1)
        return env
    return Wrapped(GymnasiumEnv(venv, seed=1), Categorical(2, (4,)))


def networks(env):
    torch.manual_seed(2)
    width, discrete = env.observation_spec["observation"].shape[-1], isinstance(env.action_spec, Categorical)
    layers = [torch.nn.Linear(width, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2 if discrete else 8)]
    keys = ["logits"] if discrete else ["loc", "scale"]
    head = torch.nn.Sequential(*layers, *([] if discrete else [NormalParamExtractor()]))
    distribution = torch.distributions.Categorical if discrete else torch.distributions.Normal
    actor = ProbabilisticActor(
        TensorDictModule(head, in_keys=["observation"], out_keys=keys),
        in_keys=keys,
        distribution_class=(
            distribution
            if discrete
            else lambda loc, scale: torch.distributions.Independent(distribution(loc, scale), 1)
        ),
        return_log_prob=True,
    )
    assert isinstance(actor, ProbabilisticTensorDictSequential)
    value = torch.nn.Sequential(torch.nn.Linear(width, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return actor, ValueOperator(value, in_keys=["observation"])


def train(cls, name, inside):
    """Three batches of 128 steps in TorchRL's PPOTrainer. ``inside``: the loss computes the advantages."""
    env = make(name)
    actor, critic = networks(env)
    rollouts, losses, ends = [], [], torch.zeros(2)

    class Recording(cls):
        def forward(self, tensordict, **kwargs):
            out = super().forward(tensordict, **kwargs)
            rollouts.append((tensordict["advantage"].clone(), tensordict["value_target"].clone()))
            terminated, done = tensordict["next", "terminated"], tensordict["next", "done"]
            ends.add_(torch.stack((terminated.sum(), (done & ~terminated).sum())))
            return out

    gae = Recording(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=not inside)
    loss = ClipPPOLoss(actor, critic)
    if inside:
        loss.make_value_estimator(gae)
    trainer = PPOTrainer(
        collector=Collector(env, actor, frames_per_batch=128, total_frames=384),
        total_frames=384,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=3e-4),
        progress_bar=False,
        num_epochs=4,
        replay_buffer=None if inside else replay_buffer(),
        add_gae=not inside,
        gae=None if inside else gae,
        enable_logging=False,
        seed=3,
    )
    trainer.register_op(
        "process_loss", lambda batch, out: losses.append(sum(v.item() for k, v in out.items() if "loss" in k))
    )
    trainer.train()
    return rollouts, losses, ends


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inside", [False, True], ids=["module", "in the loss"])
@pytest.mark.parametrize("name", ["SameStep", "NextStep", "GymWrapper", "quadrotor"])
def test_ppo_with_and_without(name, inside):
    expected, got = (train(cls, name, inside) for cls in (TheirGAE, ours.GAE))
    assert min(expected[2]) > 2, expected[2]
    assert len(expected[0]) == len(got[0]) >= 2
    for x, y in zip(expected[0], got[0]):
        for a, b in zip(x, y):
            close(b, a)
    assert len(expected[1]) == len(got[1]) >= 10
    for a, b in zip(expected[1][:10], got[1]):
        assert abs(a - b) <= 1e-4 * (1 + abs(a))


def replay_buffer():
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    return ReplayBuffer(
        storage=LazyTensorStorage(128), sampler=SamplerWithoutReplacement(), batch_size=64, delayed_init=False
    )
