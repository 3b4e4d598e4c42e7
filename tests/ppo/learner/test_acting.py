"""Acting and storing by one operation, against the calls that it stands for: equal to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pydrone.buffer import BufferFull, RolloutBuffer
from pydrone.envs.base import StepResult
from pydrone.ops import native
from pydrone.ops.schema import packed_size
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.learner import fused
from pydrone.ppo.learner.acting import Acting, FusedActing
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.actor_critic import MIN_STD, ActorCritic
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.trainer import Trainer
from pydrone.ppo.training.iteration import stored_obs

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

ACTIONS = 3


class Operations(TorchDispatchMode):
    """Counts pydrone's by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("pydrone::"):
            name = name.removeprefix("pydrone::")
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def draw(spec, n: int, generator: torch.Generator):
    if isinstance(spec, dict):
        return {name: torch.randn(n, width, generator=generator) for name, width in spec.items()}
    return torch.randn(n, spec, generator=generator)


class World:
    """Observations and ends that depend on nothing, written over in each step as an environment may."""

    max_episode_length = None

    def __init__(self, obs=5, num_envs: int = 7, autoreset: str = "same_step", final: bool = True) -> None:
        self.obs, self.num_envs, self.actions, self.autoreset, self.final = obs, num_envs, ACTIONS, autoreset, final
        self.device, self.generator = torch.device("cpu"), torch.Generator().manual_seed(3)
        self.held = draw(obs, num_envs, self.generator)
        self.rewards, self.skipped = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.bool)
        self.seen: list[Tensor] = []

    def reset(self):
        return self.held

    def randomize_episode_lengths(self) -> None:
        pass

    def step(self, actions: Tensor) -> StepResult:
        self.seen.append(actions)
        fresh, held = draw(self.obs, self.num_envs, self.generator), self.held
        for x, y in zip(held.values(), fresh.values()) if isinstance(held, dict) else [(held, fresh)]:
            x.copy_(y)
        self.rewards.copy_(actions.sum(1) + torch.randn(self.num_envs, generator=self.generator))
        chance = torch.rand(self.num_envs, generator=self.generator)
        valid = None
        dones, truncated = chance < 0.4, chance < 0.2
        if self.autoreset == "next_step":
            valid = ~self.skipped
            dones, truncated = dones & valid, truncated & valid
            self.skipped = dones.clone()
        same = self.autoreset == "same_step" and self.final
        final = draw(self.obs, self.num_envs, self.generator) if same else None
        return StepResult(held, self.rewards, dones, truncated, final, valid, {})

    def close(self) -> None:
        pass


def policy_of(obs, **settings) -> ActorCritic:
    torch.manual_seed(0)
    policy = make_policy(obs, ACTIONS, PPOConfig(hidden_dims=(33, 16), **settings))
    if settings.get("normalize_obs"):
        generator = torch.Generator().manual_seed(1)
        seen = (
            {name: draw(width, 40, generator)[None] * 2 + 1 for name, width in obs.items()}
            if isinstance(obs, dict)
            else draw(obs, 40, generator)[None] * 2 + 1
        )
        policy.observe(seen)
        policy.observe_returns(torch.randn(10, 9, generator=generator) * 3 + 1)
    return policy


def buffer_of(policy: ActorCritic, world: World, num_steps: int = 5, capacity: int | None = None, **options):
    dtype = policy.obs_dtype
    buffer = RolloutBuffer(
        world.num_envs,
        num_steps,
        obs=stored_obs(world.obs, dtype),
        actions=ACTIONS,
        capacity=capacity,
        obs_dtype=dtype,
        fields=policy.fields(),
        final_obs_rows=0 if world.autoreset == "next_step" else 30,
        **options,
    )
    for name, x in buffer._storage.tensors.items():  # whatever is not written shows
        if name in ("rows", "rewards", "values", "dones", "final_obs"):
            x.view(torch.uint8).fill_(0xFF) if x.dtype == torch.uint8 else x.fill_(math.nan)
    return buffer


