"""Compiles an exported C header with a small main, and runs that: its actions are compared with the policy's."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pydrone.ppo.exporting import ExportError
from pydrone.ppo.exporting.files import Runner

FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror")
LIMIT = 300  # seconds, for a busy machine

# Reads rows of an observation and a memory from the standard input, and writes rows of actions and the next memory.
_MAIN = """
#include <stdio.h>
#include "policy.h"

int main(void)
{
  float obs[P_NUM_OBS];
  RESULT
  MEMORY
  const int failed = P_self_test();
  if (failed) {
    fprintf(stderr, "its test vector %d", failed);
    return 1;
  }
  while (fread(obs, sizeof(float), P_NUM_OBS, stdin) == P_NUM_OBS) {
    CALL
  }
  return 0;
}
"""


def compiler() -> list[str] | None:
    """The command of a C compiler: ``CC`` where that is set, else cc, gcc or clang; None where there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    candidates = [named] if named else [["cc"], ["gcc"], ["clang"]]
    return next((command for command in candidates if shutil.which(command[0])), None)


def reader(path: Path, prefix: str, discrete: bool, memory: int) -> tuple[Runner, str] | None:
    """Runs the header at ``path``; None where there is no compiler.

    Raises ExportError where it does not compile without a warning, or its self-test fails.
    """
    command = compiler()
    if command is None:
        return None
    folder = tempfile.TemporaryDirectory(prefix="pydrone-export-")
    program = Path(folder.name) / "policy"
    shutil.copyfile(path, program.with_suffix(".h"))
    program.with_suffix(".c").write_text(_main(prefix, discrete, memory))
    built = _call([*command, *FLAGS, "-o", str(program), f"{program}.c", "-lm"], "be compiled")
    if built.returncode:
        said = built.stderr.decode(errors="replace").strip().splitlines() or [""]
        said = next((line for line in said if "error" in line), said[0]).replace(f"{folder.name}/", "")
        raise ExportError(f"{path}: not written: {shlex.join(command)} does not compile it: {said}")

    def run(obs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        _ = folder  # it is removed with the last reference to this function
        rows = obs if state is None else torch.cat((obs, state), -1)
        done = _call([str(program)], "run", rows.float().contiguous().numpy().tobytes())
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
            raise ExportError(f"{path}: not written: its program ends with an error: {said}")
        got = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32).view(len(obs), -1)
        split = got.shape[1] - memory
        actions = got[:, :split]
        if discrete:
            actions = actions.contiguous().view(torch.int32).long().squeeze(1)
        return actions, got[:, split:] if memory else None

    return run, f"the C compiler {shlex.join(command)}"


def _main(prefix: str, discrete: bool, memory: int) -> str:
    given = "&memory, " if memory else ""
    call = f"result[0] = P_act({given}obs);" if discrete else f"P_act({given}obs, result);"
    calls = [call, "fwrite(result, sizeof result, 1, stdout);"]
    if memory:
        calls.insert(0, "if (fread(memory.state, sizeof memory.state, 1, stdin) != 1) return 2;")
        calls.append("fwrite(memory.state, sizeof memory.state, 1, stdout);")
    text = (
        _MAIN.replace("RESULT", "int result[1];" if discrete else "float result[P_NUM_ACTIONS];")
        .replace("MEMORY\n", "P_memory memory;\n" if memory else "\n")
        .replace("CALL", "\n    ".join(calls))
    )
    for name in ("self_test", "act", "memory"):
        text = text.replace(f"P_{name}", f"{prefix}_{name}")
    return text.replace("P_NUM", f"{prefix.upper()}_NUM")


def _call(command: list[str], what: str, given: bytes = b"") -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, input=given, capture_output=True, timeout=LIMIT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExportError(f"not written: the C program cannot {what}, by {shlex.join(command[:1])}: {error}") from error
