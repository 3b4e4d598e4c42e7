"""Acting, and storing a rollout: a step ends, the policy acts on the result, and the next step begins."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pydrone.ops.schema import packed_size
from pydrone.ppo.learner import fused
from pydrone.ppo.learner.networks import parts_of
from pydrone.ppo.policy.actor_critic import ActorCritic, PolicyStep

if TYPE_CHECKING:
    from pydrone.buffer import RolloutBuffer

Obs = Tensor | Mapping[str, Tensor]
Ends = Mapping[str, Any]


class ActAndStore(Protocol):
    """Stores the end of the previous step, acts, and stores the beginning of the next step.

    ``ends`` are the arguments of the buffer's ``end``, None at the first step of a rollout; the caller stores the last
    step's. Returns the actions, [N, ...]. By then everything but the step's rewards and flags is stored.
    """

    def __call__(self, obs: Obs, ends: Ends | None = None) -> Tensor: ...


class Acting:
    """Separate calls for acting and storing, for every policy and buffer. ``act`` None: the policy's."""

    def __init__(
        self,
        policy: ActorCritic,
        buffer: RolloutBuffer,
        lap: Callable[[str], None],
        act: Callable[[Obs], PolicyStep] | None = None,
    ) -> None:
        self._policy, self._buffer, self._lap = policy, buffer, lap
        self._act = policy.act if act is None else act

    def __call__(self, obs: Obs, ends: Ends | None = None) -> Tensor:
        buffer = self._buffer
        if ends is not None:
            buffer.end(**ends)
            self._lap("storage")
        step = self._act(obs)
        self._lap("policy")
        stored = self._policy.stored(step)
        buffer.begin(obs=obs, actions=step.actions, values=step.values, log_probs=step.log_probs, **stored)
        self._lap("storage")
        return step.actions


class FusedActing:
    """One operation for all of it, ``ppo_step``. Networks are taken apart once, weights packed once.

    Changes of the weights or the running statistics, however made, take effect at the next step. The standard deviation
    is raised to its floor at a rollout's first step.
    """

    @staticmethod
    def serves(policy: ActorCritic, buffer: RolloutBuffer) -> bool:
        """Whether the operation can store this buffer's fields."""
        fields = [*buffer.layout.stored][len(buffer.layout.obs) :]
        native = buffer.backend == ("cpu" if buffer.device.type == "cpu" else "cuda")
        triton = buffer.backend == "triton" and buffer.device.type == "cuda"
        return (native or triton) and fields == ["actions", "log_probs", "values", "mu", "sigma"]

    def __init__(self, policy: ActorCritic, buffer: RolloutBuffer, lap: Callable[[str], None]) -> None:
        self._policy, self._buffer, self._lap = policy, buffer, lap
        like, num_envs = policy.std_param, buffer.num_envs
        with torch.inference_mode(False):
            self._mean = like.new_empty(num_envs, len(like))
            self._values, self._log_probs = like.new_empty(2, num_envs).unbind()
        self._parts: list[object] = []

    def __call__(self, obs: Obs, ends: Ends | None = None) -> Tensor:
        """As :class:`ActAndStore`."""
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self(obs, ends)
        policy, buffer = self._policy, self._buffer
        parts = [policy.matmul, *parts_of(policy.actor, policy.critic)]
        if len(parts) != len(self._parts) or not all(map(operator.is_, parts, self._parts)):
            self._networks = fused.parameters_of(policy)
            with torch.inference_mode(False):
                self._packed = self._mean.new_zeros(sum(packed_size(x) for x in self._networks[:2]))
            self._parts = parts
        if ends is None:
            policy.bound_std()  # the parameter is then the standard deviation, which needs no launch
        std = policy.std_param.detach()
        mean, sigma, values, log_probs = self._mean, std.expand_as(self._mean), self._values, self._log_probs
        actions = torch.empty_like(mean)  # a new tensor, since the environment may keep it
        outputs, noise = (actions, log_probs, values, mean), torch.randn_like(mean)
        act = fused.act_arguments(policy, obs, self._networks, std, noise, self._packed, outputs)
        row = {"obs": obs, "actions": actions, "values": values, "log_probs": log_probs, "mu": mean, "sigma": sigma}

        def run(end: tuple, begin: tuple) -> None:
            torch.ops.pydrone.ppo_step.default(*end, *act, sigma, *begin)

        if not buffer.turn(run, row, ends):
            if ends is not None:
                buffer.end(**ends)
            torch.ops.pydrone.ppo_act.default(*act)
            buffer.begin(**row)
        self._lap("policy")
        return actions