def collect(policy, world, make, rollouts: int = 3, num_steps: int = 5, capacity: int | None = None):
    """The buffer's state after each rollout, and torch's generator's; which operations ran."""
    torch.manual_seed(5)
    buffer, obs, states = buffer_of(policy, world, num_steps, capacity), world.reset(), []
    before = [x._version for x in buffer._steps.written]
    with torch.no_grad(), Operations() as operations:
        for _ in range(rollouts):
            acting, ends = make(policy, buffer), None
            for _ in range(num_steps):
                result = world.step(acting(obs, ends))
                final = result.final_obs
                ends = dict(zip(("rewards", "dones", "truncated"), result[1:4])) | {"valid": result.valid}
                ends |= {"final_obs": final} if final is not None else {}
                obs = result.obs
            buffer.end(**ends)
            state = {name: x.clone() if isinstance(x, Tensor) else x for name, x in buffer.state_dict().items()}
            states.append(state | {"generator": torch.get_rng_state(), "seen": buffer._storage.not_finite.clone()})
            versions = [x._version - y for x, y in zip(buffer._steps.written, before)]
            if len(buffer) + num_steps > buffer.capacity:
                buffer.clear()
    return states, versions, operations.calls


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def by_calls(policy, buffer):
    return Acting(policy, buffer, lambda stage: None, Learner(policy, PPOConfig()).act)


def by_one(policy, buffer):
    assert FusedActing.serves(policy, buffer)
    return FusedActing(policy, buffer, lambda stage: None)


GROUPS = {"policy": 5, "critic": 8, "other": 2}
CASES = {
    "one group": ({}, {}, {}),
    "groups": ({"obs": GROUPS}, {}, {}),
    "one environment": ({"num_envs": 1}, {}, {}),
    "two tiles": ({"num_envs": 131}, {}, {}),
    "wraps around": ({}, {}, {"capacity": 8}),
    "two rollouts": ({"obs": GROUPS}, {}, {"capacity": 10}),
    "one step": ({}, {}, {"num_steps": 1}),
    "normalized": ({"obs": GROUPS}, {"normalize_obs": True, "normalize_values": True, "activation": "elu"}, {}),
    "bfloat16": ({"obs": GROUPS}, {"obs_dtype": "bfloat16", "normalize_obs": True}, {"capacity": 8}),
    "float16": ({}, {"obs_dtype": "float16"}, {}),
    "next step": ({"autoreset": "next_step"}, {}, {"capacity": 8}),
    "no final observations": ({"final": False}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_calls_it_stands_for(case):
    of_world, settings, sizes = CASES[case]
    results = []
    for make in (by_calls, by_one):
        world = World(**of_world)
        policy = policy_of(world.obs, **settings)
        results.append((world.seen, *collect(policy, world, make, **sizes)))
    (their_actions, theirs, their_versions, _), (actions, ours, versions, calls) = results
    for x, y in zip(actions, their_actions, strict=True):
        assert torch.equal(x, y)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, x in mine.items():
            assert torch.equal(bits(x), bits(other[name])) if isinstance(x, Tensor) else x == other[name], name
    steps = sizes.get("num_steps", 5)
    assert min(versions) == 3 * (steps + 1) and min(their_versions) == 3 * 2 * steps  # autograd sees each launch
    assert calls == {"ppo_step": 3 * steps, "append": 3}
    dones = ours[-1]["memory.dones"]
    assert {1, 2} <= set(dones.unique().tolist()) or of_world.get("num_envs") == 1 or steps == 1


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_a_training_is_the_same(autoreset, monkeypatch):
    """The trainer's loop, running statistics and final observations included."""
    results = []
    for fused_too in (True, False):
        if not fused_too:
            monkeypatch.setattr(FusedActing, "serves", lambda policy, buffer: False)
        ppo = PPOConfig(hidden_dims=(16,), num_minibatches=2, num_epochs=2, normalize_obs=True, normalize_values=True)
        config = TrainConfig(num_steps=6, iterations=3, ppo=ppo, tensorboard=False)
        trainer = Trainer(World(GROUPS, autoreset=autoreset), config, echo=lambda line: None)
        figures = [trainer.iterate() for _ in range(3)]
        results.append((trainer.policy.state_dict(), figures))
    (ours, figures), (theirs, their_figures) = results
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    for mine, other in zip(figures, their_figures):
        for name, x in mine.items():
            assert name.startswith(("time/", "steps_per")) or x == pytest.approx(other[name], abs=0, rel=0, nan_ok=True)


# ----------------------------------------------------------------------------------------------------- stale weights


def step_of_adam(policy):
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, fused=True)
    for x in policy.parameters():
        x.grad = torch.ones_like(x)
    optimizer.step()


def by_foreach(policy):
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, foreach=True)
    for x in policy.parameters():
        x.grad = torch.ones_like(x)
    optimizer.step()


