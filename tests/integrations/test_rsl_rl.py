"""rsl_rl's real runner with and without pydrone, and the storage against numbers derived by hand."""

from __future__ import annotations

import contextlib
import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("rsl_rl")
pytest.importorskip("gymnasium")

import gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rsl_rl.algorithms import ppo
from rsl_rl.env import VecEnv
from rsl_rl.modules.distribution import GaussianDistribution
from rsl_rl.runners import DistillationRunner, OnPolicyRunner
from rsl_rl.storage import RolloutStorage as PeerStorage
from tensordict import TensorDict

from pydrone.envs.adapters import GymnasiumEnv
from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import rsl_rl as integration
from pydrone.integrations.rsl_rl import PPO, RolloutStorage, patch, unpatch
from pydrone.integrations.rsl_rl_env import VecEnvWrapper
from pydrone.ops import native

CLASS_NAME = "pydrone.integrations.rsl_rl:PPO"
NUM_ENVS, NUM_STEPS, ITERATIONS = 10, 12, 10


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch()


class Drones(VecEnvWrapper):
    """Quadrotors in a box with some targets outside: those crash, others time out. Rewards are of order 1."""

    def __init__(self, two_groups: bool = False) -> None:
        self.two_groups, self.ends = two_groups, {"crashes": 0, "time_outs": 0}
        super().__init__(Quadrotor(NUM_ENVS, seed=1, max_episode_length=17, max_xy=0.9, max_z=0.3))

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        count(self.ends, dones, extras["time_outs"])
        return obs, rewards * 100, dones, extras

    def _keep(self, obs) -> None:
        # the critic's own observations are another group
        super()._keep({"policy": obs, "height": obs[:, 2:3] - 1} if self.two_groups else obs)


class Point(gymnasium.Env):
    """A point pushed along a line; terminates beyond 1."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.v = self.np_random.uniform(-0.5, 0.5), 0.0
        return self._obs(), {}

    def step(self, action):
        self.v += 0.3 * float(action[0])
        self.x += self.v
        return self._obs(), 1.0 - abs(self.x), abs(self.x) > 1, False, {}

    def _obs(self):
        return np.array([self.x, self.v], np.float32)


class Points(VecEnv):
    """A Gymnasium vector environment as a user would wrap it for rsl_rl, which takes reset steps as ordinary steps."""

    def __init__(self, mode: AutoresetMode) -> None:
        make = [lambda: gymnasium.wrappers.TimeLimit(Point(), 7)] * NUM_ENVS
        self.env = GymnasiumEnv(SyncVectorEnv(make, autoreset_mode=mode), seed=5)
        self.num_envs, self.num_actions, self.device, self.cfg = NUM_ENVS, 1, "cpu", {}
        self.max_episode_length, self.episode_length_buf = 7, torch.zeros(NUM_ENVS, dtype=torch.long)
        self.ends = {"crashes": 0, "time_outs": 0}
        self.obs = self.env.reset()

    def get_observations(self):
        return TensorDict({"policy": self.obs}, batch_size=[NUM_ENVS])

    def step(self, actions):
        result = self.env.step(actions)
        self.obs = result.obs
        count(self.ends, result.dones, result.truncated)
        return self.get_observations(), result.rewards, result.dones, {"time_outs": result.truncated}


def count(ends: dict[str, int], dones, time_outs) -> None:
    ends["time_outs"] += int(time_outs.sum())
    ends["crashes"] += int((dones & ~time_outs).sum())


def mirrored(env, obs, actions):
    """The symmetry function: every sample and its mirror image."""
    obs = None if obs is None else torch.cat([obs, obs.apply(torch.neg)])
    return obs, None if actions is None else torch.cat([actions, -actions])


RND = {
    "weight": 0.5,
    "num_outputs": 4,
    "predictor_hidden_dims": [16],
    "target_hidden_dims": [16],
    "state_normalization": True,
    "reward_normalization": True,
}
SYMMETRY = {"use_data_augmentation": True, "use_mirror_loss": True, "mirror_loss_coeff": 0.1}


def config(class_name="PPO", rnn=None, critic=("policy",), **algorithm) -> dict:
    model = {"class_name": "RNNModel" if rnn else "MLPModel", "hidden_dims": [32], "obs_normalization": True}
    model |= {"rnn_type": rnn, "rnn_hidden_dim": 8} if rnn else {}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"}
    defaults = {"num_learning_epochs": 2, "num_mini_batches": 3, "rnd_cfg": None, "symmetry_cfg": None}
    return {
        "num_steps_per_env": NUM_STEPS,
        "save_interval": 100,
        "obs_groups": {"actor": ["policy"], "critic": list(critic), "rnd_state": ["policy"]},
        "actor": {**model, "distribution_cfg": gaussian},
        "critic": model,
        "algorithm": {"class_name": class_name, **defaults, **copy.deepcopy(algorithm)},  # rsl_rl may write into it
    }


def construct(env, cfg, runner=OnPolicyRunner):
    torch.manual_seed(3)
    with contextlib.redirect_stdout(io.StringIO()):
        return runner(env, cfg, log_dir=None)


def learn(runner, iterations=ITERATIONS) -> list[dict]:
    """For each iteration: the rollout, its returns and advantages, and the losses."""
    seen, algorithm = [], runner.alg
    compute_returns, update = algorithm.compute_returns, algorithm.update

    def recorded(obs) -> None:
        compute_returns(obs)
        names = ("rewards", "dones", "values", "actions", "actions_log_prob", "returns", "advantages")
        seen.append({name: getattr(algorithm.storage, name).clone() for name in names})
        seen[-1]["peer"] = peer_returns(algorithm, obs)

    def updated() -> dict:
        seen[-1]["losses"] = update()
        return seen[-1]["losses"]

    algorithm.compute_returns, algorithm.update = recorded, updated
    with contextlib.redirect_stdout(io.StringIO()):
        runner.learn(iterations, init_at_random_ep_len=True)
    return seen


def peer_returns(algorithm, obs) -> dict:
    """The results of rsl_rl's own loop over the same rollout."""
    names = ("rewards", "dones", "values", "num_transitions_per_env")
    storage = SimpleNamespace(**{name: getattr(algorithm.storage, name) for name in names})
    storage.returns = torch.zeros_like(storage.rewards)
    names = ("critic", "gamma", "lam", "normalize_advantage_per_mini_batch")
    unchanged = {name: getattr(algorithm, name) for name in names}
    integration._peer_compute_returns(SimpleNamespace(storage=storage, **unchanged), obs)
    return {"returns": storage.returns, "advantages": storage.advantages}


def assert_close(ours, theirs) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def fused(runner) -> bool:
    """Whether it acted, and so learnt, by the fused operations."""
    return getattr(runner.alg, "_fused_act", None) is not None


def assert_same_training(ours: list[dict], theirs: list[dict], exact: bool = True) -> None:
    """The first rollout agrees bit for bit, or to 1e-5 where it was acted by another operation; results computed from
    each to 1e-5, the losses of every update to 1e-4."""
    assert len(ours) == len(theirs)
    for name in ("rewards", "dones", "values", "actions", "actions_log_prob"):
        if exact or name == "dones":
            assert torch.equal(ours[0][name], theirs[0][name]), name
        else:
            assert_close(ours[0][name], theirs[0][name])
    for name in ("returns", "advantages"):
        assert_close(ours[0][name], theirs[0][name])
        for rollout in ours:
            assert_close(rollout[name], rollout["peer"][name])
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine["losses"].keys() == other["losses"].keys()
        for name, loss in other["losses"].items():
            assert abs(mine["losses"][name] - loss) <= 1e-4 * (1 + abs(loss)), f"{name} of update {i}"


CASES = {
    "mlp": (Drones, {}),
    "normalised per minibatch": (Drones, {"normalize_advantage_per_mini_batch": True}),
    "gru": (Drones, {"rnn": "gru"}),
    "lstm, normalised per minibatch": (Drones, {"rnn": "lstm", "normalize_advantage_per_mini_batch": True}),
    "gru and rnd": (Drones, {"rnn": "gru", "rnd_cfg": RND}),
    "rnd": (Drones, {"rnd_cfg": RND}),
    "symmetry": (Drones, {"symmetry_cfg": {"data_augmentation_func": mirrored, **SYMMETRY}}),
    "two groups": (lambda: Drones(two_groups=True), {"critic": ("policy", "height")}),
    "gymnasium, same step": (lambda: Points(AutoresetMode.SAME_STEP), {}),
    "gymnasium, next step": (lambda: Points(AutoresetMode.NEXT_STEP), {}),
}


