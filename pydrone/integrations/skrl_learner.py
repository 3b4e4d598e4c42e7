"""The update of skrl's PPO agent on the fused learner, for policies and values that are multilayer perceptrons.

>>> from pydrone.integrations import skrl
>>> skrl.patch()  # replaces the method of skrl.agents.torch.ppo.PPO, or
>>> agent = skrl.PPO(...)  # explicitly
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from pydrone.integrations.peer import require
from pydrone.ops.schema import ACTIVATIONS
from pydrone.ppo.learner.adam import step, why_not
from pydrone.ppo.learner.networks import Unsupported
from pydrone.ppo.learner.prepared import FusedUpdate

require("skrl", (2, 1), (2, 2))

from skrl import config  # noqa: E402
from skrl.agents.torch.ppo import ppo  # noqa: E402
from skrl.models import torch as models  # noqa: E402
from skrl.resources.schedulers.torch import KLAdaptiveLR  # noqa: E402

log = logging.getLogger("pydrone.integrations.skrl")

TENSORS = ["observations", "states", "actions", "log_prob", "values", "returns", "advantages"]
# How many samples are compared before an update: all that the models compute, and its gradients.
COMPARED, FEW = 1024, 16
# A trunk of both networks is computed twice: with more parameters than these, skrl's update is as fast.
SHARED = 40_000

# skrl's policies that are served, and the prefix of their options.
POLICIES = {
    models.GaussianMixin: "_g",
    models.MultivariateGaussianMixin: "_mg",
    models.CategoricalMixin: "_c",
    models.MultiCategoricalMixin: "_mc",
}

their_update = ppo.PPO.update


@functools.cache  # once a process
def _tell(reason: str) -> None:
    log.warning("skrl's own PPO update runs, not the fused one: %s", reason)


class _Calls:
    """The layers that are called, with their inputs and outputs."""

    def __enter__(self) -> _Calls:
        self._made: list[tuple[nn.Module, Any, Any]] = []
        self._handle = nn.modules.module.register_module_forward_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _note(self, layer: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if not layer._modules:
            self._made.append((layer, given[0] if given else None, made))

    def network(self, output: Tensor) -> tuple[nn.Sequential, Tensor]:
        """The layers that made ``output``, nothing between them, and the input of the first."""
        layers: list[nn.Module] = []
        for layer, given, made in reversed(self._made):
            if made is output:
                if made._version:
                    raise Unsupported("a layer's output is changed in place")
                layers.insert(0, layer)
                output = given
        return nn.Sequential(*layers), output


class _Models:
    """The agent's models taken apart, and compared with skrl's own computation.

    Raises Unsupported where :class:`FusedUpdate` would compute anything else than skrl; nothing has changed then.
    """

    def __init__(self, agent: ppo.PPO) -> None:
        self._policy, self._value = policy, value = agent.policy, agent.value
        self.parameters = list(dict.fromkeys(x for model in (policy, value) for x in model.parameters()))
        self._check_agent(agent)
        self._prefix = self._check_models()
        tensors, count = agent.memory.tensors_view, min(len(agent.memory), COMPARED)
        obs, states, actions = (None if x is None else x[:count] for x in map(tensors.get, TENSORS[:3]))
        inputs = {
            "observations": agent._observation_preprocessor(obs),
            "states": agent._state_preprocessor(states),
            "taken_actions": actions,
        }
        kept = [(vars(model), dict(vars(model))) for model in {policy, value}]
        try:
            with torch.random.fork_rng([agent.device] if agent.device.type == "cuda" else []), torch.enable_grad():
                self._compare(inputs)
        finally:
            for attributes, before in kept:  # what a trunk of both hands on
                attributes.clear()
                attributes.update(before)
        cfg, of_critic = agent.cfg, {id(x) for x in self.critic.parameters()}
        shared = sum(x.numel() for x in self.actor.parameters() if id(x) in of_critic)
        if shared > SHARED:
            raise Unsupported(f"policy and value share a trunk of more than {SHARED} parameters")
        self.update = FusedUpdate(
            self.actor,
            self.critic,
            clip=cfg.ratio_clip,
            value_clip=cfg.value_clip if cfg.value_clip > 0 else None,
            value_max=False,
            value_loss_coef=cfg.value_loss_scale,
            entropy_coef=cfg.entropy_loss_scale,
            categories=self.categories,
            reuse=not shared,  # the gradients of both are added
        )

    def _check_agent(self, agent: ppo.PPO) -> None:
        if config.torch.is_distributed:
            raise Unsupported("several processes train")
        if agent.cfg.mixed_precision or agent.scaler.is_enabled():
            raise Unsupported("mixed_precision is on")
        given = [x for model in {self._policy, self._value} for x in model.parameters()]
        if reason := why_not(agent.optimizer, [given]):
            raise Unsupported(f"optimizer: {reason}")
        if {*map(id, given)} != {*map(id, agent.optimizer.param_groups[0]["params"])}:
            raise Unsupported("optimizer: expected the models' parameters and no others")
        if agent._tensors_names != TENSORS:
            raise Unsupported(f"expected samples of {', '.join(TENSORS)}, got {', '.join(agent._tensors_names)}")

    def _check_models(self) -> str:
        policy, value = self._policy, self._value
        kinds = [x for x in POLICIES if isinstance(policy, x)]
        if len(kinds) != 1 or not isinstance(value, models.DeterministicMixin):
            raise Unsupported(f"expected a policy and a value of skrl, got {_name(policy)} and {_name(value)}")
        (kind,), prefix = kinds, POLICIES[kinds[0]]
        acts = policy is value or (type(policy).act is kind.act and type(value).act is models.DeterministicMixin.act)
        if not acts or type(policy).get_entropy is not kind.get_entropy:
            raise Unsupported(f"{_name(policy)} or {_name(value)} has an act or a get_entropy of its own")
        if getattr(policy, f"{prefix}_clip_mean_actions", False):
            raise Unsupported("clip_mean_actions is on")
        if not getattr(policy, f"{prefix}_unnormalized_log_prob", True):
            raise Unsupported("the policy's outputs are probabilities")
        for model in (policy, value):
            # They may have a state, which the comparison would advance.
            if next(model.buffers(), None) is not None:
                raise Unsupported(f"{_name(model)} has buffers")
            for x in model.modules():
                if not x._modules and type(x) is not nn.Linear and _name(x).lower() not in ACTIVATIONS:
                    raise Unsupported(f"{_name(model)} has a layer {_name(x)}")
                if x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or x._backward_pre_hooks:
                    raise Unsupported(f"{_name(model)} has hooks, which would not be called")
        return prefix

    def _compare(self, inputs: dict[str, Any]) -> None:
        few = {name: x if x is None else x[:FEW] for name, x in inputs.items()}
        self._take_apart(few)
        theirs, ours = self._theirs(few), self._ours(few)
        same = all(map(self._same_gradient, ours, theirs))
        with torch.no_grad():
            same = same and all(map(_close, self._ours(inputs), self._theirs(inputs)))
        if not same:
            raise Unsupported("the models compute something else than their layers and their distribution")

    def _take_apart(self, inputs: dict[str, Any]) -> None:
        """Sets actor, critic, the names of their inputs, log_std and categories."""
        with _Calls() as calls:
            # The value first, as in skrl's update: after the policy it may take over the output of their trunk.
            values, _ = self._value.compute(inputs, "value")
            outputs, more = self._policy.compute(inputs, "policy")
        (self.actor, *seen), (self.critic, *critic_seen) = map(calls.network, (outputs, values))
        names = [next((name for name in TENSORS[:2] if _same(x, inputs[name])), None) for x in (*seen, *critic_seen)]
        if None in names:
            raise Unsupported("the models compute something before, between or after their layers")
        self.seen, self.critic_seen = names
        self.log_std, self.categories = more.get("log_std"), []
        if self._prefix in ("_g", "_mg"):
            if type(self.log_std) is not nn.Parameter or self.log_std.shape != outputs.shape[1:]:
                raise Unsupported("expected a parameter log_std with one number for each action")
            bounds = [getattr(self._policy, f"{self._prefix}_{x}_log_std") for x in ("clip", "min", "max")]
            self.bounds = bounds[1:] if bounds[0] else (-torch.inf, torch.inf)
        else:
            space = self._policy.action_space
            self.categories = [outputs.shape[1]] if self._prefix == "_c" else space.nvec.tolist()

    def _theirs(self, inputs: dict[str, Any]) -> list[Tensor]:
        _, outputs = self._policy.act(inputs, role="policy")
        entropy = self._policy.get_entropy(role="policy")
        return [outputs["log_prob"], entropy, self._value.act(inputs, role="value")[0]]

    def _ours(self, inputs: dict[str, Any]) -> list[Tensor]:
        outputs, actions = self.actor(inputs[self.seen]), inputs["taken_actions"]
        if self.categories:
            heads = [Categorical(logits=x) for x in outputs.split(self.categories, 1)]
            found = [torch.stack([x.log_prob(a) for x, a in zip(heads, actions.unbind(1), strict=True)], 1)]
            found += [torch.stack([x.entropy() for x in heads], 1)]
        else:
            normal = Normal(outputs, self.log_std.clamp(*self.bounds).exp())
            found = [normal.log_prob(actions), normal.entropy()]
        return [*(x.sum(1, keepdim=True) for x in found), self.critic(inputs[self.critic_seen])]

    def _same_gradient(self, x: Tensor, y: Tensor) -> bool:
        """Compared as a whole: within a parameter, the samples' gradients may cancel out."""
        if not (x.requires_grad and y.requires_grad):
            return x.requires_grad == y.requires_grad
        wanted, options = [p for p in self.parameters if p.requires_grad], {"allow_unused": True}
        options |= {"materialize_grads": True, "retain_graph": True}
        found = (torch.autograd.grad(z.square().sum(), wanted, **options) for z in (x, y))
        return _close(*(torch.cat([grad.flatten() for grad in grads]) for grads in found), 1e-4)

    def gradients(self, inputs: dict[str, Any], **samples: Tensor) -> tuple[Tensor, Tensor | None]:
        """Writes the gradients of a minibatch; returns METRICS and the standard deviation."""
        for x in self.parameters:
            x.grad = None
        std = None
        if not self.categories:
            held = self.log_std.detach().clamp(*self.bounds)
            std = held.exp().requires_grad_(self.log_std.requires_grad)
        critic_obs = None if self.seen == self.critic_seen else inputs[self.critic_seen]
        samples = {name: x if name == "actions" else x.squeeze(1) for name, x in samples.items()}
        metrics = self.update(std, obs=inputs[self.seen], critic_obs=critic_obs, **samples)
        if std is not None and std.requires_grad:
            # As torch's clamp has it: no gradient outside its bounds.
            self.log_std.grad = std.grad * std.detach() * (held == self.log_std)
        return metrics, std

    def draw(self, samples: Tensor) -> None:
        """Takes as many random numbers as skrl's policy, which draws actions that are not used."""
        options = {"device": samples.device}
        for x in self.categories or [-len(self.log_std)]:
            numbers = torch.empty(len(samples), abs(x), **options)
            numbers.exponential_() if x > 0 else numbers.normal_()


