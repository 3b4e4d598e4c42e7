"""The kernels of the learner and of the environment's step, each beside the torch code that it replaces.

Networks have two hidden layers of 128 unless said otherwise. Rollouts are random: the policy that learns is not quite
the one that acted, so that ratios and values lie on both sides of their clips.
"""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import torch
from measurement import Absent, Graphed, Run
from torch import Tensor
from workload import NUM_ACTIONS, NUM_MINIBATCHES, NUM_OBS

from pydrone.buffer import RolloutBuffer
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ops import native, triton
from pydrone.ops.schema import ACTIVATIONS, LEARNER_SCHEMAS, PPO_SCHEMAS, layer_workspace_size
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner import adam
from pydrone.ppo.learner.acting import Acting
from pydrone.ppo.learner.learner import LEARNING_RATE_BOUNDS, LEARNING_RATE_FACTOR, ZERO_KL, Learner
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.distributions import gaussian_log_prob
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.matmul import chosen
from pydrone.ppo.training import graphs

from .train import Setting

# Isaac Lab's and mjlab's networks.
WIDE = {"hidden_dims": (512, 256, 128), "activation": "elu"}
# Allowed error by the products' precision, relative to the largest number; docs/learner.md has what was measured.
BOUNDS = {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 0.15}

_registered: list[torch.library.Library] = []


def interpret() -> None:
    """From now on Triton's kernels, interpreted, compute the learner's operations on the CPU."""
    if _registered:
        return
    _registered.append(torch.library.Library("pydrone", "IMPL"))
    for name in (*PPO_SCHEMAS, *LEARNER_SCHEMAS):
        _registered[0].impl(name, native._triton(name), "CPU", allow_override=True)