def forbid_rsl_rls(monkeypatch) -> None:
    """Makes a fallback to rsl_rl's storage an error."""
    for name in ("add_transition", "mini_batch_generator", "recurrent_mini_batch_generator"):
        monkeypatch.setattr(PeerStorage, name, None)


@pytest.mark.parametrize("learner", ["rsl_rl", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_the_runner_learns_the_same_with_and_without(case, learner, monkeypatch):
    make, options = CASES[case]
    env = make()
    theirs = learn(construct(env, config(**options)))
    assert min(env.ends.values()) > 0, env.ends  # else time-outs or crashes are not tested
    runner = construct(make(), config(CLASS_NAME, shuffle="rsl_rl", learner=learner, **options))
    forbid_rsl_rls(monkeypatch)
    assert type(runner.alg) is PPO and type(runner.alg.storage) is RolloutStorage
    ours = learn(runner)
    served = native.CPU_MISSING is None and not {"rnn", "rnd_cfg", "symmetry_cfg"} & options.keys()
    assert fused(runner) == (learner == "fused" and served)
    assert_same_training(ours, theirs, exact=not fused(runner))


@pytest.mark.parametrize("case", CASES)
def test_the_default_shuffle_learns_the_same_from_a_whole_rollout(case):
    # as one minibatch, in any order
    make, options = CASES[case]
    options = {**options, "num_mini_batches": 1, "num_learning_epochs": 3}
    theirs = learn(construct(make(), config(**options)), 1)
    runner = construct(make(), config(CLASS_NAME, **options))
    ours = learn(runner, 1)
    assert_same_training(ours, theirs, exact=not fused(runner))


@pytest.mark.parametrize("rnn", [None, "gru"])
def test_an_unedited_script_learns_the_same_when_patched(rnn, monkeypatch):
    theirs = learn(construct(Drones(), config(rnn=rnn)))
    patch(shuffle="rsl_rl")
    runner = construct(Drones(), config(rnn=rnn))
    assert type(runner.alg) is ppo.PPO and isinstance(runner.alg.storage, RolloutStorage)
    forbid_rsl_rls(monkeypatch)
    ours = learn(runner)
    assert fused(runner) == (rnn is None and native.CPU_MISSING is None)
    assert_same_training(ours, theirs, exact=not fused(runner))


class Discounted(ppo.PPO):
    """An algorithm with its own returns, without bootstrap or trace, written as rsl_rl's loop would."""

    def compute_returns(self, obs) -> None:
        storage, following = self.storage, 0.0
        for step in reversed(range(storage.num_transitions_per_env)):
            following = storage.rewards[step] + self.gamma * following * (1.0 - storage.dones[step].float())
            storage.returns[step] = following
        storage.advantages = storage.returns - storage.values


@pytest.mark.parametrize("rnn", [None, "lstm"])
def test_an_algorithm_with_returns_of_its_own_keeps_them_when_patched(rnn):
    theirs = learn(construct(Drones(), config(Discounted, rnn=rnn)), 3)
    patch()
    runner = construct(Drones(), config(Discounted, rnn=rnn))
    runner.alg.storage.shuffle = "rsl_rl"  # shuffles whole environments if there are trajectories
    for mine, other in zip(learn(runner, 3), theirs, strict=True):
        assert_close(mine["returns"], other["returns"])
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-5, abs=1e-6)


def test_distillation_stays_with_rsl_rl_when_patched():
    def losses() -> list[dict]:
        cfg = config("Distillation", gradient_length=NUM_STEPS)
        cfg["student"], cfg["teacher"] = cfg.pop("actor"), cfg.pop("critic")
        cfg["obs_groups"] = {"student": ["policy"], "teacher": ["policy"]}
        for name in ("num_mini_batches", "rnd_cfg", "symmetry_cfg"):
            del cfg["algorithm"][name]
        runner, seen = construct(Drones(), cfg, DistillationRunner), []
        runner.alg.teacher_loaded = True
        update = runner.alg.update
        runner.alg.update = lambda: seen.append(update()) or seen[-1]
        assert type(runner.alg.storage) is PeerStorage
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(2)
        return seen

    theirs = losses()
    patch()
    assert losses() == theirs
    obs = TensorDict({"policy": torch.zeros(2, 3)}, batch_size=[2])
    assert type(RolloutStorage("distillation", 2, 4, obs, [1])) is PeerStorage


def test_what_is_patched_comes_back(monkeypatch):
    original = ppo.RolloutStorage, ppo.PPO.compute_returns
    unpatch()
    assert (ppo.RolloutStorage, ppo.PPO.compute_returns) == original
    before = construct(Drones(), config())
    patch()
    patch("rsl_rl")
    during = construct(Drones(), config())
    assert isinstance(during.alg.storage, RolloutStorage) and during.alg.storage.shuffle == "rsl_rl"
    before_patch = learn(before, 1)
    assert type(before.alg.storage) is PeerStorage and "losses" in before_patch[0]
    unpatch()
    unpatch()
    assert (ppo.RolloutStorage, ppo.PPO.compute_returns) == original
    assert np.isfinite(list(learn(during, 2)[-1]["losses"].values())).all()  # with pydrone's storage and rsl_rl's loop
    patch()
    forbid_rsl_rls(monkeypatch)
    del during.alg.compute_returns, during.alg.update  # the wrappers that learn() installed
    with contextlib.redirect_stdout(io.StringIO()):
        during.learn(1)
    unpatch()
    assert type(construct(Drones(), config(CLASS_NAME)).alg.storage) is RolloutStorage
    assert (ppo.RolloutStorage, ppo.PPO.compute_returns) == original


def transition(t: int, n: int, hidden=(None, None)) -> PeerStorage.Transition:
    """Step t of n environments; every number identifies its sample: 100 * t + environment."""
    made, label = PeerStorage.Transition(), 100.0 * t + torch.arange(n)
    image = torch.full((n, 2, 2), t + 1, dtype=torch.uint8)
    made.observations = TensorDict({"policy": torch.stack([label, -label], 1), "image": image}, batch_size=[n])
    made.actions, made.values, made.actions_log_prob = label[:, None] + 0.25, label[:, None] / 10, label + 0.5
    made.distribution_params = (label[:, None] + 0.125, label[:, None] + 0.0625)
    made.rewards, made.dones = label / 5, (torch.arange(n) + t) % 4 == 0
    made.hidden_states = hidden
    return made


def storages(num_steps: int, num_envs: int) -> tuple[RolloutStorage, PeerStorage]:
    obs = transition(0, num_envs).observations
    return tuple(cls("rl", num_envs, num_steps, obs, [1]) for cls in (RolloutStorage, PeerStorage))


def test_returns_and_advantages_of_a_table_by_hand():
    # gamma 0.5, lam 0.5, V(s_T) = 8, 2. Environment 0 ends with step 1:
    #   d2 = 3 + 4 - 4 = 3;  d1 = 2 - 2 = 0, cut;           d0 = 1 + 1 - 4 = -2, A0 = -2 + 0.25 * 0
    # Environment 1 does not end; rewards 0, values 2, 4, 8:
    #   d2 = 1 - 8 = -7;     d1 = 4 - 4 = 0, A1 = -1.75;    d0 = 2 - 2 = 0,      A0 = -0.4375
    ours, _ = storages(3, 2)
    rewards, values = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], [[4.0, 2.0], [2.0, 4.0], [4.0, 8.0]]
    for t in range(3):
        step = transition(t, 2)
        step.rewards, step.values = torch.tensor(rewards[t]), torch.tensor(values[t])[:, None]
        step.dones = torch.tensor([t == 1, False])
        ours.add_transition(step)
    ours.compute_returns(torch.tensor([[8.0], [2.0]]), 0.5, 0.5, normalize=False)
    advantages = torch.tensor([[-2.0, -0.4375], [0.0, -1.75], [3.0, -7.0]])
    assert torch.equal(ours.advantages[:, :, 0], advantages)
    assert torch.equal(ours.returns[:, :, 0], advantages + torch.tensor(values))
    assert ours.dones[:, :, 0].tolist() == [[0, 0], [1, 0], [0, 0]]
    ours.compute_returns(torch.tensor([[8.0], [2.0]]), 0.5, 0.5, normalize=True)
    assert_close(ours.advantages[:, :, 0], (advantages - advantages.mean()) / (advantages.std() + 1e-8))


