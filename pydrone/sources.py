"""What may be appended to a buffer: the checks of its arguments, with errors that name them."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Field, Layout


class Sources:
    """Checks tensors of one step against a layout; what passes can be read by a kernel as it is."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device, self.num_envs = layout, device, layout.num_envs

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
        if self._plain(x, field.dtype, (self.num_envs, *field.shape)):
            return x
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

    def _plain(self, x: object, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """The usual case, that needs no further look: this runs for every argument of every step."""
        return (
            x.__class__ is Tensor
            and x.dtype is dtype
            and x.shape == shape
            and x.device == self.device
            and x.layout is torch.strided
            and not x.requires_grad
        )

    def check(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {x.device}")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: expected a strided tensor, got {x.layout}")

    def scalar(self, name: str, x: object, floating: bool) -> Tensor:
        """``x`` [N] or [N, 1], of any real dtype or of a floating one."""
        if self._plain(x, torch.float32 if floating else torch.bool, (self.num_envs,)):
            return x
        self.check(name, x)
        if x.shape[:1] != (self.num_envs,) or x.numel() != self.num_envs:
            raise ValueError(f"{name}: expected shape [{self.num_envs}] or [{self.num_envs}, 1], got {list(x.shape)}")
        if x.is_complex() or (floating and not x.is_floating_point()):
            raise TypeError(f"{name}: expected a {'floating' if floating else 'real'} dtype, got {x.dtype}")
        return x.detach() if x.requires_grad else x
