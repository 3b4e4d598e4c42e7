"""The learner: a rollout in, a better policy out. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pydrone.ppo.config import PPOConfig
from pydrone.ppo.loss import gaussian_entropy, gaussian_kl, surrogate_loss, value_loss
from pydrone.ppo.policy import ActorCritic

if TYPE_CHECKING:
    from pydrone.buffer import RolloutBuffer

# rsl_rl's adaptive schedule.
LEARNING_RATE_BOUNDS = (1e-5, 1e-2)
LEARNING_RATE_FACTOR = 1.5

# Activations of 128 units are 1.6 MB then, which a core's cache holds; the allocator returns to the system, and faults
# in again, what is much larger.
CPU_CHUNK_PER_THREAD = 3200


class Learner:
    """Proximal policy optimisation: Adam, clipped losses, a learning rate that follows the KL divergence.

    ``learning_rate`` is a tensor on the device, which Adam reads there: the schedule costs no synchronisation, and a
    captured CUDA graph of the update follows it.
    """

    METRICS = ("surrogate_loss", "value_loss", "entropy", "kl")

    def __init__(self, policy: ActorCritic, config: PPOConfig | None = None) -> None:
        self.policy = policy
        self.config = config = config or PPOConfig()
        device = policy.std_param.device
        self.learning_rate = torch.tensor(config.learning_rate, device=device)
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=self.learning_rate, fused=True)
        self.chunk_size = config.chunk_size
        if self.chunk_size is None and device.type == "cpu":
            self.chunk_size = CPU_CHUNK_PER_THREAD * torch.get_num_threads()

    def update(self, buffer: RolloutBuffer) -> dict[str, Tensor]:
        """Learns from a full rollout whose advantages are computed; the rollout stays.

        The buffer has the fields "mu" and "sigma", mean and standard deviation of the policy that acted. Returns means
        over all minibatches, as scalars on the device: METRICS, and the last learning rate.
        """
        config = self.config
        totals = torch.zeros(len(self.METRICS), device=self.learning_rate.device)
        minibatches = buffer.minibatches(
            num_minibatches=config.num_minibatches,
            num_epochs=config.num_epochs,
            normalize_advantages=config.normalize_advantages,
            reuse=True,
        )
        for minibatch in minibatches:
            totals += self.step(minibatch)
        totals /= config.num_epochs * config.num_minibatches
        return {**dict(zip(self.METRICS, totals.unbind())), "learning_rate": self.learning_rate.clone()}

    def step(self, minibatch: Any) -> Tensor:
        """One gradient step on a minibatch. Returns its METRICS, [4]; its KL is that before the step."""
        metrics = self.compute_gradients(minibatch)
        if self.config.schedule == "adaptive":
            self.adapt_learning_rate(metrics[-1])
        # Each on its own, as rsl_rl does: a large value error must not shorten the actor's step.
        nn.utils.clip_grad_norm_(self.policy.actor_parameters(), self.config.max_grad_norm, foreach=True)
        nn.utils.clip_grad_norm_(self.policy.critic_parameters(), self.config.max_grad_norm, foreach=True)
        self.optimizer.step()
        return metrics

    def compute_gradients(self, minibatch: Any) -> Tensor:
        """Leaves the loss's gradients in the parameters, chunk by chunk, and returns the METRICS, [4]."""
        config, policy = self.config, self.policy
        self.optimizer.zero_grad(set_to_none=True)
        size = minibatch.actions.shape[0]
        chunks = -(-size // self.chunk_size) if self.chunk_size else 1
        totals = torch.zeros(len(self.METRICS), device=self.learning_rate.device)
        for chunk in range(chunks):
            rows = slice(chunk * size // chunks, (chunk + 1) * size // chunks)
            share = (rows.stop - rows.start) / size
            new = policy.evaluate(_rows(minibatch.obs, rows), minibatch.actions[rows])
            surrogate = surrogate_loss(
                new.log_probs, minibatch.log_probs[rows], minibatch.advantages[rows], config.clip
            )
            value = value_loss(
                new.values,
                minibatch.values[rows],
                minibatch.returns[rows],
                config.clip if config.clipped_value_loss else None,
            )
            entropy = gaussian_entropy(new.std)
            loss = surrogate + config.value_loss_coef * value - config.entropy_coef * entropy
            (loss * share).backward()
            with torch.no_grad():
                kl = gaussian_kl(minibatch["mu"][rows], minibatch["sigma"][rows], new.mean, new.std)
                totals.add_(torch.stack((surrogate, value, entropy, kl)), alpha=share)
        return totals

    def adapt_learning_rate(self, kl: Tensor) -> None:
        """rsl_rl's schedule: divided by 1.5 above twice the desired KL, multiplied by 1.5 below half of it.

        A KL of zero, as before a rollout's first step, leaves it alone; so does one that is not a number.
        """
        least, most = LEARNING_RATE_BOUNDS
        rate, desired = self.learning_rate, self.config.desired_kl
        rate.copy_(
            torch.where(
                kl > 2 * desired,
                (rate / LEARNING_RATE_FACTOR).clamp_min(least),
                torch.where((kl > 0) & (kl < desired / 2), (rate * LEARNING_RATE_FACTOR).clamp_max(most), rate),
            )
        )

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


def _rows(obs: Tensor | Mapping[str, Tensor], rows: slice) -> Tensor | dict[str, Tensor]:
    return {name: group[rows] for name, group in obs.items()} if isinstance(obs, Mapping) else obs[rows]
