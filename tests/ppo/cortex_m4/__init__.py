"""Builds an exported policy for a Cortex-M4F and runs it in qemu: flash and RAM in bytes, instructions of a call.

Flash is the program's size less that of the same program without the policy: weights, code, and what math.h adds. The
stack is what a call writes to. qemu's clock advances by 8 ns with each instruction (``-icount shift=3``), and the
processor's timer counts it at 168 MHz: 1.344 ticks an instruction, so that ticks give their number to one or two.
Instructions are not cycles: qemu knows neither the pipeline nor the flash's wait states.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

HERE = Path(__file__).parent
CHIP = ("-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard")
FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-ffunction-sections", "-fdata-sections")
TICKS = 168e6 * 8e-9  # per instruction
MACHINE = ["qemu-system-arm", "-M", "netduinoplus2", "-nographic", "-monitor", "none", "-serial", "none"]
MACHINE += ["-chardev", "stdio,id=host", "-semihosting-config", "enable=on,target=native,chardev=host"]
MACHINE += ["-icount", "shift=3"]


class Run(NamedTuple):
    """What the emulated processor said."""

    self_test: int
    flash: int
    """Bytes."""
    ram: int
    """Bytes that are always taken."""
    stack: int
    """Bytes of the stack that a call takes."""
    instructions: int
    actions: torch.Tensor
    """[B, A] float32."""


def need_tools() -> None:
    for tool, package in (("arm-none-eabi-gcc", "gcc-arm-none-eabi"), ("qemu-system-arm", "qemu-system-arm")):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} (Debian's package {package})")
    found = _call(["arm-none-eabi-gcc", *CHIP, "-print-file-name=libm.a"]).strip()
    if not Path(found).is_absolute():
        pytest.skip("there is no libm for the Cortex-M4F (Debian's package libnewlib-arm-none-eabi)")


def measure(header: Path, obs: torch.Tensor, folder: Path, *flags: str) -> Run:
    """Runs the policy of ``header``, with the prefix pydrone and continuous actions, on ``obs`` [B, O].

    ``flags``: the compiler's, besides its own.
    """
    rows = ",\n".join(
        "{" + ", ".join(f"{x:.9g}f" if "." in f"{x:.9g}" else f"{x:.1f}f" for x in r) + "}" for r in obs.tolist()
    )
    (folder / "inputs.h").write_text(
        f"#define ROWS {len(obs)}\nstatic const float inputs[ROWS][{obs.shape[1]}] = {{\n{rows}\n}};\n"
    )
    (folder / "policy.h").write_text(header.read_text())  # it may be there
    flash, ram = _build(folder, "policy", *flags)
    empty_flash, empty_ram = _build(folder, "empty", *flags, "-DEMPTY", "-Wno-unused-const-variable")
    said = _call([*MACHINE, "-kernel", str(folder / "policy.elf")]).split()
    failed, idle, busy, stack, *bits = (int(x, 16) for x in said)
    actions = torch.tensor(struct.unpack(f"<{len(bits)}f", struct.pack(f"<{len(bits)}I", *bits)))
    return Run(
        failed,
        flash - empty_flash,
        ram - empty_ram,
        stack,
        round((busy - idle) / TICKS),
        actions.view(len(obs), -1),
    )


def _build(folder: Path, name: str, *flags: str) -> tuple[int, int]:
    """The program's bytes of flash and RAM."""
    program = folder / f"{name}.elf"
    sources = [str(HERE / "startup.c"), str(HERE / "main.c")]
    command = ["arm-none-eabi-gcc", *CHIP, *FLAGS, *flags, f"-I{folder}", f"-I{HERE}", *sources, "-o", str(program)]
    _call([*command, "-nostartfiles", "-Wl,--gc-sections", f"-T{HERE / 'board.ld'}", "-lm"])
    text, data, bss = map(int, _call(["arm-none-eabi-size", str(program)]).splitlines()[1].split()[:3])
    return text + data, data + bss


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command[0]}: status {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout
