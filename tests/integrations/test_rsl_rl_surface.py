"""All that users touch of rsl_rl's storage: the same calls, the same outcome, for every dtype."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rsl_rl")

from rsl_rl.storage import RolloutStorage as PeerStorage
from surface import outcome, same_outcome
from tensordict import TensorDict
from test_rsl_rl import CLASS_NAME, Drones, config, construct, learn, transition

from pydrone.integrations import rsl_rl as integration
from pydrone.integrations.rsl_rl import RolloutStorage
from pydrone.ops.schema import SCALAR_TYPES

T, N = 3, 4
ARRAYS = ("observations", "actions", "rewards", "dones", "values", "actions_log_prob", "returns", "advantages")
GRU = (torch.arange(1.0, 1 + 2 * N).view(1, N, 2), None)


def made(kind, obs=None):
    torch.manual_seed(2)
    storage = kind("rl", N, T, transition(0, N).observations if obs is None else obs, [1])
    storage.shuffle = "rsl_rl"
    return storage


def put(storage, steps=T, **changes):
    for t in range(steps):
        step = transition(t, N, changes.pop("hidden", (None, None)))
        for name, change in changes.items():
            setattr(step, name, change(getattr(step, name)))
        storage.add_transition(step)


def compute(storage, normalize=True, last_values=None):
    last_values = torch.linspace(-1, 1, N).unsqueeze(1) if last_values is None else last_values
    if isinstance(storage, RolloutStorage):
        return storage.compute_returns(last_values, 0.9, 0.8, normalize)
    critic = SimpleNamespace(get_hidden_state=lambda: None, reset=lambda hidden_state: None)
    critic = type("Critic", (SimpleNamespace,), {"__call__": lambda self, obs: last_values})(**vars(critic))
    algorithm = SimpleNamespace(storage=storage, critic=critic, gamma=0.9, lam=0.8)
    algorithm.normalize_advantage_per_mini_batch = not normalize
    integration._peer_compute_returns(algorithm, None)


def whole(storage, normalize=True, **changes):
    put(storage, **changes)
    compute(storage, normalize)


def groups(obs):
    return {key: x.clone() for key, x in obs.items()}


def arrays(storage):
    found = {name: getattr(storage, name).clone() for name in ARRAYS[1:]}
    return found, groups(storage.observations), storage.distribution_params, storage.step


def epoch(storage, count=2, recurrent=False):
    torch.manual_seed(7)
    generator = storage.recurrent_mini_batch_generator if recurrent else storage.mini_batch_generator
    batches = ({**vars(batch), "observations": groups(batch.observations)} for batch in generator(count, 2))
    return [copy.deepcopy(batch) for batch in batches]  # pydrone's next rollout overwrites them


def written(name, change, normalize):
    """``change``, of one array, after the advantages were computed."""

    def call(storage):
        whole(storage, normalize)
        change(storage, name)
        return epoch(storage), arrays(storage)

    return call


def in_place(storage, name):
    x = getattr(storage, name)
    (x["policy"] if name == "observations" else x)[1:] = 1


def assigned(storage, name):
    setattr(storage, name, getattr(storage, name).flip(0).clone())


def augmented(storage, name):
    exec(f"storage.{name} *= storage.{name} != 0" if name != "observations" else "", {"storage": storage})
    exec(f"storage.{name} += 1" if name != "observations" else "", {"storage": storage})


def copied(how):
    def call(storage):
        put(storage, 2)
        twin = how(storage)
        twin.add_transition(transition(2, N))
        compute(twin)
        twin.rewards[0] = 9
        return arrays(storage), arrays(twin), epoch(twin)

    return call


def again(storage):
    """A second rollout in the same memory, and one that is given up."""
    whole(storage)
    first = epoch(storage)
    storage.clear()
    put(storage, 1)
    storage.clear()
    put(storage, actions=lambda x: x + 1)
    compute(storage, normalize=False)
    return first, epoch(storage, 3), arrays(storage)


SURFACE = {
    "fresh": arrays,
    "fresh minibatches": epoch,
    "attributes": lambda s: (s.training_type, s.device, s.num_envs, s.num_transitions_per_env, s.actions_shape),
    "partly filled": lambda s: (put(s, 2), arrays(s)),
    "one too many": lambda s: (put(s), put(s, 1)),
    "of distillation": lambda s: (put(s), next(s.generator())),
    "normalised": lambda s: (whole(s), epoch(s), arrays(s)),
    "not normalised": lambda s: (whole(s, False), epoch(s, 5), arrays(s)),
    "read before the minibatches": lambda s: (whole(s), arrays(s), epoch(s)),
    "recurrent": lambda s: (whole(s, hidden=(GRU, None)), epoch(s, recurrent=True)),
    "two rollouts": again,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda s: pickle.loads(pickle.dumps(s))),
    "scalars in columns": lambda s: (whole(s, rewards=lambda x: x[:, None], dones=lambda x: x[:, None]), epoch(s)),
    **{
        f"{name} {change.__name__}, normalize={normalize}": written(name, change, normalize)
        for name in ARRAYS
        for change in (in_place, assigned, augmented)
        for normalize in (True, False)
    },
}


@pytest.mark.parametrize("call", SURFACE.values(), ids=SURFACE)
def test_the_same_calls_have_the_same_outcome(call):
    """What rsl_rl's storage takes and gives, its arrays written by callers, or an error from both."""
    same_outcome(outcome(call, made(PeerStorage)), outcome(call, made(RolloutStorage)))