def update(self: ppo.PPO, *, timestep: int, timesteps: int) -> None:
    """``PPO.update`` with the gradients of each minibatch by one operation, and clipping and Adam by another.

    Everything else is as in skrl, whose own update runs where the models or the options are not supported: a warning
    tells the reason, once a process.
    """
    try:
        networks = _Models(self)
    except Exception as reason:  # skrl's own update raises what is a user's mistake
        _tell(str(reason) if isinstance(reason, Unsupported) else f"{type(reason).__name__}: {reason}")
        return their_update(self, timestep=timestep, timesteps=timesteps)
    cfg, memory = self.cfg, self.memory
    _estimate(self)
    # Where the minibatches are skrl's, so are the random numbers.
    draws = getattr(memory, "_shuffle", "skrl") == "skrl"
    max_norm = cfg.grad_norm_clip if cfg.grad_norm_clip > 0 else None
    taken, std = [], None
    for epoch in range(cfg.learning_epochs):
        divergences = []
        for samples in memory.sample(names=TENSORS, batch_size=len(memory), mini_batches=cfg.mini_batches):
            observations, states, actions, log_probs, values, returns, advantages = samples
            inputs = {
                "observations": self._observation_preprocessor(observations, train=not epoch),
                "states": self._state_preprocessor(states, train=not epoch),
            }
            if draws:
                networks.draw(actions)
            metrics, std = networks.gradients(
                inputs, actions=actions, log_probs=log_probs, values=values, returns=returns, advantages=advantages
            )
            divergence = metrics[4]
            divergences.append(divergence)
            if cfg.kl_threshold and divergence > cfg.kl_threshold:
                break
            step(self.optimizer, [networks.parameters], max_norm)
            taken.append(metrics)
        if isinstance(self.scheduler, KLAdaptiveLR):
            self.scheduler.step(torch.stack(divergences).mean().item())
        elif self.scheduler:
            self.scheduler.step()
    _track(self, torch.stack(taken).sum(0).tolist() if taken else [0.0] * 6, std)