@torch.no_grad()
def in_place(policy):
    policy.critic[2].weight.mul_(-2)


@torch.no_grad()
def one_element(policy):
    policy.actor[0].bias[3] += 1


def by_data(policy):
    policy.actor[2].weight.data = policy.actor[2].weight.data * -2


def in_place_by_data(policy):
    policy.actor[2].weight.data.mul_(-2)


def by_numpy(policy):
    policy.critic[4].bias.detach().numpy()[:] = 3


def by_detached(policy):
    policy.actor[4].bias.detach().add_(1)


def load(policy):
    policy.load_state_dict({name: x * 1.5 for name, x in policy.state_dict().items()})


def assign(policy):
    policy.load_state_dict({name: x * 1.5 for name, x in policy.state_dict().items()}, assign=True)


def there_and_back(policy):
    policy.double().float()
    policy.critic[0].bias.data += 1  # in the new place


def another_layer(policy):
    policy.actor[2] = nn.Linear(33, 16)


def another_width(policy):
    policy.actor = nn.Sequential(nn.Linear(5, 50), nn.Tanh(), nn.Linear(50, ACTIONS))


def another_activation(policy):
    for network in (policy.actor, policy.critic):
        for i in (1, 3):
            network[i] = nn.ReLU()


@torch.no_grad()
def std(policy):
    policy.std_param.mul_(2)


def statistics(policy):
    policy.observe(torch.randn(7, 4, 5) * 5 + 2)
    policy.observe_returns(torch.randn(7, 4) * 5)


CHANGES = [
    step_of_adam,
    by_foreach,
    in_place,
    one_element,
    by_data,
    in_place_by_data,
    by_numpy,
    by_detached,
    load,
    assign,
    there_and_back,
]
CHANGES += [another_layer, another_width, another_activation, std, statistics]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_within_a_rollout_are_acted_by(change):
    world = World()
    policy = policy_of(5, normalize_obs=True, normalize_values=True)
    buffer = buffer_of(policy, world)
    acting, ends = by_one(policy, buffer), {"rewards": world.rewards, "dones": world.rewards}
    torch.manual_seed(2)
    before = acting(world.held)
    torch.manual_seed(2)
    repeated = acting(world.held, ends)
    change(policy)
    torch.manual_seed(2)
    expected = fused.act(policy, world.held)
    torch.manual_seed(2)
    found = acting(world.held, ends)
    assert torch.equal(found, expected.actions)
    buffer.end(**ends)
    stored = {"actions": expected.actions, "values": expected.values, "log_probs": expected.log_probs}
    stored |= {"mu": expected.mean, "sigma": expected.std}
    for name, x in stored.items():
        assert torch.equal(buffer._storage.views[name][2], x), name  # the third slot
    # The same noise in all three steps: what differs is the change's.
    steps = [[buffer._storage.views[name][i] for name in stored] for i in range(3)]
    assert torch.equal(before, repeated) and all(map(torch.equal, steps[0], steps[1]))
    assert not all(map(torch.equal, steps[1], steps[2]))


def test_a_standard_deviation_below_its_floor_is_raised_to_it():
    world, found = World(), []
    for make in (by_calls, by_one):
        policy = policy_of(5)
        policy.std_param.data[1] = -0.5
        buffer = buffer_of(policy, world)
        torch.manual_seed(2)
        actions = make(policy, buffer)(world.held)
        stored = (buffer._storage.views[name][0] for name in ("log_probs", "mu", "sigma"))
        found.append((actions, *stored))
    assert all(map(torch.equal, *found)) and found[0][-1][0, 1] == pytest.approx(MIN_STD)