def test_the_storage_shows_what_rsl_rls_shows_and_allocates_once_outside_of_inference_mode():
    ours, theirs = storages(4, 3)
    assert isinstance(ours, PeerStorage) and ours.step == 0
    names, pointers = ("actions", "rewards", "dones", "values", "actions_log_prob"), set()
    for rollout in range(3):
        with torch.inference_mode():
            for t in range(4):
                assert ours.step == theirs.step == t
                for storage in (ours, theirs):
                    storage.add_transition(transition(4 * rollout + t, 3, gru(t)))
            ours.compute_returns(torch.zeros(3, 1), 0.9, 0.9, normalize=False)
        for name in names:
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(mine, other) and mine.dtype == other.dtype and not mine.is_inference(), name
        (mine,), (other,) = ours.saved_hidden_state_a, theirs.saved_hidden_state_a
        assert torch.equal(mine, other) and not mine.is_inference()
        pairs = zip(ours.distribution_params, theirs.distribution_params, strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert_same_groups(ours.observations, theirs.observations)
        pointers.add(tuple(getattr(ours, name).data_ptr() for name in (*names, "returns", "advantages")))
        with pytest.raises(OverflowError, match="clear"):
            ours.add_transition(transition(0, 3))
        for storage in (ours, theirs):
            storage.clear()
    assert len(pointers) == 1


def assert_same_groups(mine, other) -> None:
    assert mine.batch_size == other.batch_size and mine.device == other.device
    assert set(mine.keys()) == set(other.keys()) == {"policy", "image"}
    for name in ("policy", "image"):
        assert mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]), name