@torch.no_grad()
def _estimate(agent: ppo.PPO) -> None:
    """Returns and advantages into the memory, as in skrl."""
    inputs = {
        "observations": agent._observation_preprocessor(agent._current_next_observations),
        "states": agent._state_preprocessor(agent._current_next_states),
    }
    agent.value.enable_training_mode(False)
    last_values, _ = agent.value.act(inputs, role="value")
    agent.value.enable_training_mode(True)
    names = ("rewards", "terminated", "truncated", "values")
    given = {name: agent.memory.get_tensor_by_name(name) for name in names}
    returns, advantages = ppo.compute_gae(
        **given,
        last_values=agent._value_preprocessor(last_values, inverse=True),
        discount_factor=agent.cfg.discount_factor,
        lambda_coefficient=agent.cfg.gae_lambda,
        time_limit_bootstrap=agent.cfg.time_limit_bootstrap,
    )
    for name, x in (("values", given["values"]), ("returns", returns)):
        agent.memory.set_tensor_by_name(name, agent._value_preprocessor(x, train=True))
    agent.memory.set_tensor_by_name("advantages", advantages)


def _track(agent: ppo.PPO, sums: list[float], std: Tensor | None) -> None:
    cfg = agent.cfg
    count = cfg.learning_epochs * cfg.mini_batches
    agent.track_data("Loss / Policy loss", sums[0] / count)
    agent.track_data("Loss / Value loss", cfg.value_loss_scale * sums[1] / count)
    if cfg.entropy_loss_scale:
        agent.track_data("Loss / Entropy loss", -cfg.entropy_loss_scale * sums[2] / count)
    # torch's Categorical has no standard deviation either.
    agent.track_data("Policy / Standard deviation", torch.nan if std is None else std.mean().item())
    if agent.scheduler:
        agent.track_data("Learning / Learning rate", agent.scheduler.get_last_lr()[0])


class PPO(ppo.PPO):
    """skrl's agent with :func:`update`; its arguments and checkpoints."""

    update = update


def _name(x: object) -> str:
    return type(x).__name__


def _same(x: Tensor, y: Tensor | None) -> bool:
    """Whether they are the same memory, seen in the same way."""
    return y is not None and (x.data_ptr(), x.shape, x.stride(), x.dtype) == (
        y.data_ptr(),
        y.shape,
        y.stride(),
        y.dtype,
    )


def _close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> bool:
    return x.shape == y.shape and bool((x - y).abs().amax() <= tolerance * y.abs().amax())
