"""The Triton backend: the kernels of ``triton_kernels/``, not imported before the first launch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch


def missing() -> str | None:
    """None if the Triton kernels can run, else the reason. ``TRITON_INTERPRET=1`` runs them without a GPU."""
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'pydrone-rl[triton]'"
    if torch.cuda.is_available() or interpreted():
        built = find_spec("pydrone._triton") is not None
        return (
            None if built else "its kernels are missing: this is a source tree that is not installed (pip install -e)"
        )
    return "no CUDA device (TRITON_INTERPRET=1 interprets the kernels, slowly)"


def interpreted() -> bool:
    """Whether Triton kernels imported from now on will run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def serves(device: torch.device) -> bool:
    """Whether the operations on networks are Triton's on this device."""
    return device.type == "cuda"


def why_not(kernel: str, *subject: object) -> str | None:
    """Why the Triton kernel ``kernel`` cannot run here, or cannot serve ``subject``; None if it can.

    subject: what the ``why_not`` beside the kernel's launcher takes: for networks the actor's and the critic's
    parameters (weight and bias of each layer in turn) and the index of the products' precision in MATMUL. A kernel
    without one serves all that its operation takes.
    """
    if (reason := missing()) is not None:
        return reason
    name = f"pydrone._triton.{kernel}"
    if find_spec(name) is None:
        return f"there is no Triton kernel {kernel} yet"
    asked = getattr(import_module(name), "why_not", None)
    return None if asked is None else asked(*subject)


@functools.cache
def _launcher(module: str, name: str) -> Callable[..., object]:
    return getattr(import_module(f"pydrone._triton.{module}"), name)


def gae(*args, **options) -> None:
    _launcher("gae", "gae")(*args, **options)


def off_policy(*args, **options) -> None:
    _launcher("gae", "off_policy")(*args, **options)


def append(*args, **options) -> None:
    _launcher("append", "append")(*args, **options)


def gather(*args, **options) -> None:
    _launcher("gather", "gather")(*args, **options)


def activate(*args) -> None:
    _launcher("layers", "activate")(*args)


def activate_backward(*args) -> None:
    _launcher("layers", "activate_backward")(*args)


def ppo_loss(*args) -> None:
    _launcher("ppo_loss", "ppo_loss")(*args)


def ppo_gradients(*args) -> None:
    _launcher("ppo_gradients", "ppo_gradients")(*args)


def ppo_act(*args) -> None:
    _launcher("ppo_act", "ppo_act")(*args)


def ppo_step(*args) -> None:
    _launcher("ppo_act", "ppo_step")(*args)


def clipped_adam(*args) -> None:
    _launcher("clipped_adam", "clipped_adam")(*args)


def task_step(*args) -> None:
    """A step of :mod:`pydrone.envs.fused`."""
    _launcher("quadrotor", "step")(*args)


def task_propel(*args) -> None:
    """The forces before a simulator's step, see :mod:`pydrone.envs.fused`."""
    _launcher("propellers", "propel")(*args)


def task_programs(num_envs: int) -> int:
    """How many programs a step of ``num_envs`` drones takes."""
    return _launcher("quadrotor", "programs")(num_envs)