@pytest.mark.parametrize("shape", [(2,), (2, 1, 3), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("recurrent", [False, True])
def test_every_dtype_of_a_group_comes_out_as_it_went_in(shape, recurrent):
    for dtype in SCALAR_TYPES:

        def call(kind, dtype=dtype):
            numbers = torch.arange(T * N * 6).view(T, N, 2, 1, 3)
            part = {(2,): (slice(2), 0, 0), (2, 1, 3): (), (): (0, 0, 0), (0,): (slice(0), 0, 0), (2, 0): (0,)}[shape]
            given = numbers[(..., *part)] if len(part) == 3 else numbers[:, :, :, 0, :0] if part else numbers
            observed = [TensorDict({"a": x.to(dtype), "policy": torch.ones(N, 2)}, [N]) for x in given]
            storage = made(kind, observed[0])
            for t in range(T):
                step = transition(t, N, ((GRU[0], None) if recurrent else (None, None)))
                step.observations = observed[t]
                storage.add_transition(step)
            compute(storage)
            return groups(storage.observations), epoch(storage, recurrent=recurrent)

        expected = outcome(call, PeerStorage)
        if recurrent and expected == "raised":
            continue  # rsl_rl's padding knows fewer dtypes
        same_outcome(expected, outcome(call, RolloutStorage), str(dtype))


@pytest.mark.parametrize("name", ["rewards", "actions", "values", "actions_log_prob", "dones", "observations"])
def test_every_dtype_of_a_step_is_taken(name):
    """rsl_rl's ``copy_`` converts: integer rewards, for one."""
    for dtype in SCALAR_TYPES:

        def changed(x, dtype=dtype):
            return x.to(dtype) if name != "observations" else x.apply(lambda y: y.to(dtype))

        def call(storage):
            whole(storage, **{name: changed})
            return arrays(storage), epoch(storage)

        same_outcome(outcome(call, made(PeerStorage)), outcome(call, made(RolloutStorage)), str(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_actions_and_parameters_have_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        for kind in (PeerStorage, RolloutStorage):
            storage = made(kind)
            whole(storage)
            batch = next(storage.mini_batch_generator(1, 1))
            assert {batch.actions.dtype, *(x.dtype for x in batch.old_distribution_params)} == {dtype}
    finally:
        torch.set_default_dtype(torch.float32)


class Odd(Drones):
    """Integer rewards without time-outs, a depth image in millimetres, a group of counters, and one that is empty."""

    def step(self, actions):
        obs, rewards, dones, _ = super().step(actions)
        return obs, (rewards > 0).long(), dones, {}

    def _keep(self, obs) -> None:
        n = len(obs)
        depth = (obs[:, :4].abs() * 60000).to(torch.int32).to(torch.uint16).view(n, 2, 2)
        super()._keep(obs)
        self._obs = TensorDict(
            {"policy": obs.clone(), "depth": depth, "count": depth.to(torch.uint32), "none": torch.zeros(n, 0)}, [n]
        )


class Halves(Drones):
    """Observations in bfloat16."""

    def _keep(self, obs) -> None:
        super()._keep(obs.bfloat16())


@pytest.mark.parametrize("case", ["integer rewards, uint16, uint32, empty", "bfloat16 models"])
def test_the_runner_trains_where_rsl_rls_storage_does(case):
    env = Halves if "bfloat16" in case else Odd

    def losses(*arguments, **options):
        cfg = config(*arguments, **options)
        for model in ("actor", "critic"):
            cfg[model]["obs_normalization"] = False
        runner = construct(env(), cfg)
        if env is Halves:
            runner.alg.actor.bfloat16(), runner.alg.critic.bfloat16()
        else:
            cfg["obs_groups"]["actor"].append("none")
        return [x["losses"] for x in learn(runner, 2)]

    for mine, other in zip(losses(CLASS_NAME, shuffle="rsl_rl"), losses(), strict=True):
        assert mine == pytest.approx(other, rel=1e-2 if env is Halves else 1e-4, abs=1e-4)


def test_the_default_shuffle_follows_what_callers_write():
    storage = made(RolloutStorage)
    storage.shuffle = "full"
    whole(storage)
    storage.returns += 1
    storage.values[0] = 5
    storage.advantages[1] = 0  # of a normalised copy
    wanted = torch.cat([storage.actions, storage.values, storage.returns, storage.advantages], -1).flatten(0, 1)
    rows = [torch.cat([x.actions, x.values, x.returns, x.advantages], -1) for x in storage.mini_batch_generator(3, 1)]
    assert sorted(torch.cat(rows).tolist()) == sorted(wanted.tolist())


@pytest.mark.filterwarnings("ignore:std")
def test_one_sample_has_an_advantage_of_zero():
    """rsl_rl's is NaN."""
    obs = transition(0, 1).observations
    for kind in (PeerStorage, RolloutStorage):
        storage = kind("rl", 1, 1, obs, [1])
        storage.add_transition(transition(0, 1))
        compute(storage, last_values=torch.ones(1, 1))
        (batch,) = storage.mini_batch_generator(1, 1)
        assert batch.returns.isfinite().all()
        assert batch.advantages.item() == 0 if kind is RolloutStorage else batch.advantages.isnan().all()
