"""The learner: gradients against a plain PPO in float64, rsl_rl's schedule, and what the storage costs."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

import pydrone
from pydrone.buffer import RolloutBuffer
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.actor_critic import MIN_STD, ActorCritic

N, T, OBS, ACTIONS = 16, 8, 5, 2


class Batch(SimpleNamespace):
    """A minibatch: fields by name and by attribute."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return getattr(self, name)


def make_policy(seed: int = 0) -> ActorCritic:
    torch.manual_seed(seed)
    return ActorCritic(OBS, ACTIONS, hidden_dims=(32, 32))


def random_batch(size: int = 50, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return Batch(
        obs=randn(size, OBS),
        actions=randn(size, ACTIONS),
        values=randn(size),
        log_probs=randn(size) - 2,
        advantages=randn(size),
        returns=randn(size),
        mu=randn(size, ACTIONS),
        sigma=torch.rand(size, ACTIONS, generator=generator) + 0.5,
    )


def plain_gradients(policy: ActorCritic, batch: Batch, config: PPOConfig) -> list[torch.Tensor]:
    """PPO's gradients in float64 with torch.distributions, written as rsl_rl writes them."""
    policy = copy.deepcopy(policy).double()
    batch = Batch(**{name: x.double() for name, x in vars(batch).items()})
    actor = torch.nn.Sequential(*[torch.nn.Tanh() if i % 2 else layer for i, layer in enumerate(policy.actor)])
    critic = torch.nn.Sequential(*[torch.nn.Tanh() if i % 2 else layer for i, layer in enumerate(policy.critic)])
    normal = Normal(actor(batch.obs), policy.std_param)
    values = critic(batch.obs).squeeze(-1)
    ratio = torch.exp(normal.log_prob(batch.actions).sum(-1) - batch.log_probs)
    surrogate = torch.max(
        -batch.advantages * ratio, -batch.advantages * ratio.clamp(1 - config.clip, 1 + config.clip)
    ).mean()
    clipped = batch.values + (values - batch.values).clamp(-config.clip, config.clip)
    value = torch.max((values - batch.returns).pow(2), (clipped - batch.returns).pow(2)).mean()
    loss = surrogate + config.value_loss_coef * value - config.entropy_coef * normal.entropy().sum(-1).mean()
    loss.backward()
    return [p.grad.float() for p in policy.parameters()]


@pytest.mark.parametrize("learner", ["auto", "torch"])  # where the native library is, auto has no chunks
@pytest.mark.parametrize("chunk_size", [None, 1000, 50, 17, 1])
def test_gradients_are_those_of_plain_ppo_whatever_the_chunks(chunk_size, learner):
    policy, batch = make_policy(), random_batch()
    config = PPOConfig(chunk_size=chunk_size, value_loss_coef=0.7, entropy_coef=0.3, learner=learner)
    metrics = Learner(policy, config).compute_gradients(batch)
    for parameter, expected in zip(policy.parameters(), plain_gradients(policy, batch, config)):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=2e-6)
    assert metrics.shape == (4,) and metrics[2].item() == pytest.approx(2 * 1.4189385, rel=1e-6)


def test_a_step_clips_actor_and_critic_apart_from_each_other():
    """One plain SGD step of rate 1 moves each network by its own clipped gradient."""
    policy, batch = make_policy(), random_batch()
    batch.returns = batch.returns + 1000  # the critic's gradient is huge, the actor's is not
    config = PPOConfig(max_grad_norm=0.05, schedule="fixed")
    gradients = dict(zip([name for name, _ in policy.named_parameters()], plain_gradients(policy, batch, config)))
    learner = Learner(policy, config)
    before = copy.deepcopy(policy.state_dict())
    learner.optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    learner.step(batch)
    for names in (["std_param", *(n for n in before if n.startswith("actor"))], [n for n in before if "critic" in n]):
        norm = torch.cat([gradients[name].flatten() for name in names]).norm()
        assert norm > 0.05
        for name in names:
            moved = before[name] - policy.state_dict()[name]
            torch.testing.assert_close(moved, gradients[name] * (0.05 / norm), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("kl", "before", "after"),
    [
        (0.0201, 3e-4, 2e-4),  # above twice the desired one
        (0.0199, 3e-4, 3e-4),
        (0.0051, 3e-4, 3e-4),
        (0.0049, 3e-4, 4.5e-4),  # below half of it
        (0.0, 3e-4, 3e-4),  # nothing has been learnt yet
        (float("nan"), 3e-4, 3e-4),
        (1.0, 1.2e-5, 1e-5),  # the bounds
        (0.001, 9e-3, 1e-2),
        (1.0, 1e-6, 1e-6),  # outside of them: never against the direction
        (1.0, 0.05, 0.05 / 1.5),
        (1.0, 1e-5, 1e-5),
        (1e-4, 0.05, 0.05),
        (1e-4, 1e-6, 1.5e-6),
        (1e-4, 1e-2, 1e-2),
        (math.inf, 1e-6, 1e-6),
        (0.01, 1e-6, 1e-6),
    ],
)
def test_adaptive_learning_rate(kl, before, after):
    learner = Learner(make_policy(), PPOConfig(learning_rate=before))
    learner.adapt_learning_rate(torch.tensor(kl))
    assert learner.learning_rate.item() == pytest.approx(after)


def test_the_rate_changes_before_the_step_and_adam_follows_it():
    """Adam's first step moves a parameter by the learning rate: here by the one the KL has just set."""
    policy, batch = make_policy(), random_batch()
    learner = Learner(policy, PPOConfig(learning_rate=3e-4))
    before = policy.actor[4].bias.detach().clone()
    kl = learner.step(batch)[3]
    assert kl > 0.02
    moved = (policy.actor[4].bias - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-4), rtol=1e-2, atol=0)


def test_fixed_schedule_leaves_the_rate_alone():
    learner = Learner(make_policy(), PPOConfig(schedule="fixed"))
    learner.step(random_batch())
    assert learner.learning_rate.item() == pytest.approx(3e-4)


def test_state_dict_round_trip_goes_on_identically():
    first = Learner(make_policy())
    for seed in range(3):
        first.step(random_batch(seed=seed))
    second = Learner(make_policy(seed=9))
    second.policy.load_state_dict(first.policy.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.optimizer.param_groups[0]["lr"] is second.learning_rate
    for seed in range(3, 6):
        first.step(random_batch(seed=seed))
        second.step(random_batch(seed=seed))
    for name, x in first.policy.state_dict().items():
        assert torch.equal(x, second.policy.state_dict()[name]), name
    assert torch.equal(first.learning_rate, second.learning_rate)


def test_the_fixed_schedule_keeps_the_rate_it_is_given():
    first = Learner(make_policy(), PPOConfig(learning_rate=3e-4, schedule="fixed"))
    first.step(random_batch())
    for schedule, rate in (("fixed", 1e-3), ("adaptive", 3e-4)):
        second = Learner(make_policy(), PPOConfig(learning_rate=1e-3, schedule=schedule))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.learning_rate.item() == pytest.approx(rate), schedule
        assert second.optimizer.param_groups[0]["lr"] is second.learning_rate


def fill(buffer: RolloutBuffer, policy: ActorCritic, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    for _ in range(buffer.num_steps):
        obs = torch.randn(N, OBS)
        step = policy.act(obs)
        buffer.begin(
            obs=obs, actions=step.actions, values=step.values, log_probs=step.log_probs, mu=step.mean, sigma=step.std
        )
        buffer.end(rewards=torch.randn(N), dones=torch.rand(N) < 0.1)
    with torch.no_grad():
        return policy.value(torch.randn(N, OBS))


def make_buffer() -> RolloutBuffer:
    return RolloutBuffer(N, T, obs=OBS, actions=ACTIONS, fields={"mu": ACTIONS, "sigma": ACTIONS})


def test_update_learns_from_every_minibatch():
    policy, buffer = make_policy(), make_buffer()
    buffer.compute_gae(fill(buffer, policy))
    learner = Learner(policy, PPOConfig(num_epochs=3, num_minibatches=2))
    seen = []
    step = learner.step
    learner.step = lambda minibatch: (seen.append(minibatch.indices.clone()), step(minibatch))[1]
    metrics = learner.update(buffer)
    assert len(seen) == 6
    for epoch in range(3):
        both = torch.cat(seen[2 * epoch : 2 * epoch + 2])
        assert torch.equal(both.sort().values, torch.arange(N * T))
    assert set(metrics) == {"surrogate_loss", "value_loss", "entropy", "kl", "learning_rate"}
    assert all(x.shape == () and x.isfinite() for x in metrics.values())
    assert len(buffer) == T, "the rollout stays until clear()"


def test_first_minibatch_has_no_kl_and_a_ratio_of_one():
    policy, buffer = make_policy(), make_buffer()
    buffer.compute_gae(fill(buffer, policy))
    minibatch = next(iter(buffer.minibatches(num_minibatches=1)))
    surrogate, _, _, kl = Learner(policy).compute_gradients(minibatch).tolist()
    assert abs(kl) < 1e-6
    assert abs(surrogate) < 1e-5, "the mean of normalised advantages"


def test_update_is_repeatable():
    policies = []
    for _ in range(2):
        policy, buffer = make_policy(), make_buffer()
        buffer.compute_gae(fill(buffer, policy))
        Learner(policy).update(buffer)
        policies.append(policy.state_dict())
    assert all(torch.equal(x, policies[1][name]) for name, x in policies[0].items())


@pytest.mark.parametrize("learner", ["auto", "torch"])
@pytest.mark.parametrize("below", [-0.001, -5.0, 0.0, MIN_STD])
def test_below_its_floor_a_standard_deviation_has_the_gradient_of_the_floor(below, learner):
    # Every action is the mean, so log p = -log s + const, and the ratio is 1: d loss / ds = (A - entropy_coef) / s.
    policy, batch = make_policy(), random_batch()
    torch.nn.init.constant_(policy.std_param, below)
    with torch.no_grad():
        new = policy.evaluate(batch.obs, policy.mean(batch.obs))
    batch.actions, batch.log_probs, batch.advantages = new.mean, new.log_probs, torch.full((50,), 0.25)
    Learner(policy, PPOConfig(learner=learner, entropy_coef=1.0, chunk_size=17)).compute_gradients(batch)
    assert policy.std_param.grad.tolist() == pytest.approx([-0.75 / MIN_STD] * ACTIONS, rel=1e-4)


def punish_noise(policy: ActorCritic, learner: Learner) -> None:
    """An update that pays for actions near the mean, and for nothing else."""
    buffer = make_buffer()
    for _ in range(T):
        obs = torch.randn(N, OBS)
        step = learner.act(obs)
        noise = (step.actions - step.mean) / step.std
        ends = {"rewards": -noise.square().sum(1), "dones": torch.ones(N, dtype=torch.bool)}
        given = {"values": step.values, "log_probs": step.log_probs, **policy.stored(step)}
        buffer.append(obs=obs, actions=step.actions, **given, **ends)
    buffer.compute_gae(torch.zeros(N))
    learner.update(buffer)


@pytest.mark.parametrize("learner", ["auto", "torch"])
@pytest.mark.parametrize("schedule", ["adaptive", "fixed"])
def test_a_standard_deviation_below_its_floor_comes_back(schedule, learner):
    policy, config = make_policy(), PPOConfig(learner=learner, schedule=schedule, entropy_coef=1.0)
    policy.std_param.data.copy_(torch.tensor([-0.001, 0.5]))
    learning, buffer = Learner(policy, config), make_buffer()
    for seed in range(10):
        buffer.compute_gae(fill(buffer, policy, seed))
        learning.update(buffer)
        buffer.clear()
    assert policy.std[0] > 10 * MIN_STD


@pytest.mark.parametrize("learner", ["auto", "torch"])
def test_a_standard_deviation_that_fell_through_its_floor_by_itself_comes_back(learner):
    torch.manual_seed(0)
    policy = ActorCritic(OBS, ACTIONS, hidden_dims=(32, 32), init_std=0.05)
    learning = Learner(policy, PPOConfig(learner=learner, schedule="fixed", learning_rate=1e-2, entropy_coef=0.0))
    for _ in range(3):
        punish_noise(policy, learning)
    assert policy.std.tolist() == pytest.approx([MIN_STD] * ACTIONS)
    learning.config.entropy_coef = 1.0
    for _ in range(3):
        punish_noise(policy, learning)
    assert policy.std.min() > 100 * MIN_STD


class Record(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func._schema.name)
        return func(*args, **(kwargs or {}))


# They make tensors or look at them; none of them computes or copies an element.
BOOKKEEPING = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::detach", "aten::alias"),
    *("aten::view", "aten::_unsafe_view", "aten::as_strided", "aten::slice", "aten::select", "aten::narrow"),
    *("aten::t", "aten::transpose", "aten::permute", "aten::expand", "aten::squeeze", "aten::unsqueeze"),
}


native = pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason="the reference backend is plain PyTorch")