FIELDS = ("actions", "values", "advantages", "returns", "old_actions_log_prob")


def filled(num_steps: int, num_envs: int, hidden=lambda t: (None, None)) -> tuple[RolloutStorage, PeerStorage]:
    """Both storages with the same rollout; ours computes the results, theirs gets a copy of them."""
    ours, theirs = storages(num_steps, num_envs)
    for t in range(num_steps):
        for storage in (ours, theirs):
            storage.add_transition(transition(t, num_envs, hidden(t)))
    ours.compute_returns(torch.ones(num_envs, 1), 0.9, 0.9, normalize=True)
    theirs.returns, theirs.advantages = ours.returns.clone(), ours.advantages.clone()
    return ours, theirs


def assert_same_batch(mine, other) -> None:
    assert_same_groups(mine.observations, other.observations)
    for name in FIELDS:
        x, y = getattr(mine, name), getattr(other, name)
        assert x.shape == y.shape and torch.allclose(x, y, rtol=1e-5, atol=1e-6), name
    for x, y in zip(mine.old_distribution_params, other.old_distribution_params, strict=True):
        assert torch.equal(x, y)


def test_rsl_rls_permutation_is_drawn_as_it_draws_it_and_served_by_views_of_one_copy(monkeypatch):
    ours, theirs = filled(5, 3)
    ours.shuffle, batches, copies = "rsl_rl", [], []
    arranged = ours._buffer.arranged
    monkeypatch.setattr(ours._buffer, "arranged", lambda *args: copies.append(arranged(*args)) or copies[-1])
    for storage in (ours, theirs, ours):
        torch.manual_seed(7)
        batches.append(list(storage.mini_batch_generator(4, 2)))  # 15 samples, but 12 are permuted
    for mine, other in zip(*batches[:2], strict=True):
        assert_same_batch(mine, other)
    assert len(copies) == 2  # one per update, both in the same memory
    pointers = {batch.actions.untyped_storage().data_ptr() for batch in batches[0] + batches[2]}
    assert pointers == {copies[0].actions.data_ptr()}