def test_weights_are_packed_once():
    """It reads what it has packed, and packs what has changed alone."""
    world, policy = World(), policy_of(5)
    acting, ends = by_one(policy, buffer_of(policy, world)), {"rewards": world.rewards, "dones": world.rewards}
    acting(world.held)
    kept = acting._packed.clone()
    acting(world.held, ends)
    assert torch.equal(acting._packed, kept)
    start = (-acting._packed.data_ptr() % 64) // 4
    panels = acting._packed[start : start + 5 * 33]
    assert panels.any()
    panels.fill_(math.nan)  # the actor's first layer
    assert acting(world.held, ends).isnan().all()
    with torch.no_grad():
        policy.actor[2].weight[0, 0] += 1
    assert acting(world.held, ends).isnan().all()
    with torch.no_grad():
        policy.actor[0].weight[0, 0] += 1
    assert acting(world.held, ends).isfinite().all()


def test_parameters_that_count_no_versions():
    with torch.inference_mode():
        policy = policy_of(5)
        world = World()
        buffer = buffer_of(policy, world)
        acting = by_one(policy, buffer)
        acting(world.held)
        policy.actor[0].weight.mul_(2)
        torch.manual_seed(2)
        expected = fused.act(policy, world.held).actions
        torch.manual_seed(2)
        assert torch.equal(acting(world.held, {"rewards": world.rewards, "dones": world.rewards}), expected)


# ------------------------------------------------------------------------------------------------ out of the ordinary


@pytest.mark.parametrize("capacity", [4, 7, 8])
def test_a_captured_step_follows_the_devices_counters(capacity):
    """Those of the device are behind the host's, which advance() has moved already."""
    results = []
    for make in (by_calls, by_one):
        world, policy = World(), policy_of(5)
        buffer, ends, lengths = buffer_of(policy, world, num_steps=4, capacity=capacity), None, []
        torch.manual_seed(5)
        acting, obs = make(policy, buffer), world.reset()
        for _ in range(3):
            buffer.advance(4)
            with buffer.as_captured(), torch.no_grad():
                for _ in range(4):
                    result = world.step(acting(obs, ends))
                    ends = dict(zip(("rewards", "dones", "truncated", "final_obs"), result[1:5]))
                    obs = result.obs
                buffer.end(**ends)
                ends = None
            lengths.append(len(buffer))
            assert buffer._storage.cursor[:2].tolist() == [buffer._ring.appended, buffer._ring.discarded]
            buffer.clear()
        state = {name: x.clone() if isinstance(x, Tensor) else x for name, x in buffer.state_dict().items()}
        results.append((state, world.seen, lengths))
    (theirs, their_actions, _), (ours, actions, lengths) = results
    assert lengths == [4, 4, 4] and all(torch.equal(x, y) for x, y in zip(actions, their_actions, strict=True))
    for name, x in ours.items():
        assert torch.equal(bits(x), bits(theirs[name])) if isinstance(x, Tensor) else x == theirs[name], name
    assert ours["memory.values"].isfinite().all()


def test_actions_are_not_written_over():
    world, policy = World(), policy_of(5)
    acting = by_one(policy, buffer_of(policy, world))
    first = acting(world.held)
    kept = first.clone()
    acting(world.held, {"rewards": world.rewards, "dones": world.rewards})
    assert torch.equal(first, kept)


def test_gradients_are_not_followed():
    world, policy = World(), policy_of(5)
    buffer = buffer_of(policy, world)
    acting = by_one(policy, buffer)
    actions = acting(world.held.clone().requires_grad_())
    ends = {"rewards": torch.ones(7, requires_grad=True), "dones": world.rewards}
    assert not actions.requires_grad and not acting(world.held, ends).requires_grad
    assert len(buffer) == 1


@pytest.mark.parametrize(
    "kept",
    [
        {"backend": "reference"},
        {"fields": {"mu": ACTIONS, "sigma": ACTIONS, "cost": ()}},
        {"fields": {"sigma": ACTIONS, "mu": ACTIONS}},
    ],
    ids=["backend", "field", "order"],
)
def test_other_buffers_are_not_served(kept):
    policy = policy_of(5)
    buffer = RolloutBuffer(**{"num_envs": 7, "num_steps": 4, "obs": 5, "actions": 3, "fields": policy.fields()} | kept)
    learner = Learner(policy, PPOConfig())
    assert not FusedActing.serves(policy, buffer) and type(learner.acting(buffer)) is Acting


