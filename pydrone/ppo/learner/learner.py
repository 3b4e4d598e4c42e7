"""The learner: updates a policy from a rollout.

It waits for the device only with ``max_kl`` and with recurrent policies, once per minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pydrone.ppo.config import PPOConfig
from pydrone.ppo.distributed import ALONE, MeanGradients, Ranks
from pydrone.ppo.learner import adam, fused, fused_loss
from pydrone.ppo.learner.acting import ActAndStore, Acting, FusedActing
from pydrone.ppo.learner.loss import surrogate_loss, value_loss
from pydrone.ppo.policy import matmul as precision
from pydrone.ppo.policy.actor_critic import ActorCritic, PolicyStep
from pydrone.ppo.policy.recurrent import sequence_batches
from pydrone.rollout.minibatch import Minibatch
from pydrone.rollout.sequences import Sequences

if TYPE_CHECKING:
    from pydrone.buffer import RolloutBuffer

# rsl_rl's adaptive schedule.
LEARNING_RATE_BOUNDS = (1e-5, 1e-2)
LEARNING_RATE_FACTOR = 1.5
# What rounding in float32 makes of the KL of two equal policies, at most.
ZERO_KL = 1e-6

# Activations of 128 units then take 1.6 MB, which fits a core's cache. Much larger ones the allocator returns to the
# system, and each pass pays for the page faults again.
CPU_CHUNK_PER_THREAD = 3200


class Learner:
    """Proximal policy optimisation: Adam, clipped losses, a learning rate that follows the KL divergence.

    ``learning_rate`` is a tensor on the device, which Adam reads there: the schedule costs no synchronisation, and a
    captured CUDA graph of the update follows it. With several ``ranks`` each learns from its own rollout, and all take
    the same steps.
    """

    METRICS = ("surrogate_loss", "value_loss", "entropy", "kl")

    def __init__(self, policy: ActorCritic, config: PPOConfig | None = None, ranks: Ranks = ALONE) -> None:
        self.policy, self.ranks = policy, ranks
        self.config = config = config or PPOConfig()
        device = next(policy.parameters()).device
        self.learning_rate = torch.tensor(config.learning_rate, device=device)
        self.optimizer = adam.Adam(policy.parameters(), lr=self.learning_rate, fused=True)
        #: why autograd computes the gradients; None: the fused operation does, for a whole minibatch at once
        self.not_fused = "learner is torch" if config.learner == "torch" else fused.why_not(policy)
        #: computes only the loss by one operation, where ``not_fused``; None: autograd does
        self.fused_loss: fused_loss.FusedLoss | None = None
        if config.learner != "torch" and self.not_fused is not None and fused_loss.why_not(policy) is None:
            self.fused_loss = fused_loss.FusedLoss(policy)
        if config.learner == "fused" and self.not_fused is not None and self.fused_loss is None:
            raise ValueError(f"learner: 'fused' cannot be used: {self.not_fused}")
        self.chunk_size = config.chunk_size
        if self.chunk_size is None and device.type == "cpu":
            self.chunk_size = CPU_CHUNK_PER_THREAD * torch.get_num_threads()
        if policy.recurrent:
            self.chunk_size = None
        self._past_max_kl = False
        self._over_ranks = MeanGradients(ranks, list(policy.parameters()), len(self.METRICS)) if ranks.several else None

    def act(self, obs: Tensor | Mapping[str, Tensor]) -> PolicyStep:
        """``policy.act(obs)``, fused where the gradients are."""
        return self.policy.act(obs) if self.not_fused is not None else fused.act(self.policy, obs)

    def acting(self, buffer: RolloutBuffer, lap: Callable[[str], None] = lambda stage: None) -> ActAndStore:
        """What acts, and stores the steps in ``buffer``; to be made anew for each rollout.

        Calls ``lap`` after each piece of work with its stage, "policy" or "storage".
        """
        if self.not_fused is None and FusedActing.serves(self.policy, buffer):
            return FusedActing(self.policy, buffer, lap)
        return Acting(self.policy, buffer, lap, self.act)

    def update(self, buffer: RolloutBuffer) -> dict[str, Tensor]:
        """Learns from a full rollout whose advantages are computed; the rollout stays.

        The buffer has the fields that ``policy.fields()`` names, of the policy that acted: its "mu" and "sigma", mean
        and standard deviation. The policy's running statistics are updated with the rollout: by its returns before the
        gradient steps, by its observations after them. Returns means over all minibatches, as scalars on the device:
        METRICS and the last learning rate; with ``max_kl`` also the number of "minibatches" evaluated.
        """
        policy = self.policy
        policy.observe_returns(buffer, ranks=self.ranks)
        found: list[Tensor] = []
        self._past_max_kl = False
        for minibatch in self._minibatches(buffer):
            found.append(self.step(minibatch))
            if self._past_max_kl:
                break
        # Averaged at once: a sum after each minibatch would be a launch.
        means = torch.stack(found).mean(0) if found else self.learning_rate.new_full((len(self.METRICS),), math.nan)
        policy.observe(buffer, self.ranks)
        figures = {**dict(zip(self.METRICS, means.unbind())), "learning_rate": self.learning_rate.clone()}
        if self.config.max_kl is not None:
            figures["minibatches"] = means.new_tensor(len(found))
        return figures

    def _minibatches(self, buffer: RolloutBuffer) -> Iterable[Any]:
        config = self.config
        if self.policy.recurrent:
            return sequence_batches(self.policy, buffer, config, empty=self.ranks.several)
        by_minibatch = config.normalize_advantages and config.advantage_scope == "minibatch"
        return buffer.minibatches(
            num_minibatches=config.num_minibatches,
            num_epochs=config.num_epochs,
            normalize_advantages="minibatch" if by_minibatch else config.normalize_advantages,
            reuse=True,
            lazy=self.not_fused is None,
        )

    def gathers(self, buffer: RolloutBuffer) -> bool:
        """Whether :meth:`update` gathers minibatches, into tensors that the buffer keeps."""
        by_minibatch = self.config.normalize_advantages and self.config.advantage_scope == "minibatch"
        return self.not_fused is not None or by_minibatch or not fused.readable(buffer.obs)

    def step(self, minibatch: Any) -> Tensor:
        """One gradient step on a minibatch. Returns its METRICS, [4], from before the step.

        Where the KL exceeds ``max_kl`` it takes no step, and :meth:`update` ends.
        """
        metrics = self.compute_gradients(minibatch)
        if self._over_ranks is not None:
            metrics = self._over_ranks(metrics, _size(minibatch))
        # Clipped separately, as in rsl_rl: a large value error must not shorten the actor's step.
        groups = self.policy.actor_parameters(), self.policy.critic_parameters()
        config, kl, schedule = self.config, None, ()
        fused_step = self.not_fused is None or self.fused_loss is not None
        fused_step = fused_step and adam.why_not(self.optimizer, groups) is None
        if config.schedule == "adaptive":
            if fused_step and config.max_kl is None:
                kl, schedule = metrics[-1], (config.desired_kl, ZERO_KL, LEARNING_RATE_FACTOR, *LEARNING_RATE_BOUNDS)
            else:
                self.adapt_learning_rate(metrics[-1])
        if config.max_kl is not None and metrics[-1] > config.max_kl:
            self._past_max_kl = True
            return metrics
        if fused_step:
            adam.step(self.optimizer, groups, config.max_grad_norm, kl, schedule)
            return metrics
        for parameters in groups:
            nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm, foreach=True)
        self.optimizer.step()
        return metrics

    def compute_gradients(self, minibatch: Any) -> Tensor:
        """Sets the parameters' gradients and returns the METRICS, [4]. Autograd works in chunks of the minibatch."""
        with precision.products(self.policy.matmul, self.learning_rate.device):
            return self._compute_gradients(minibatch)

    def _compute_gradients(self, minibatch: Any) -> Tensor:
        config, policy = self.config, self.policy
        size = _size(minibatch)
        self.optimizer.zero_grad(set_to_none=True)
        policy.bound_std()
        if self.not_fused is None and size > 0:
            return fused.of_policy(policy, minibatch, config)
        chunks = -(-size // self.chunk_size) if self.chunk_size else 1
        totals, stored = torch.zeros(len(self.METRICS), device=self.learning_rate.device), policy.fields()
        if size == 0:  # another rank has samples
            return totals
        for chunk in range(chunks):
            rows = slice(chunk * size // chunks, (chunk + 1) * size // chunks)
            share = (rows.stop - rows.start) / size
            if self.fused_loss is not None:
                samples = {name: minibatch[name][rows] for name in self.fused_loss.SAMPLES}
                totals += self.fused_loss.backward(policy, _rows(minibatch.obs, rows), samples, size, config)
                continue
            new = policy.evaluate(_rows(minibatch.obs, rows), minibatch.actions[rows])
            old = {name: minibatch[name][rows] for name in stored}
            surrogate = surrogate_loss(
                new.log_probs, minibatch.log_probs[rows], minibatch.advantages[rows], config.clip
            )
            value = value_loss(
                new.values,
                policy.normalize_values(minibatch.values[rows]),
                policy.normalize_values(minibatch.returns[rows]),
                config.clip if config.clipped_value_loss else None,
            )
            entropy = policy.entropy(new)
            loss = surrogate + config.value_loss_coef * value - config.entropy_coef * entropy
            (loss * share).backward()
            with torch.no_grad():
                kl = policy.kl(old, new)
                totals.add_(torch.stack((surrogate, value, entropy, kl)), alpha=share)
        return totals

    def adapt_learning_rate(self, kl: Tensor) -> None:
        """rsl_rl's schedule: divided by 1.5 above twice the desired KL, multiplied by 1.5 below half of it.

        A rate outside the bounds is never moved against that direction to reach them, as rsl_rl's own is. A KL of zero
        up to rounding, as before a rollout's first step, leaves the rate unchanged; so does NaN.
        """
        least, most = LEARNING_RATE_BOUNDS
        rate, desired = self.learning_rate, self.config.desired_kl
        rate.copy_(
            torch.where(
                kl > 2 * desired,
                torch.minimum(rate, (rate / LEARNING_RATE_FACTOR).clamp_min(least)),
                torch.where(
                    (kl > ZERO_KL) & (kl < desired / 2),
                    torch.maximum(rate, (rate * LEARNING_RATE_FACTOR).clamp_max(most)),
                    rate,
                ),
            )
        )

    def set_progress(self, fraction: float) -> None:
        """Sets the linear schedule's learning rate for the update at ``fraction`` of the training, 0 at its start."""
        if self.config.schedule == "linear":
            self.learning_rate.fill_(self.config.learning_rate * max(0.0, 1.0 - fraction))

    def state_dict(self) -> dict[str, Any]:
        """Adam's state, with the learning rate in it. The policy has its own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned; the learning rate only with the adaptive schedule."""
        self.optimizer.load_state_dict(state)
        # Adam must go on reading the tensor that the schedule writes.
        for group in self.optimizer.param_groups:
            if self.config.schedule == "adaptive":
                self.learning_rate.copy_(torch.as_tensor(group["lr"]))
            group["lr"] = self.learning_rate
            group["capturable"] = False  # whatever the checkpoint says


def _size(minibatch: Any) -> int:
    return len(minibatch) if isinstance(minibatch, Minibatch) else minibatch.actions.shape[0]


def _rows(obs: Tensor | Mapping[str, Tensor] | Sequences, rows: slice) -> Tensor | dict[str, Tensor] | Sequences:
    if isinstance(obs, Sequences):
        return obs  # never split
    return {name: group[rows] for name, group in obs.items()} if isinstance(obs, Mapping) else obs[rows]