def test_the_default_permutation_differs_from_epoch_to_epoch_and_from_rollout_to_rollout():
    ours, _ = filled(5, 3)
    epochs = []
    for _ in range(2):
        samples = [batch.actions[:, 0] - 0.25 for batch in map(copied, ours.mini_batch_generator(3, 2))]
        assert [len(x) for x in samples] == [5] * 6
        epochs += [torch.cat(samples[:3]), torch.cat(samples[3:])]
        ours.clear()
        for t in range(5):
            ours.add_transition(transition(t, 3))
        ours.compute_returns(torch.ones(3, 1), 0.9, 0.9, normalize=True)
    everything = (100.0 * torch.arange(5)[:, None] + torch.arange(3)).flatten()
    assert all(torch.equal(epoch.sort().values, everything) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4
    assert [len(batch.actions) for batch in ours.mini_batch_generator(4, 1)] == [3] * 4  # 15 // 4, as rsl_rl


def copied(batch):
    batch.actions = batch.actions.clone()
    return batch


def test_each_minibatch_holds_the_fields_of_one_sample_in_one_place():
    ours, theirs = filled(5, 3)
    index = {label: (t, n) for t in range(5) for n, label in enumerate((100.0 * t + torch.arange(3)).tolist())}
    for batch in ours.mini_batch_generator(2, 1):
        where = [index[label] for label in (batch.actions[:, 0] - 0.25).tolist()]
        for name, stored in zip(
            FIELDS, ("actions", "values", "advantages", "returns", "actions_log_prob"), strict=True
        ):
            expected = torch.stack([getattr(theirs, stored)[place] for place in where])
            assert torch.allclose(getattr(batch, name), expected, rtol=1e-5, atol=1e-6), name
        obs = torch.stack([theirs.observations["policy"][place] for place in where])
        assert torch.equal(batch.observations["policy"], obs)


def gru(t: int):
    return (100.0 * t + torch.arange(12.0).reshape(2, 3, 2), 1.0 + torch.zeros(1, 3, 4))


def lstm_actor(t: int):
    return ((gru(t)[0], -gru(t)[0]), None)


@pytest.mark.parametrize("hidden", [gru, lstm_actor])
def test_trajectories_are_rsl_rls(hidden):
    ours, theirs = filled(6, 3, hidden)
    ours.shuffle = "rsl_rl"
    batches = [list(storage.recurrent_mini_batch_generator(3, 2)) for storage in (ours, theirs)]
    assert len(batches[0]) == 6
    for mine, other in zip(*batches, strict=True):
        assert_same_batch(mine, other)
        assert torch.equal(mine.masks, other.masks)
        for state, expected in zip(mine.hidden_states, other.hidden_states, strict=True):
            assert type(state) is type(expected)
            for x, y in zip(*(s if isinstance(s, tuple) else (s,) for s in (state, expected)), strict=True):
                assert x is y is None or torch.equal(x, y)


def test_trajectories_of_whole_environments_are_shuffled_in_every_epoch():
    ours, theirs = filled(6, 3, gru)
    of_env = {int(batch.actions[0, 0]): batch for batch in theirs.recurrent_mini_batch_generator(3, 1)}
    orders = set()
    for _ in range(4):
        batches = list(ours.recurrent_mini_batch_generator(3, 2))
        envs = [int(batch.actions[0, 0]) for batch in batches]
        assert sorted(envs[:3]) == sorted(envs[3:]) == [0, 1, 2]
        orders |= {tuple(envs[:3]), tuple(envs[3:])}
        for env, batch in zip(envs, batches, strict=True):
            assert_same_batch(batch, of_env[env])
            assert torch.equal(batch.hidden_states[0], of_env[env].hidden_states[0])
    assert len(orders) > 1


def test_it_learns_with_a_new_permutation_in_every_epoch():
    env, crashes = Points(AutoresetMode.SAME_STEP), []
    runner = construct(env, config(CLASS_NAME, num_learning_epochs=5, learning_rate=3e-3))
    assert runner.alg.storage.shuffle == "full"
    for _ in range(5):
        env.ends["crashes"] = 0
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(6)
        crashes.append(env.ends["crashes"])
    assert crashes[-1] < 0.5 * crashes[0], crashes


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="shuffle"):
        patch("random")
    with pytest.raises(ValueError, match="shuffle"):
        construct(Drones(), config(CLASS_NAME, shuffle="random"))
    with pytest.raises(TypeError, match="storage"):
        PPO(None, None, storages(2, 2)[1])
    with pytest.raises(ValueError, match="env"):
        VecEnvWrapper(SimpleNamespace(autoreset="next_step"))
    with pytest.raises(TypeError, match="env"):
        VecEnvWrapper(SimpleNamespace(autoreset="same_step", actions=((), torch.int64)))


