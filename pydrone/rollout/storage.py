"""A buffer's memory: every tensor that it holds, allocated once, and views of the fields in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pydrone.ops import pages
from pydrone.ops.dispatch import Backend
from pydrone.rollout.layout import Allocation, Field, Layout


class Storage:
    """The tensors that a :class:`~pydrone.rollout.layout.Layout` asks for, on one device.

    Attributes:
        ops: the operations that run on them.
        tensors: all of them, by the names of ``layout.allocations()``.
        rows: uint8 [C, N, row_bytes]. codes: uint8 [N, C], how each step ended. rewards, values: float32 [N, C].
        views: the fields of the rows by name, [C, N, ...], in the dtype they are stored in.
        pool: the memory of final observations, uint8 [R, P, bytes], int32 [R, 2] and int32 [N, C], as ``append`` takes
            it; empty if the buffer has none.
        final_rows: the last of these, or None.
        cursor: int64 [CURSOR_SIZE], the ring's counters for CUDA graphs.
        not_finite: int32 [R], whether an observation of a rollout is NaN or infinite.
    """

    def __init__(self, layout: Layout, device: torch.device, ops: Backend) -> None:
        self.layout, self.device, self.ops = layout, device, ops
        # Tensors made in inference mode cannot be trained on later.
        with torch.inference_mode(False):
            self.tensors = allocate(layout.allocations(), device)
            self.views = {x.name: field_view(self.tensors["rows"], x) for x in layout.fields.values()}
            self.final_rows = self.views["final_row"].t() if layout.final_obs_rows else None
        tensors = self.tensors
        self.rows, self.codes = tensors["rows"], tensors["dones"]
        self.rewards, self.values = tensors["rewards"], tensors["values"]
        self.advantages, self.returns, self.statistics = (tensors[x] for x in ("advantages", "returns", "statistics"))
        self.cursor, self.not_finite = tensors["cursor"], tensors["not_finite"]
        self.final_obs, self.pool_count = tensors.get("final_obs"), tensors.get("final_obs_count")
        self.pool = [] if self.final_obs is None else [self.final_obs, self.pool_count, self.final_rows]

    @torch.inference_mode(False)
    def grow_pool(self, rows: int) -> None:
        """Enlarges the pool to ``rows``, in new memory; what it holds stays."""
        rollouts, before, row_bytes = self.final_obs.shape
        grown = allocate([Allocation("final_obs", (rollouts, rows, row_bytes), torch.uint8, "")], self.device)
        grown["final_obs"][:, :before] = self.final_obs
        self.tensors |= grown
        self.final_obs = self.pool[0] = grown["final_obs"]
        self.layout.final_obs_rows = rows

    def groups(self, named: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Observations as callers see them, one tensor or a dict of groups, from tensors by the layout's names."""
        groups = {name: named[f"obs.{name}"] for name in self.layout.obs}
        return groups if self.layout.obs_is_mapping else groups["obs"]

    def final_observations(self, rollout: int, used: int | None) -> Tensor | dict[str, Tensor]:
        """The pool of the rollout at place ``rollout``, [P, ...]: its first ``used`` rows, or all of them."""
        rows = self.final_obs[rollout] if used is None else self.final_obs[rollout][:used]
        return self.groups({name: field_view(rows, x) for name, x in self.layout.pool_fields.items()})


def device_of(device: torch.device | str) -> torch.device:
    """``device`` with its index: tensors say cuda:0 where users say cuda. Raises ValueError for an unusable one."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a device that PyTorch knows, got {device!r}") from error
    if device.type == "meta":
        raise ValueError("device: expected one that holds data, got 'meta'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected one that this PyTorch can use, got {str(device)!r}, and it finds no CUDA device"
        )
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # NotImplementedError among them
            raise ValueError(f"device: expected one that this PyTorch can use, got {str(device)!r}") from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def allocate(wanted: Sequence[Allocation], device: torch.device) -> dict[str, Tensor]:
    """Allocates zeros. Planes, [N, T or C], get the strides that their device's scan is written for."""
    planes = ("rewards", "values", "dones", "advantages", "returns") if device.type != "cuda" else ()
    specs = [(x.shape[::-1] if x.name in planes else x.shape, x.dtype) for x in wanted]
    try:
        made = pages.together(specs, device)
    except (OSError, OverflowError) as error:
        size = sum(x.nbytes for x in wanted)
        raise RuntimeError(
            f"num_envs: the buffer takes {size} bytes of memory, which cannot be allocated: {error}"
        ) from error
    return {x.name: y.zero_().t() if x.name in planes else y.zero_() for x, y in zip(wanted, made, strict=True)}


def field_view(rows: Tensor, field: Field) -> Tensor:
    """A field of ``rows`` [..., row_bytes], as a view [..., *field.shape] in its dtype."""
    view = rows[..., field.offset : field.offset + field.nbytes].view(field.dtype)
    return view.unflatten(-1, field.shape) if field.shape else view[..., 0]
