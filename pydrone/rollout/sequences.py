"""Trajectories for recurrent policies: a rollout split where episodes end, padded, with masks and initial states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone.ops.reference import normalization, permute
from pydrone.ops.schema import INVALID
from pydrone.rollout.draws import Draws
from pydrone.rollout.sources import Sources
from pydrone.rollout.views import Rollout


class Sequences(NamedTuple):
    """B trajectories of at most L steps, time first, as torch's recurrent layers take them.

    fields: name to [L, B, ...], padded with a trajectory's last step. obs: [L, B, ...], or a dict of groups. mask: bool
    [L, B]: steps that are not padding. learn: bool [L, B]: steps that a loss may use (``mask`` without the burn-in and
    invalid steps). hidden: name to [B, ...], the state before each first step. envs, starts: int64 [B], where each
    trajectory begins. An invalid step is a trajectory of its own, and all its fields are 0.
    """

    obs: Tensor | dict[str, Tensor]
    fields: dict[str, Tensor]
    mask: Tensor
    learn: Tensor
    hidden: dict[str, Tensor]
    envs: Tensor
    starts: Tensor


def hidden_states(rollout: Rollout, sources: Sources, hidden: Mapping[str, str | Tensor] | None) -> dict[str, Tensor]:
    """The states before each step, [N, T, ...] by name, after all checks of the argument ``hidden``."""
    states = {}
    if hidden is not None and not isinstance(hidden, Mapping):
        raise TypeError(f"hidden: expected a mapping of names to fields or tensors, got {type(hidden).__name__}")
    for name, state in (hidden or {}).items():
        if isinstance(state, Tensor):
            sources.check(f"hidden[{name!r}]", state)
        elif not isinstance(state, str):
            raise TypeError(f"hidden[{name!r}]: expected a field's name or a tensor, got {type(state).__name__}")
        elif state not in rollout.layout.extra:
            names = ", ".join(rollout.layout.extra) or "none"
            raise ValueError(f"hidden[{name!r}]: expected the name of a field, one of {names}, got {state!r}")
        states[name] = rollout[state] if isinstance(state, str) else state
        sizes = rollout.dones.shape
        if states[name].shape[:2] != sizes:
            expected = f"[{sizes[0]}, {sizes[1]}, ...]"
            raise ValueError(f"hidden[{name!r}]: expected shape {expected}, got {list(states[name].shape)}")
    return states


def draw(
    rollout: Rollout,
    draws: Draws,
    states: Mapping[str, Tensor],
    burn_in: int | Tensor,
    count: int,
    epochs: int,
    normalize: bool,
) -> Iterator[Sequences]:
    """``count`` minibatches of whole environments an epoch, each epoch in an order of its own."""
    ring, scan, layout = rollout._ring, rollout._scan, rollout.layout
    views = {name: rollout[name] for name in layout.stored}
    views["advantages"], views["returns"] = rollout.advantages, rollout.returns
    if normalize:
        mean, scale = normalization(rollout.statistics)
        views["advantages"] = (views["advantages"] - mean) * scale
    num_envs, discards = layout.num_envs, ring.discards
    position = torch.arange(num_envs, device=rollout.dones.device)
    for _ in range(epochs):
        epoch = draws.next_epoch()
        order = permute(position, num_envs, draws.key, ring.rollout, epoch)
        for i in range(count):
            if discards != ring.discards or not scan.computed:
                raise RuntimeError("sequences: the rollout was discarded while they were being read")
            envs = order[i * num_envs // count : (i + 1) * num_envs // count]
            yield pad(
                views, tuple(layout.obs), layout.obs_is_mapping, rollout.dones, states, envs, burn_in, ring.has_resets
            )


def trajectories(ended: Tensor, envs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(env, first step, length) of each trajectory of ``envs``, int64 [B], in the order of the environments.

    ended: bool [N, T], true at the last step of an episode. A trajectory begins at step 0 and after each end.
    """
    num_steps = ended.shape[1]
    begins = torch.ones_like(ended[envs])
    begins[:, 1:] = ended[envs, :-1]
    rows, starts = begins.nonzero(as_tuple=True)
    # A trajectory ends where the next one of its environment begins, or with the rollout.
    following = torch.full_like(starts, num_steps)
    same = rows[1:] == rows[:-1]
    following[:-1] = torch.where(same, starts[1:], num_steps)
    return envs[rows], starts, following - starts


def pad(
    views: Mapping[str, Tensor],
    groups: tuple[str, ...],
    grouped: bool,
    codes: Tensor,
    hidden: Mapping[str, Tensor],
    envs: Tensor,
    burn_in: int | Tensor,
    resets: bool = False,
) -> Sequences:
    """The trajectories of ``envs`` from views [N, T, ...]; codes: uint8 [N, T]. One host sync, for the sizes.

    ``burn_in``: or [N]. ``resets``: whether some steps may be invalid.
    """
    env, start, length = trajectories(codes != 0, envs)
    offset = torch.arange(int(length.max()), device=codes.device).unsqueeze(1)
    mask = offset < length
    step = start + torch.minimum(offset, length - 1)
    taken = {name: view[env, step] for name, view in views.items()}
    first = {name: state[env, start] for name, state in hidden.items()}
    if resets:
        # Not left to ``learn``: a NaN passes through a recurrent layer's gradient even where the loss selects others.
        invalid = codes[env, step] == INVALID
        taken = {name: _cleared(x, invalid) for name, x in taken.items()}
        first = {name: _cleared(x, invalid[0]) for name, x in first.items()}
    # A trajectory that begins with the rollout may start from an older policy's hidden state: the burn-in renews it.
    burn_in = burn_in[env] if isinstance(burn_in, Tensor) else burn_in
    learn = mask & ((start > 0) | (offset >= burn_in)) & (codes[env, step] != 3)
    obs = {name: taken.pop(f"obs.{name}") for name in groups}
    return Sequences(
        obs if grouped else obs[groups[0]],
        taken,
        mask,
        learn,
        first,
        env,
        start,
    )


def _cleared(x: Tensor, where: Tensor) -> Tensor:
    """A copy of ``x`` that is 0 ``where``, bool of its first dimensions."""
    return x.masked_fill(where.reshape(*where.shape, *[1] * (x.dim() - where.dim())), 0)