def test_what_the_learner_picks():
    for settings, kind in (({}, FusedActing), ({"learner": "torch"}, Acting), ({"recurrent": "gru"}, Acting)):
        config = PPOConfig(**settings)
        policy = make_policy(5, ACTIONS, config)
        buffer = RolloutBuffer(7, 4, obs=5, actions=ACTIONS, fields=policy.fields())
        assert type(Learner(policy, config).acting(buffer)) is kind


def test_a_full_ring_is_not_written_over():
    world, policy = World(), policy_of(5)
    buffer = buffer_of(policy, world, num_steps=2)
    acting, ends = by_one(policy, buffer), {"rewards": world.rewards, "dones": world.rewards}
    acting(world.held)
    acting(world.held, ends)
    row = buffer._storage.rows[0].clone()
    with pytest.raises(BufferFull):
        acting(world.held, ends)
    assert buffer.full and torch.equal(buffer._storage.rows[0], row)
    with pytest.raises(BufferFull):
        acting(world.held)


ENDS = [
    ({"rewards": torch.zeros(6)}, ValueError, r"^rewards: expected shape \[7\] or \[7, 1\], got \[6\]$"),
    ({"rewards": torch.zeros(7, dtype=torch.int64)}, TypeError, "^rewards: expected a floating dtype"),
    ({"dones": None}, TypeError, "^dones: expected a tensor, got NoneType$"),
    ({"truncated": torch.zeros(7, 2)}, ValueError, "^truncated: expected shape"),
    ({"truncated": torch.ones(7), "final_obs": torch.zeros(7, 4)}, ValueError, r"^final_obs: expected shape \[7, 5\]"),
    ({"final_obs": torch.zeros(7, 5)}, ValueError, "^final_obs: expected truncated with it"),
    ({"valid": [1] * 7}, TypeError, "^valid: expected a tensor"),
    ({"truncate": torch.zeros(7)}, TypeError, "unexpected keyword argument 'truncate'"),
    ({"rewards": None}, TypeError, "^rewards: expected a tensor, got NoneType$"),
]


@pytest.mark.parametrize(("change", "error", "message"), ENDS, ids=["-".join(x) for x, *_ in ENDS])
def test_wrong_ends_are_named_and_nothing_is_stored(change, error, message):
    world, policy = World(), policy_of(5)
    buffer = buffer_of(policy, world)
    acting, ends = by_one(policy, buffer), {"rewards": world.rewards, "dones": world.rewards}
    acting(world.held)
    rows, codes = buffer._storage.rows.clone(), buffer._storage.codes.clone()
    with pytest.raises(error, match=message):
        acting(world.held, ends | change)
    assert len(buffer) == 0 and torch.equal(buffer._storage.rows, rows) and torch.equal(buffer._storage.codes, codes)
    acting(world.held, ends)
    buffer.end(**ends)
    assert len(buffer) == 2


def test_ends_that_lack_something():
    world, policy = World(), policy_of(5)
    acting = by_one(policy, buffer_of(policy, world))
    acting(world.held)
    for name, other in (("rewards", "dones"), ("dones", "rewards")):
        with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{name}'"):
            acting(world.held, {other: world.rewards})


def test_a_wrong_observation_ends_the_step_before_it_once():
    """As two calls would: the pool has one row for each time-out, not two."""
    world = World(GROUPS)
    policy = policy_of(GROUPS)
    buffer = buffer_of(policy, world)
    acting = by_one(policy, buffer)
    acting(world.held)
    timeouts = torch.tensor([1, 0, 0, 1, 0, 0, 1])
    ends = {"rewards": world.rewards, "dones": timeouts, "truncated": timeouts, "final_obs": world.held}
    with pytest.raises(ValueError, match=r"^obs.other: expected shape \[7, 2\], got \[7, 3\]$"):
        acting(world.held | {"other": torch.zeros(7, 3)}, ends)
    assert len(buffer) == 1 and buffer._storage.pool_count.tolist() == [[3, 0]]
    acting(world.held)
    buffer.end(**ends)
    assert len(buffer) == 2 and buffer._storage.pool_count.tolist() == [[6, 0]]