@native
def test_storage_gae_and_minibatches_run_no_tensor_op_of_torch():
    policy, buffer = make_policy(), make_buffer()
    obs = torch.randn(N, OBS)
    step = policy.act(obs)
    stored = {"obs": obs, "actions": step.actions, "values": step.values, "log_probs": step.log_probs}
    stored |= {"mu": step.mean, "sigma": step.std}
    ends = {"rewards": torch.randn(N), "dones": torch.rand(N) < 0.1, "truncated": torch.zeros(N, dtype=torch.bool)}
    last_values = torch.randn(N)
    with Record() as record:
        for t in range(T):
            if t % 2:
                buffer.append(**stored, **ends)
            else:
                buffer.begin(**stored)
                buffer.end(**ends)
        buffer.compute_gae(last_values, timeout_bootstrap="stored_value")
        minibatches = sum(1 for _ in buffer.minibatches(num_minibatches=4, num_epochs=5, reuse=True))
    kernels = [op for op in record.ops if op.startswith("pydrone::")]
    others = {op for op in record.ops if not op.startswith("pydrone::")}
    assert others <= BOOKKEEPING, others - BOOKKEEPING
    assert minibatches == 20
    if kernels:  # a backend that is registered with the dispatcher
        assert kernels.count("pydrone::append") == T // 2 + 2 * (T // 2)
        assert kernels.count("pydrone::gae") == 1 and kernels.count("pydrone::gather") == 20