def _scaled(widths: tuple[int, ...]) -> tuple[int, ...]:
    """``widths``, or small ones where kernels are interpreted, which takes long."""
    return tuple(max(8, width // 32) for width in widths) if triton.interpreted() else widths


class Agreement:
    """Stands in for the Truth: each contender brings what its own inputs must give, in float64."""

    def check(self, outputs: dict[str, Any]) -> None:
        """``pairs``: (name, found, wanted, bound); the bound is relative to the largest number wanted, or 1 if less."""
        for name, found, wanted, bound in outputs.get("pairs", ()):
            assert found.shape == wanted.shape, f"{name} has shape {list(found.shape)}, expected {list(wanted.shape)}"
            error = (found.double() - wanted.double()).abs().max()
            allowed = bound * wanted.double().abs().max().clamp_min(1)
            assert error <= allowed, f"{name} is off by {float(error):.3g}, allowed are {float(allowed):.3g}"


class Filled:
    """A learner and a buffer that holds a rollout with its advantages."""

    def __init__(self, setting: Setting, **ppo: Any) -> None:
        torch.manual_seed(1)
        config = PPOConfig(num_minibatches=NUM_MINIBATCHES, **ppo)
        self.setting, self.config = setting, dataclasses.replace(config, hidden_dims=_scaled(config.hidden_dims))
        self.device, (num_envs, num_steps) = torch.device(setting.device), setting.size
        policy = make_policy(NUM_OBS, NUM_ACTIONS, self.config).to(self.device)
        self.learner = Learner(policy, self.config)
        sizes = {"obs": NUM_OBS, "actions": NUM_ACTIONS, "fields": policy.fields(), "final_obs_rows": 0}
        self.buffer = RolloutBuffer(num_envs, num_steps, **sizes, device=self.device)
        self.obs = torch.randn(num_steps, num_envs, NUM_OBS, device=self.device)
        self.rewards = torch.randn(num_steps, num_envs, device=self.device)
        self.dones = torch.rand(num_steps, num_envs, device=self.device) < 0.02
        self.bound = BOUNDS[chosen(self.config.matmul, self.device)]

    @property
    def policy(self) -> ActorCritic:
        return self.learner.policy

    def fill(self) -> None:
        with torch.no_grad():
            for obs, rewards, dones in zip(self.obs, self.rewards, self.dones):
                step = self.policy.act(obs)
                row = {"obs": obs, "actions": step.actions, "values": step.values, "log_probs": step.log_probs}
                self.buffer.append(**row, **self.policy.stored(step), rewards=rewards, dones=dones)
            self.buffer.compute_gae(self.policy.value(self.obs[0]))
            for x in self.policy.parameters():
                x.add_(torch.randn_like(x), alpha=0.02)

    def in_float64(self) -> Learner:
        """A learner with the same weights, in float64, whose gradients autograd computes."""
        config = dataclasses.replace(self.config, learner="torch", matmul="float32", autocast=False)
        return Learner(copy.deepcopy(self.policy).double(), config)

    def require_kernel(self) -> None:
        """Raises Absent, with the reason, where no kernel serves these networks in this precision."""
        if self.learner.not_fused is not None:
            raise Absent(self.learner.not_fused)


class _Samples(SimpleNamespace):
    """A minibatch's tensors in float64."""

    def __getitem__(self, name: str) -> Tensor:
        return getattr(self, name)


def _doubled(minibatch: Any) -> _Samples:
    own, fields = ("obs", "actions", "values", "log_probs", "advantages", "returns"), ("mu", "sigma")
    found = {name: getattr(minibatch, name) for name in own} | {name: minibatch[name] for name in fields}
    return _Samples(**{name: x.double() for name, x in found.items()})


def _flat(parameters: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in parameters])


def _minibatch(setting: Setting, served: bool, **ppo: Any) -> tuple[Filled, Any, Any]:
    """A filled buffer, its first minibatch, and what must be kept alive for it."""
    made = Filled(setting, **ppo)
    if served:
        made.require_kernel()
    made.fill()
    drawn = iter(made.learner._minibatches(made.buffer))
    return made, next(drawn), drawn


def gradients(setting: Setting, served: bool = True, **ppo: Any) -> Run:
    """``Learner.compute_gradients`` of a quarter of the rollout. ``served``: absent where no kernel serves it."""
    made, minibatch, kept = _minibatch(setting, served, **ppo)
    learner = made.learner

    def call() -> object:
        return learner.compute_gradients(minibatch), kept

    def outputs() -> dict[str, Any]:
        exact = made.in_float64()
        metrics = learner.compute_gradients(minibatch)
        pairs = [("metrics", metrics, exact.compute_gradients(_doubled(minibatch)), made.bound)]
        for name in ("actor", "critic"):
            ours, theirs = (
                _flat([p.grad.double() for p in getattr(x.policy, name).parameters()]) for x in (learner, exact)
            )
            # To scale: the norm of the difference is bounded.
            norm = theirs.norm()
            pairs.append((f"{name}'s gradient", (ours - theirs).norm() / norm, torch.zeros_like(norm), made.bound))
        std, exact_std = learner.policy.std_param.grad, exact.policy.std_param.grad
        pairs.append(("std's gradient", std, exact_std, made.bound))
        return {"pairs": pairs}

    return Run(call, outputs)


def minibatch(setting: Setting, served: bool = True, **ppo: Any) -> Run:
    """``Learner.step``: gradients, clipping, Adam, learning rate."""
    made, drawn, kept = _minibatch(setting, served, **ppo)
    learner = made.learner

    def call() -> object:
        return learner.step(drawn), kept

    def outputs() -> dict[str, Any]:
        exact = made.in_float64()
        wanted = exact.compute_gradients(_doubled(drawn))
        before = _flat(list(learner.policy.parameters())).clone()
        pairs = [("metrics", learner.step(drawn), wanted, made.bound)]
        after = _flat(list(learner.policy.parameters()))
        assert after.isfinite().all() and not torch.equal(before, after), "the parameters did not move"
        return {"pairs": pairs}

    return Run(call, outputs)


def clipped_adam(setting: Setting, by_torch: bool = False) -> Run:
    """Clipping, the adaptive learning rate and Adam; by torch: ``clip_grad_norm_`` for each network, fused Adam."""
    learner = Filled(Setting(setting.size._replace(num_envs=1, num_steps=1), setting.device)).learner
    policy, optimizer, config = learner.policy, learner.optimizer, learner.config
    for x in policy.parameters():
        x.grad = torch.randn_like(x)
    groups = policy.actor_parameters(), policy.critic_parameters()
    kl = torch.full((), config.desired_kl, device=setting.device)  # the rate stays
    schedule = (config.desired_kl, ZERO_KL, LEARNING_RATE_FACTOR, *LEARNING_RATE_BOUNDS)
    reason = adam.why_not(optimizer, groups)
    if reason is not None and not by_torch:
        raise Absent(reason)

    def theirs() -> None:
        learner.adapt_learning_rate(kl)
        for parameters in groups:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm, foreach=True)
        optimizer.step()

    def ours() -> None:
        adam.step(optimizer, groups, config.max_grad_norm, kl, schedule)

    call = theirs if by_torch else ours

    def captured() -> None:
        with graphs.capturable(learner):
            call()

    call()  # makes Adam's state

    def outputs() -> dict[str, Any]:
        state = {x: {name: y.double() for name, y in optimizer.state[x].items()} for g in groups for x in g}
        wanted, rate = [], float(learner.learning_rate)
        (beta1, beta2), epsilon = optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]
        for group in groups:
            norm = torch.stack([x.grad.double().norm() for x in group]).norm()
            for x in group:
                grad = x.grad.double() * min(1.0, config.max_grad_norm / (float(norm) + 1e-6))
                m = beta1 * state[x]["exp_avg"] + (1 - beta1) * grad
                v = beta2 * state[x]["exp_avg_sq"] + (1 - beta2) * grad.square()
                steps = state[x]["step"] + 1
                m, v = m / (1 - beta1**steps), v / (1 - beta2**steps)
                wanted.append(x.double() - rate * m / (v.sqrt() + epsilon))
        call()
        found = _flat([x.detach() for g in groups for x in g])
        return {"pairs": [("parameters", found, _flat(wanted), 1e-6)]}

    return Run(call, outputs, graph=Graphed(captured))