def test_a_wrapped_environment_keeps_its_observations_and_reports_its_ends():
    env, plain = VecEnvWrapper(Quadrotor(4, seed=2, max_episode_length=3)), Quadrotor(4, seed=2, max_episode_length=3)
    assert (env.num_envs, env.num_actions, env.max_episode_length, env.step_dt) == (4, 4, 3, 0.01)
    assert torch.equal(env.get_observations()["policy"], plain.reset())
    for age in (1, 2, 0, 1):
        first = env.get_observations()["policy"]
        kept = first.clone()
        obs, rewards, dones, extras = env.step(torch.full((4, 4), 0.1))
        expected = plain.step(torch.full((4, 4), 0.1))
        assert torch.equal(first, kept)
        assert torch.equal(obs["policy"], expected.obs) and torch.equal(rewards, expected.rewards)
        assert torch.equal(dones, expected.dones) and torch.equal(extras["time_outs"], expected.truncated)
        assert extras["log"]["distance"] == expected.log["distance"] and "episode/count" not in extras["log"]
        assert env.episode_length_buf.tolist() == [age] * 4 and bool(dones.all()) == (age == 0)
    env.env.task.age.fill_(-1)
    env.episode_length_buf = torch.zeros(4, dtype=torch.long)  # as the runner does
    assert ((env.env.task.age >= 0) & (env.env.task.age < 3)).all()


@pytest.mark.parametrize(("kind", "below", "gradient"), [("scalar", -0.001, 0), ("log", -13.0, 1), ("log", -14.0, 0)])
def test_a_standard_deviation_below_rsl_rls_floor_is_rsl_rls_own(kind, below, gradient):
    runner = construct(VecEnvWrapper(Quadrotor(4)), config("pydrone.integrations.rsl_rl:PPO"))
    found = runner.alg.actor.distribution
    assert type(found) is GaussianDistribution
    found = GaussianDistribution(1, std_type=kind)
    (parameter,) = found.parameters()
    parameter.data.fill_(below)
    found.update(torch.zeros(3, 1))
    found.entropy.mean().backward()  # d log(std) / d log(std)
    assert parameter.grad.item() == pytest.approx(gradient) and found.std.min() > 0.99e-6


def test_an_environment_without_a_time_limit_that_logs_numbers_of_any_kind_trains(tmp_path):
    class Endless(Quadrotor):
        def step(self, actions):
            result = super().step(actions)
            given = {"number": 2.0, "each": torch.ones(self.num_envs), "numpy": np.float32(3), "episode/x": 1}
            return result._replace(log={**result.log, **given})

    quadrotor = Endless(4, seed=2)
    quadrotor.max_episode_length = None
    env = VecEnvWrapper(quadrotor)
    log = env.step(torch.zeros(4, 4))[3]["log"]
    assert (log["number"], log["each"], log["numpy"]) == (2, 1, 3) and "episode/x" not in log
    with contextlib.redirect_stdout(io.StringIO()):
        runner = OnPolicyRunner(env, config("pydrone.integrations.rsl_rl:PPO"), log_dir=str(tmp_path))
        runner.learn(2, init_at_random_ep_len=True)
    assert quadrotor.task.age.max() > 2 * NUM_STEPS, "the environment draws the ages"
