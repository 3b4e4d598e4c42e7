"""TorchRL: its GAE module and its two GAE functions, in one launch each. docs/integrations.md lists the differences.

>>> from pydrone.integrations.torchrl import GAE
>>> advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydrone.estimators import gae
from pydrone.integrations.peer import require

require("torchrl", (0, 14), (0, 15))

from tensordict import TensorDictBase  # noqa: E402 (after the check of the version)
from tensordict.nn import dispatch, set_skip_existing  # noqa: E402
from torchrl.objectives.utils import hold_out_net  # noqa: E402
from torchrl.objectives.value import advantages, functional  # noqa: E402

__all__ = ["GAE", "generalized_advantage_estimate", "vec_generalized_advantage_estimate"]


def generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets, with time in any dimension::

        delta_t = reward_t + (0 where terminated, else gamma * next_state_value_t) - state_value_t
        A_t     = delta_t + (0 where done, else gamma * lmbda * A_{t+1})

    Args:
        gamma, lmbda: numbers in [0, 1]. Tensors with more than one element, a factor for each step, are passed to
            TorchRL's own function, as is everything if an argument requires grad.
        state_value, next_state_value, reward: [*B, T, *F], with any strides. ``next_state_value`` is read at every
            step, so it may come from other parameters or from n steps ahead.
        done, terminated: of the same shape and any real dtype; ``terminated`` None: as ``done``.
        time_dim: the dimension of T.

    Returns:
        (advantage, value_target), shaped as reward, of the dtype that the three have together; computed in float32 at
        least.

    Raises:
        RuntimeError: the shapes differ.
        ValueError: gamma or lmbda is outside [0, 1].
    """
    return _estimate(gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim, False)[:2]


# TorchRL has two implementations of the same function; here there is one.
vec_generalized_advantage_estimate = generalized_advantage_estimate


def _estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(advantage, value_target, statistics): count, mean and M2 of the advantages, float64 [3], or None."""
    terminated = done if terminated is None else terminated
    floats = {"state_value": state_value, "next_state_value": next_state_value, "reward": reward}
    for name, x in {**floats, "done": done, "terminated": terminated}.items():
        if x.shape != reward.shape:
            raise RuntimeError(f"{name}: expected the shape of reward, {list(reward.shape)}, got {list(x.shape)}")
    if not -reward.dim() <= time_dim < reward.dim():
        raise RuntimeError(f"time_dim: expected a dimension of a tensor of shape {list(reward.shape)}, got {time_dim}")
    done, terminated = (x if x.dtype == torch.bool else x != 0 for x in (done, terminated))
    signals, factors = (*floats.values(), done, terminated), [x for x in (gamma, lmbda) if isinstance(x, Tensor)]
    if any(map(_needs_derivative, (*floats.values(), *factors))) or any(x.numel() > 1 for x in factors):
        return *functional.generalized_advantage_estimate(gamma, lmbda, *signals, time_dim=time_dim), None
    if factors and torch.compiler.is_compiling():
        gamma, lmbda = (torch.as_tensor(x, device=reward.device) for x in (gamma, lmbda))
        advantage, value_target, statistics = _traced(gamma, lmbda, *signals, time_dim)
    else:
        advantage, value_target, statistics = _scan(float(gamma), float(lmbda), *signals, time_dim, stats)
    return advantage, value_target, statistics if stats else None


def _needs_derivative(x: Tensor) -> bool:
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _result_dtype(*floats: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in floats))


def _scan(
    gamma: float,
    lmbda: float,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    time_dim: int,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`_estimate` of checked arguments, flags as bool."""
    # next_state_value need not be the value of the next step, as pydrone.gae assumes. With delta as the reward and
    # values of 0, pydrone.gae computes only the trace, which is exact in any case.
    dtype = _result_dtype(state_value, next_state_value, reward)
    # A select, not a product: 0 * NaN is NaN.
    delta = torch.where(terminated, 0, next_state_value).to(torch.promote_types(dtype, torch.float32))
    torch.add(reward, delta, alpha=gamma, out=delta)
    delta.sub_(state_value)

    shape = delta.movedim(time_dim, -1).shape
    rewards, dones = (x.movedim(time_dim, -1).unsqueeze(0).flatten(0, -2) for x in (delta, done))
    zero = rewards.new_zeros(())
    result = gae(rewards, zero.expand_as(rewards), dones, zero.expand(len(rewards)), gamma, lmbda, stats=stats)
    advantage, value_target = (x.view(shape).movedim(-1, time_dim) for x in result[:2])
    value_target.add_(state_value)
    return advantage.to(dtype), value_target.to(dtype), result[2] if stats else None


@torch.library.custom_op("pydrone_torchrl::gae", mutates_args=())
def _traced(
    gamma: Tensor,
    lmbda: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor,
    time_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_scan` as one operation for torch.compile, which cannot trace a number read from a tensor."""
    signals = state_value, next_state_value, reward, done, terminated
    *estimates, statistics = _scan(float(gamma), float(lmbda), *signals, time_dim, True)
    return *(x.contiguous() for x in estimates), statistics


@_traced.register_fake
def _(gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim):
    dtype = _result_dtype(state_value, next_state_value, reward)
    advantage, value_target = (torch.empty(reward.shape, dtype=dtype, device=reward.device) for _ in range(2))
    return advantage, value_target, reward.new_empty(3, dtype=torch.float64)


class GAE(advantages.GAE):
    """:class:`torchrl.objectives.value.GAE` with its arguments, its keys and its calls of the value network, for
    collectors, trainers and losses (``loss.make_value_estimator(GAE(...))``).

    ``vectorized`` has no effect. ``value_estimate``, a discount for each step (``steps_to_next_obs``) and, with
    ``differentiable=True``, inputs that require grad use TorchRL's own code.
    """

    @dispatch
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Writes the advantage and the value target into ``tensordict``, [*B, T], and returns it."""
        if tensordict.batch_dims < 1:
            raise RuntimeError(f"tensordict: expected a batch size of [*B, T], got {list(tensordict.batch_size)}")
        skip = nullcontext() if self.skip_existing is None else set_skip_existing(self.skip_existing)
        with skip, torch.set_grad_enabled(self.differentiable):
            self._write(tensordict, params, target_params, self._get_time_dim(time_dim, tensordict))
        return tensordict

    def _write(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
        time_dim: int,
    ) -> None:
        keys, gamma = self.tensor_keys, self.gamma
        value, next_value = self._values(tensordict, params, target_params)
        # With shifted=True: the steps that had room; the last of them ends its trajectory.
        valid = tensordict.get("shifted_valid", default=None)
        data = self._prepare_shifted_tensordict(tensordict, valid, time_dim)
        reward, done = data.get(("next", keys.reward)), data.get(("next", keys.done))
        terminated = data.get(("next", keys.terminated), default=done)
        reward, done, terminated = self._prepare_signals(reward, done, terminated, value)
        steps = tensordict.get(keys.steps_to_next_obs, None)
        if steps is not None:
            gamma = gamma.to(reward.device) ** steps.view_as(reward)
        if self.auto_reset_env:
            # The final observation is lost: the value of the one before replaces its value.
            truncated = self._broadcast_optional(tensordict.get(("next", "truncated")), value)
            reward = torch.where(truncated, reward + gamma.to(reward.device) * value, reward)
            terminated = done
        groups = self._group_ids(tensordict) if self.average_gae else None
        whole = self.average_gae and valid is None and groups is None
        advantage, target, statistics = _estimate(
            gamma, self.lmbda, value, next_value, reward, done, terminated, time_dim, whole
        )
        if statistics is not None:
            count, mean, m2 = statistics.unbind()
            advantage.sub_(mean).div_((m2 / (count - 1).clamp_min(1)).sqrt().clamp_min(1e-4))  # of one sample: 0
        elif self.average_gae:
            advantage = self._normalize_advantage(advantage, valid, groups=groups)
        tensordict.set(keys.advantage, advantage)
        tensordict.set(keys.value_target, target)
        self._mask_shifted_output(tensordict, valid)

    def _values(
        self, tensordict: TensorDictBase, params: TensorDictBase | None, target_params: TensorDictBase | None
    ) -> tuple[Tensor, Tensor]:
        """V of the observations and of the next ones: from the value network, or from the tensordict without one."""
        key = self.tensor_keys.value
        if self.value_network is None:
            value, next_value = tensordict.get(key, None), tensordict.get(("next", key), None)
            for name, x in ((key, value), (("next", key), next_value)):
                if x is None:
                    raise ValueError(f"{name}: expected it in the tensordict where there is no value_network")
            return value, next_value
        if params is not None:
            params = params.detach()
            target_params = params.clone(False) if target_params is None else target_params
        own = params is None and target_params is None
        with hold_out_net(self.value_network) if own else nullcontext():
            value, next_value, valid = self._call_value_nets(
                data=tensordict,
                params=params,
                next_params=target_params,
                single_call=self.shifted,
                value_key=key,
                detach_next=True,
                vmap_randomness=self.vmap_randomness,
            )
        if valid is not None:
            tensordict.set("shifted_valid", valid)
        return value, next_value