def test_observations_that_are_not_finite_are_found():
    world, policy = World(), policy_of(5)
    buffer = buffer_of(policy, world, num_steps=2, non_finite="raise")
    acting, ends = by_one(policy, buffer), {"rewards": world.rewards, "dones": world.rewards}
    acting(world.held)
    world.held[4, 2] = math.inf
    acting(world.held, ends)
    buffer.end(**ends)
    with pytest.raises(
        FloatingPointError, match="obs: 1 value that is not finite, the first of environment 4 at step 1"
    ):
        buffer.compute_gae(torch.zeros(7))


# ------------------------------------------------------------------------------------------------------- the operation


def arguments(**changes) -> dict:
    """Those of ppo_step, as a rollout gives them."""
    world, policy = World(GROUPS), policy_of(GROUPS)
    buffer = buffer_of(policy, world)
    acting, found = by_one(policy, buffer), []
    acting(world.held)
    operation = torch.ops.pydrone.ppo_step.default

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is operation:
                found.append(args)
                return None
            return func(*args, **(kwargs or {}))

    ends = {"rewards": world.rewards, "dones": world.rewards + 1, "truncated": world.rewards + 1}
    with Record():
        acting(world.held, ends | {"final_obs": world.held})
    names = [x.name for x in operation._schema.arguments]
    # The dispatcher leaves out what has its default: the cursor.
    return dict(zip(names, (*found[0], None), strict=True)) | changes


def call(given: dict) -> None:
    torch.ops.pydrone.ppo_step.default(*given.values())


WRONG = [
    ({"end_slot": 9}, "slot: expected 0 <= slot < 5, got 9"),
    ({"slot": 5}, "slot: expected 0 <= slot < 5, got 5"),
    ({"pool_slot": 1}, "pool_slot: expected"),
    ({"stored_obs": [torch.zeros(7, 5)]}, "layout: expected counts of 0 to 7 sources, got 8"),
    ({"noise": torch.zeros(6, ACTIONS)}, "obs: expected shape"),
    ({"sigma": torch.zeros(7, ACTIONS + 1)}, "sources: expected shape"),
    ({"packed": torch.zeros(100)}, "packed: expected at least [0-9]{4} elements for these networks, got 100"),
    ({"packed": torch.zeros(5000, dtype=torch.float64)}, "packed: expected dtype Float, got Double"),
    ({"packed": torch.zeros(5000, 2)[:, 0]}, "packed: expected a contiguous tensor"),
    ({"packed": torch.zeros(50, 100)}, "packed: expected shape"),
    ({"dones": torch.zeros(8)}, "dones: expected shape"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=["-".join(x) + str(i) for i, (x, _) in enumerate(WRONG)])
def test_nothing_is_written_where_anything_is_wrong(change, message):
    given = arguments(**change)
    written = [*given["end_memory"], *given["memory"]]
    before = [x.clone() for x in written]
    with pytest.raises(RuntimeError, match=message):
        call(given)
    for x, y in zip(written, before, strict=True):
        assert torch.equal(x, y) or (x.is_floating_point() and torch.equal(x.nan_to_num(7), y.nan_to_num(7)))


def test_opcheck():
    given = arguments()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert torch.library.opcheck(torch.ops.pydrone.ppo_step.default, tuple(given.values()), test_utils=tests)


@pytest.mark.parametrize("hidden", [(), (1,), (16,), (17, 33), (200, 100, 50)])
def test_packed_weights_fit(hidden):
    """What the operation packs is no more than is given, and it is read again."""
    policy = make_policy(7, ACTIONS, PPOConfig(hidden_dims=hidden))
    networks, num_envs = fused.parameters_of(policy), 40
    size = sum(packed_size(x) for x in networks[:2])
    memory = torch.cat((torch.zeros(size), torch.full((64,), math.nan)))
    obs, noise, found = torch.randn(num_envs, 7), torch.randn(num_envs, ACTIONS), []
    for packed in (None, memory[:size], memory[:size]):
        outputs = [torch.full(shape, math.nan) for shape in ((40, ACTIONS), (40,), (40,), (40, ACTIONS))]
        with torch.no_grad():
            given = fused.act_arguments(policy, obs, networks, policy.std, noise, packed, outputs)
            torch.ops.pydrone.ppo_act(*given)
        found.append(outputs)
    assert memory[size:].isnan().all() and memory[:size].any()
    for x, y, z in zip(*found):
        assert torch.equal(x, y) and torch.equal(x, z) and x.isfinite().all()