def _acted(made: Filled, obs: Tensor, actions: Tensor, log_probs: Tensor, values: Tensor, mean: Tensor) -> list[tuple]:
    """What a policy did, against float64; the log-probabilities are those of the actions that it drew."""
    exact = copy.deepcopy(made.policy).double()
    with torch.no_grad():
        bounded = [
            ("mean", mean, exact.mean(obs.double()), made.bound),
            ("values", values, exact.value(obs.double()), made.bound),
        ]
        wanted = gaussian_log_prob(actions.double(), mean.double(), made.policy.std.double())
    return [*bounded, ("log_probs", log_probs, wanted, 1e-4)]


def act(setting: Setting, by_torch: bool = False, **ppo: Any) -> Run:
    """``Learner.act`` on the observations of one step; by torch: ``policy.act``."""
    made = Filled(Setting(setting.size._replace(num_steps=1), setting.device), **ppo)
    if not by_torch:
        made.require_kernel()
    obs, operation = made.obs[0], made.policy.act if by_torch else made.learner.act

    def call() -> object:
        with torch.no_grad():
            return operation(obs)

    def outputs() -> dict[str, Any]:
        x = call()
        return {"pairs": _acted(made, obs, x.actions, x.log_probs, x.values, x.mean)}

    return Run(call, outputs)


def act_and_store(setting: Setting, by_torch: bool = False, **ppo: Any) -> Run:
    """T steps of acting and storing, as a rollout makes them; by torch: ``policy.act``, ``begin`` and ``end``."""
    made = Filled(setting, **ppo)
    if not by_torch:
        made.require_kernel()
    buffer, learner = made.buffer, made.learner
    ends = [{"rewards": rewards, "dones": dones} for rewards, dones in zip(made.rewards, made.dones)]

    def collect() -> None:
        with torch.no_grad():
            acting = Acting(made.policy, buffer, lambda stage: None) if by_torch else learner.acting(buffer)
            for t, obs in enumerate(made.obs):
                acting(obs, ends[t - 1] if t else None)
            buffer.end(**ends[-1])

    def call() -> None:
        buffer.clear()
        collect()

    def outputs() -> dict[str, Any]:
        call()
        for name, given in (("obs", made.obs), ("rewards", made.rewards), ("dones", made.dones)):
            stored = getattr(buffer, name).transpose(0, 1)
            assert torch.equal(stored.to(given.dtype), given), f"{name} differs from what was stored"
        acted = buffer.actions, buffer.log_probs, buffer.values, buffer["mu"]
        return {"pairs": _acted(made, made.obs.flatten(0, 1), *(x.transpose(0, 1).flatten(0, 1) for x in acted))}

    def advance() -> None:
        if len(buffer):
            buffer.clear()
        buffer.advance(setting.size.num_steps, rollouts=1)

    def captured() -> None:
        with buffer.as_captured():
            collect()
            buffer.clear()

    return Run(call, outputs, graph=Graphed(captured, advance, buffer.check))


def environment(setting: Setting, fused: bool = True) -> Run:
    """A step of the quadrotor with its hover task."""
    wanted = (True if triton.interpreted() else None) if fused else False

    def made(how: bool | None) -> Quadrotor:
        env = Quadrotor(setting.size.num_envs, setting.device, seed=1, fused=how)
        env.reset()
        return env

    env = made(wanted)
    if fused and env.task.not_fused is not None:
        raise Absent(env.task.not_fused)
    actions = torch.randn(setting.size.num_envs, NUM_ACTIONS, device=setting.device)

    def call() -> object:
        return env.step(actions)

    def outputs() -> dict[str, Any]:
        ours, theirs, pairs = made(wanted), made(False), []
        for _ in range(3):
            x, y = ours.step(actions), theirs.step(actions)
            assert torch.equal(x.dones, y.dones), "other episodes end"
            pairs += [(name, getattr(x, name).clone(), getattr(y, name).clone(), 1e-4) for name in ("obs", "rewards")]
        return {"pairs": pairs}

    return Run(call, outputs, graph=Graphed(call, generators=(env.generator,)))


class _Layers:
    """What is between the products of WIDE's layers, for a quarter of the rollout."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(1)
        rows, where = -(-setting.size.samples // NUM_MINIBATCHES), {"device": setting.device}
        widths = _scaled(WIDE["hidden_dims"])
        self.index = ACTIVATIONS.index(WIDE["activation"])
        self.x = [torch.randn(rows, width, **where) for width in widths]
        self.bias = [torch.randn(width, **where) for width in widths]
        self.grad = [torch.randn(rows, width, **where) for width in widths]
        self.out = [torch.empty_like(x) for x in self.x]
        self.bias_grad = [torch.empty_like(x) for x in self.bias]
        most = max(layer_workspace_size(rows, width) for width in widths)
        self.workspace = torch.zeros(most, dtype=torch.float64, **where)

    def exact(self, x: Tensor, bias: Tensor) -> Tensor:
        return torch.nn.functional.elu(x.double() + bias.double())


def layer_forward(setting: Setting, by_torch: bool = False) -> Run:
    """Bias and ELU of the three layers; by torch: an addition and an ELU, both in place."""
    made = _Layers(setting)

    def run(x: Tensor, bias: Tensor) -> None:
        if by_torch:
            torch.nn.functional.elu(x.add_(bias), inplace=True)
        else:
            torch.ops.pydrone.activate(x, bias, made.index, None)

    def call() -> None:
        for x, bias in zip(made.x, made.bias):
            run(x, bias)

    def outputs() -> dict[str, Any]:
        pairs = []
        for x, bias in zip(made.x, made.bias):
            x.normal_()
            wanted = made.exact(x, bias)
            run(x, bias)
            pairs.append((f"layer of {len(bias)}", x, wanted, 1e-5))
        return {"pairs": pairs}

    return Run(call, outputs)


def layer_backward(setting: Setting, by_torch: bool = False) -> Run:
    """ELU's derivative and the bias gradient of the three layers; by torch: as autograd computes both."""
    made = _Layers(setting)
    kept = [torch.nn.functional.elu(x + bias) for x, bias in zip(made.x, made.bias)]

    def run(i: int) -> None:
        grad, out, bias_grad = made.grad[i], made.out[i], made.bias_grad[i]
        if by_torch:
            torch.ops.aten.elu_backward.grad_input(grad, 1.0, 1.0, 1.0, True, kept[i], grad_input=out)
            torch.sum(out, 0, out=bias_grad)
        else:
            torch.ops.pydrone.activate_backward(grad, kept[i], made.index, out, bias_grad, made.workspace)

    def call() -> None:
        for i in range(len(kept)):
            run(i)

    def outputs() -> dict[str, Any]:
        pairs = []
        for x in (*made.out, *made.bias_grad):
            x.fill_(float("nan"))
        call()
        for i, y in enumerate(kept):
            wanted = made.grad[i].double() * torch.where(y > 0, 1.0, y.double() + 1)
            width, total = y.shape[1], wanted.sum(0)
            pairs += [(f"gradient, {width}", made.out[i], wanted, 1e-5)]
            pairs += [(f"bias gradient, {width}", made.bias_grad[i], total, 1e-4)]
        return {"pairs": pairs}

    return Run(call, outputs)
