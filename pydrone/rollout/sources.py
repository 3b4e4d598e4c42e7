"""What may be appended to a buffer: the checks of its arguments, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from pydrone.estimators import check_strided
from pydrone.rollout.layout import Field, Layout


class Sources:
    """Checks tensors of one step against a layout; what passes can be read by a kernel as it is."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device, self.num_envs = layout, device, layout.num_envs
        self.fields = [field for name, field in layout.fields.items() if name != "final_row"]
        self._in_order = itemgetter(*(field.name for field in self.fields))
        self._deep, self._final_deep = _deep(layout, self.fields), _deep(layout, layout.pool_fields.values())

    def given(self, obs: object, actions: object, values: object, log_probs: object, fields: dict) -> dict[str, object]:
        """What a step was given for a row, by the names of the layout's fields."""
        row = self.groups("obs", obs)
        row["actions"], row["values"], row["log_probs"] = actions, values, log_probs
        row.update(fields)
        return row

    def row(self, given: Mapping[str, object]) -> tuple[Tensor, ...]:
        """The sources of a row in the layout's order, each checked."""
        if given.keys() != self.layout.fields.keys() - {"final_row"}:
            for name in self.layout.extra:
                if name not in given:
                    raise TypeError(f"{name}: expected a tensor for this field, got none")
            name = next(name for name in given if name not in self.layout.fields or name == "final_row")
            raise TypeError(f"{name}: not a field of this buffer; it has {', '.join(self.layout.extra) or 'none'}")
        return tuple(self.field(field, given[field.name], field.name) for field in self.fields)

    def usual(self, given: Mapping[str, object], final: Sequence[object]) -> tuple[Tensor, ...] | None:
        """The sources of a row, and nothing looked at but what an operation cannot check by itself.

        None if anything is out of the ordinary. This runs every step, and Python is much of a small step's time.
        """
        try:
            sources = self._in_order(given)
            if len(given) != len(sources):
                return None
            for i, shape in self._deep:
                if sources[i].shape != shape:
                    return None
            if final:
                for i, shape in self._final_deep:
                    if final[i].shape != shape:
                        return None
            if torch.is_grad_enabled():
                for x in sources:
                    if x.requires_grad:
                        return None
        except (KeyError, AttributeError, RuntimeError):  # the last of a nested tensor, which has no shape
            return None
        return sources

    def groups(self, name: str, obs: object) -> dict[str, object]:
        """``obs`` by the names of the layout's fields."""
        if not self.layout.obs_is_mapping:
            return {"obs.obs": obs}
        # A TensorDict is a mapping in all but its class.
        if not hasattr(obs, "keys") or isinstance(obs, Tensor):
            raise TypeError(f"{name}: expected a mapping of {', '.join(self.layout.obs)}, got {type(obs).__name__}")
        if set(obs.keys()) != set(self.layout.obs):
            raise ValueError(f"{name}: expected the groups {sorted(self.layout.obs)}, got {sorted(obs.keys())}")
        return {f"obs.{group}": obs[group] for group in self.layout.obs}

    def field(self, field: Field, x: object, name: str) -> Tensor:
        """``x`` as the source of ``field``: [N, *shape], or [N, 1] for a scalar; floating or of the field's dtype."""
        name = name.removesuffix(".obs") if not self.layout.obs_is_mapping else name
        self.check(name, x)
        if field.shape == ():
            fits = x.shape[:1] == (self.num_envs,) and x.numel() == self.num_envs
        else:
            fits = x.shape == (self.num_envs, *field.shape)
        if not fits:
            raise ValueError(f"{name}: expected shape {[self.num_envs, *field.shape]}, got {list(x.shape)}")
        if x.dtype != field.dtype and not (x.is_floating_point() and field.dtype.is_floating_point):
            raise TypeError(f"{name}: expected dtype {field.dtype}, got {x.dtype}")
        return x.detach() if x.requires_grad else x

    def check(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {x.device}")
        check_strided(name, x)

    def scalar(self, name: str, x: object, floating: bool) -> Tensor:
        """``x`` [N] or [N, 1], of any real dtype or of a floating one."""
        self.check(name, x)
        if x.shape[:1] != (self.num_envs,) or x.numel() != self.num_envs:
            raise ValueError(f"{name}: expected shape [{self.num_envs}] or [{self.num_envs}, 1], got {list(x.shape)}")
        if x.is_complex() or (floating and not x.is_floating_point()):
            raise TypeError(f"{name}: expected a {'floating' if floating else 'real'} dtype, got {x.dtype}")
        return x.detach() if x.requires_grad else x


def _deep(layout: Layout, fields: Iterable[Field]) -> list[tuple[int, tuple[int, ...]]]:
    """Number and shape of the fields of several dimensions: of these an operation knows how many elements they have."""
    return [(i, (layout.num_envs, *field.shape)) for i, field in enumerate(fields) if len(field.shape) > 1]
