"""Shared by the commands: the error line on stderr, tables, the device, and a quicker import."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def fail(error: Exception | str) -> int:
    """Prints the message as one line on stderr, whatever line breaks it has, and returns the exit status 1."""
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"pydrone: {message}", file=sys.stderr)
    return 1


def not_installed(*modules: str, extra: str = "train") -> str:
    """The message that ``modules``, which the optional dependencies ``extra`` install, are missing."""
    them = "it" if len(modules) == 1 else "them"
    return f'{", ".join(modules)} not installed; `pip install "pydrone-rl[{extra}]"` installs {them}'


def device_of(name: str | None, local_rank: int | None = None) -> torch.device:
    """The device called ``name``, checked to exist; None: cuda if there is a CUDA device, else cpu.

    ``local_rank``: the index of this process on its machine if there are several, which selects the CUDA device.
    ValueError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1, ...") from None
    if local_rank is not None and device.type == "cuda":
        if device.index is not None:
            raise ValueError(f"--device {name}: expected cuda, each of several processes takes that of its LOCAL_RANK")
        device, name = torch.device("cuda", local_rank), f"cuda:{local_rank}, of LOCAL_RANK"
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this PyTorch finds no CUDA device")
    if device.type == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: expected one of {torch.cuda.device_count()} CUDA devices, from cuda:0")
        torch.cuda.set_device(device)  # kernels and events use the current device
    return device


def aligned(rows: list[list[str]], rule: bool = False) -> str:
    """``rows``, of which the first is the head, as a text of aligned columns; ``rule``: a line below the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]) for row in rows]
    if rule:
        lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Within it, the first import of torch runs without garbage collection.

    Importing makes 250,000 objects and hardly any garbage: to look through them again and again takes a tenth of the
    time. Later collections leave them out, the one at the exit too.
    """
    # Frozen objects are never freed: with torch there may be tensors among them.
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