@native
@pytest.mark.parametrize(("way", "operation"), [("torch", "aten::addmm"), ("auto", None)])
def test_update_reads_nothing_back_from_the_device(way, operation):
    """No .item(), no .tolist(), no bool() of a tensor: each would be a local_scalar_dense."""
    policy, buffer = make_policy(), make_buffer()
    buffer.compute_gae(fill(buffer, policy))
    learner = Learner(policy, PPOConfig(learner=way))
    operation = operation or ("pydrone::ppo_gradients" if learner.not_fused is None else "aten::addmm")
    # On the CPU the fused Adam itself reads the learning rate, which costs nothing there.
    learner.optimizer.step = lambda: None
    with Record() as record:
        learner.update(buffer)
    assert "aten::_local_scalar_dense" not in record.ops
    assert operation in record.ops, "the recorder saw nothing"


def test_matches_an_update_of_rsl_rl():
    """The same weights, the same two minibatches: rsl_rl's PPO moves them to the same place."""
    rsl_rl = pytest.importorskip("rsl_rl.algorithms")
    models = pytest.importorskip("rsl_rl.models")
    storage = pytest.importorskip("rsl_rl.storage")
    from tensordict import TensorDict

    policy, batches = make_policy(), [random_batch(seed=seed) for seed in range(2)]
    obs = TensorDict({"policy": torch.zeros(50, OBS)}, batch_size=[50])
    groups = {"actor": ["policy"], "critic": ["policy"]}
    kwargs = {"hidden_dims": [32, 32], "activation": "tanh"}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"}
    actor = models.MLPModel(obs, groups, "actor", ACTIONS, distribution_cfg=gaussian, **kwargs)
    critic = models.MLPModel(obs, groups, "critic", 1, **kwargs)
    actor.mlp.load_state_dict(policy.actor.state_dict())
    critic.mlp.load_state_dict(policy.critic.state_dict())
    their_storage = storage.RolloutStorage("rl", 50, 2, obs, [ACTIONS], "cpu")
    theirs = rsl_rl.PPO(
        actor, critic, their_storage, num_learning_epochs=1, num_mini_batches=2, learning_rate=3e-4, entropy_coef=0.004
    )
    their_storage.mini_batch_generator = lambda *_: iter(
        storage.RolloutStorage.Batch(
            observations=TensorDict({"policy": batch.obs}, batch_size=[50]),
            actions=batch.actions,
            values=batch.values[:, None],
            advantages=batch.advantages[:, None],
            returns=batch.returns[:, None],
            old_actions_log_prob=batch.log_probs[:, None],
            old_distribution_params=(batch.mu, batch.sigma),
        )
        for batch in batches
    )
    losses = theirs.update()
    ours = Learner(policy, PPOConfig(chunk_size=20))
    metrics = torch.stack([ours.step(batch) for batch in batches]).mean(0)
    assert metrics[0].item() == pytest.approx(losses["surrogate"], rel=1e-4)
    assert metrics[1].item() == pytest.approx(losses["value"], rel=1e-4)
    assert metrics[2].item() == pytest.approx(losses["entropy"], rel=1e-5)
    assert ours.learning_rate.item() == pytest.approx(theirs.learning_rate, rel=1e-5)
    for ours_, theirs_ in ((policy.actor, actor.mlp), (policy.critic, critic.mlp)):
        for name, x in theirs_.state_dict().items():
            torch.testing.assert_close(ours_.state_dict()[name], x, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(policy.std_param, actor.distribution.std_param, rtol=1e-5, atol=1e-6)


def test_the_learner_is_not_imported_with_the_buffer():
    """An embedder of the buffer gets no training code."""
    code = "import pydrone.buffer, sys; print([m for m in sys.modules if m.startswith('pydrone.ppo')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
