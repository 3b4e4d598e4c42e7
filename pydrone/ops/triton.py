"""The Triton backend: the kernels of ``triton_kernels/``, not imported before the first launch."""

from __future__ import annotations

import os
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


def gae(*args) -> None:
    from pydrone._triton.gae import gae as launch

    launch(*args)


def off_policy(*args) -> None:
    from pydrone._triton.gae import off_policy as launch

    launch(*args)


def append(*args) -> None:
    from pydrone._triton.append import append as launch

    launch(*args)


def gather(*args) -> None:
    from pydrone._triton.gather import gather as launch

    launch(*args)


def activate(*args) -> None:
    from pydrone._triton.layers import activate as launch

    launch(*args)


def activate_backward(*args) -> None:
    from pydrone._triton.layers import activate_backward as launch

    launch(*args)


def ppo_loss(*args) -> None:
    from pydrone._triton.ppo_loss import ppo_loss as launch

    launch(*args)


def ppo_gradients(*args) -> None:
    from pydrone._triton.ppo_gradients import ppo_gradients as launch

    launch(*args)


def ppo_act(*args) -> None:
    from pydrone._triton.ppo_act import ppo_act as launch

    launch(*args)


def ppo_step(*args) -> None:
    from pydrone._triton.ppo_act import ppo_step as launch

    launch(*args)


def clipped_adam(*args) -> None:
    from pydrone._triton.clipped_adam import clipped_adam as launch

    launch(*args)


def task_step(*args) -> None:
    """A step of :mod:`pydrone.envs.fused`."""
    from pydrone._triton.quadrotor import step as launch

    launch(*args)


def task_propel(*args) -> None:
    """The forces before a simulator's step, see :mod:`pydrone.envs.fused`."""
    from pydrone._triton.propellers import propel as launch

    launch(*args)


def task_programs(num_envs: int) -> int:
    """How many programs a step of ``num_envs`` drones takes."""
    from pydrone._triton.quadrotor import programs

    return programs(num_envs)
