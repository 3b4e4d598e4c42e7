"""The layers that an exported policy is described by: a list of [operation, argument, ...], and how they are computed.

Arguments are the names of tensors, or numbers. All formats are made from these layers: TorchScript and ONNX are traced
from :func:`run`, safetensors names them, the C header (:mod:`pydrone.ppo.exporting.c_header`) spells them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Layers = list[list[Any]]


def _gru(x: Tensor, memory: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    r, z, n = nn.functional.linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = nn.functional.linear(memory, w_hh, b_hh).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    memory = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * memory
    return memory, memory


def _lstm(x: Tensor, memory: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    # The memory is the output and the cell, side by side.
    output, cell = memory.chunk(2, -1)
    i, f, g, o = (nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(output, w_hh, b_hh)).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    output = torch.sigmoid(o) * torch.tanh(cell)
    return output, torch.cat((output, cell), -1)


def _argmax(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[B], or [B, D] of parts of these ``sizes``."""
    return torch.stack([part.argmax(-1) for part in x.split(sizes, -1)], -1) if sizes else x.argmax(-1)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "normalize": lambda x, shift, std: (x - shift) / std,
    "linear": nn.functional.linear,
    "tanh": torch.tanh,
    "elu": nn.functional.elu,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "clip": torch.clamp,
    "trunc": torch.trunc,
    "argmax": lambda x, *sizes: _argmax(x, sizes),
    "shift": lambda x, start: x + start,
}
CELLS = {"gru": _gru, "lstm": _lstm}


def run(
    layers: Layers, tensors: Mapping[str, Tensor], obs: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Actions for observations [B, O] and a recurrent policy's next memory [B, S]."""
    x = obs
    for operation, *arguments in layers:
        given = [tensors[argument] if isinstance(argument, str) else argument for argument in arguments]
        if operation in CELLS:
            x, memory = CELLS[operation](x, memory, *given)
        else:
            x = OPERATIONS[operation](x, *given)
    return x, memory


def memory_size(layers: Layers, tensors: Mapping[str, Tensor]) -> int:
    """S, the width of a recurrent policy's memory; 0 where there is none."""
    for operation, *arguments in layers:
        if operation in CELLS:
            return tensors[arguments[1]].shape[1] * (2 if operation == "lstm" else 1)
    return 0


class Network(nn.Module):
    """The layers as a module, to be traced."""

    def __init__(self, layers: Layers, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        for name, x in tensors.items():
            self.register_buffer(name, x)

    def forward(self, obs: Tensor, memory: Tensor | None = None) -> Any:
        actions, memory = run(self.layers, dict(self.named_buffers()), obs, memory)
        return actions if memory is None else (actions, memory)
