"""Chooses the backend for a device and a request, and caches the choice.

The default is ``torch.ops.pydrone``: cpu for CPU tensors, cuda for CUDA tensors, with the fallbacks of
:mod:`pydrone.ops.native`; what a buffer launches in a CUDA graph is Triton's (:func:`_by_cursor`). A request
(``backend=``, else the environment variable ``PYDRONE_BACKEND``) is served by exactly the backend it names, or fails
with the reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from pydrone.ops import native, reference, triton
from pydrone.ops.prepared import Again, prepare
from pydrone.ops.schema import SCHEMAS
from pydrone.ops.streams import capturing

NAMES = ("reference", "cpu", "triton", "cuda")


class Backend(NamedTuple):
    """One backend's operations, each with the signature of :mod:`pydrone.ops.schema`.

    ``checks``: whether they check all arguments before they write anything.  ``prepared``: the same operations, which
    raise RuntimeError and write nothing unless a call with such arguments was made before (their shapes, dtypes,
    strides and devices are the same), and outputs of ``gae`` have memory of their own.  ``prepare_append``: None, or
    :func:`pydrone.ops.prepared.prepare`.
    """

    name: str
    checks: bool
    gae: Callable[..., None]
    off_policy: Callable[..., None]
    append: Callable[..., None]
    gather: Callable[..., None]
    prepared: Backend | None = None
    prepare_append: Callable[..., Again | None] | None = None

    @property
    def unchecked(self) -> Backend | None:
        """The operations for arguments that nobody has checked: they raise RuntimeError rather than write."""
        return self if self.checks and self.prepared is None else self.prepared


def backends() -> dict[str, str | None]:
    """The backends by name: None if usable on this machine, else the reason.

    >>> pydrone.backends()
    {'reference': None, 'cpu': None, 'triton': 'no CUDA device ...', 'cuda': 'this PyTorch is built without CUDA'}
    """
    cuda = native.CUDA_MISSING or (None if torch.cuda.is_available() else "no CUDA device")
    return {"reference": None, "cpu": native.CPU_MISSING, "triton": triton.missing(), "cuda": cuda}


_cache: dict[tuple[str, str | None, str | None], Backend] = {}


def select(device: torch.device, backend: str | None = None) -> Backend:
    """The backend for tensors on ``device``.

    Raises ValueError for an unknown name, RuntimeError with the reason for a backend that cannot serve the device.
    """
    key = (device.type, backend, os.environ.get("PYDRONE_BACKEND") if backend is None else None)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _pick(device.type, backend)
    return found


def _pick(device: str, backend: str | None) -> Backend:
    name = backend if backend is not None else os.environ.get("PYDRONE_BACKEND") or None
    source = "backend" if backend is not None else "PYDRONE_BACKEND"
    if name is None:
        default = {"cpu": "cpu" if native.CPU_MISSING is None else "reference"}
        default["cuda"] = "cuda" if native.CUDA_MISSING is None else "triton"
        if default.get(device) == "cuda" and triton.missing() is None:
            return _by_cursor(_operations("cuda"), _operations("triton"))
        return _operations(default.get(device, "reference"))
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    reason = backends()[name]
    if reason is None and name in ("cpu", "cuda") and name != device:
        reason = f"it runs on {name} tensors, these are on {device}"
    if reason is None and name == "triton" and device != "cuda" and not triton.interpreted():
        reason = f"it runs on cuda tensors, these are on {device} (TRITON_INTERPRET=1 interprets the kernels)"
    if reason is not None:
        raise RuntimeError(f"{source}: {name!r} cannot be used: {reason}")
    return _operations(name)


def _operations(name: str) -> Backend:
    ops = [getattr(torch.ops.pydrone, x).default for x in SCHEMAS]
    if name == "reference":
        return Backend(name, False, *(getattr(reference, x) for x in SCHEMAS))
    if name == "triton":
        checked, unchecked = ([partial(getattr(triton, x), checked=y) for x in SCHEMAS] for y in (True, False))
        if native.CUDA_MISSING is not None and not triton.interpreted():  # torch.ops runs Triton on CUDA tensors
            checked = [*map(_unless_traced, ops, checked)]
        return Backend(name, False, *checked, Backend(name, True, *unchecked))
    return Backend(name, True, *ops, prepare_append=prepare if name == "cpu" else None)


def _unless_traced(operation: Callable[..., None], launch: Callable[..., None]) -> Callable[..., None]:
    """``launch``, which costs less on the host; ``operation`` in a trace."""

    def call(*args) -> None:
        (operation if torch.compiler.is_compiling() else launch)(*args)

    return call


def _by_cursor(eager: Backend, captured: Backend) -> Backend:
    """``captured`` for calls with a cursor, as in a CUDA graph, ``eager`` for others.

    A capture may not load kernels, so what ``captured`` has not prepared by then ``eager`` does; and so it does where
    Triton fails, for instance because there is no C compiler for its launcher.
    """

    def unchecked(name: str) -> Callable[..., None]:
        call, again, at = getattr(eager, name), getattr(captured.prepared, name), _cursor_of(name)
        return lambda *args: (call if args[at] is None else again)(*args)

    def checked(name: str) -> Callable[..., None]:
        call, launch, again = getattr(eager, name), getattr(captured, name), getattr(captured.prepared, name)
        at = _cursor_of(name)

        def run(*args) -> None:
            if args[at] is None:
                return call(*args)
            within = capturing(args[at].get_device())
            try:
                return again(*args) if within else launch(*args)
            except Exception as error:  # of any kind: a compiler's, a driver's
                if not within:
                    warnings.warn(f"{name}: Triton failed, CUDA does it: {error}", RuntimeWarning, stacklevel=2)
                return call(*args)

        return run

    prepared = Backend(eager.name, True, *map(unchecked, SCHEMAS))
    return Backend(eager.name, True, *map(checked, SCHEMAS), prepared)


def _cursor_of(name: str) -> int:
    return [x.name for x in torch._C.parse_schema(name + SCHEMAS[name]).arguments].index("cursor")


def written(*tensors: torch.Tensor) -> None:
    """Bumps the autograd version of the tensors an operation wrote, so that autograd detects an overwritten saved one.

    The kernels write through raw pointers, which PyTorch does not see.
    """
    if not torch.compiler.is_compiling():  # a trace takes the writes from the schema
        bump([x for x in tensors if not x.is_inference()])


# what torch.autograd.graph.increment_version calls, without its search for a single tensor, which costs as much again
increment_version = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


def bump(tensors: list[torch.Tensor]) -> None:
    """Like :func:`written`, for tensors known not to be inference tensors."""
    if not torch.compiler.is_compiling():
        increment_version(tensors)
