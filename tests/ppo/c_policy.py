"""Runs an exported C header by a main of the tests' own, in C and in C++."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wshadow", "-Wdouble-promotion", "-Wundef"]
# The language, and what compiles it.
COMPILERS = {"c": ["gcc", "-std=c99", *WARNINGS], "cpp": ["g++", "-std=c++11", "-Wold-style-cast", *WARNINGS]}

MAIN = """
#include <stdio.h>
#include "policy.h"

int main(void)
{
  float obs[P_NUM_OBS];
  int i, rows = 0, row;
  ANSWER
  if (scanf("%d", &rows) != 1) return 3;
  if (p_self_test() != 0) return 4;
  for (row = 0; row < rows; ++row) {
    for (i = 0; i < P_NUM_OBS; ++i) if (scanf("%f", &obs[i]) != 1) return 5;
    CALL
    printf("\\n");
  }
  return 0;
}
"""


def need_compilers() -> None:
    for command in COMPILERS.values():
        if shutil.which(command[0]) is None:
            pytest.skip(f"there is no {command[0]} to compile C headers with")


def prefix_of(path: Path) -> str:
    return re.search(r"static inline \w+ (\w+)_act\(", path.read_text())[1]


def metadata(path: Path) -> dict[str, str]:
    """What the header says of itself, by the names that other formats' metadata have."""
    text = path.read_text()
    prefix = prefix_of(path).upper()
    found = {
        name.lower(): value for name, value in re.findall(rf"#define {prefix}_(NUM_OBS|NUM_ACTIONS|MEMORY) (\d+)", text)
    }
    comment = " ".join(text.partition("*/")[0].replace("\n *", " ").split())
    said = re.search(r"It was trained in (?P<env>\S+), iteration (?P<iteration>\d+)\.", comment)
    return {"memory": "0", "comment": comment, **found, **(said.groupdict() if said else {})}


def build(path: Path, language: str, folder: Path, *flags: str) -> Path:
    """The program of the header at ``path``. It fails the test where it does not compile without a warning."""
    text, said, prefix = path.read_text(), metadata(path), prefix_of(path)
    memory, discrete = said["memory"] != "0", f"static inline int {prefix}_act(" in text
    given = "&memory, " if memory else ""
    answer = "" if discrete else "float actions[P_NUM_ACTIONS];"
    call = f'printf("%d ", p_act({given}obs));' if discrete else f"p_act({given}obs, actions);"
    if not discrete:
        call += '\n    for (i = 0; i < P_NUM_ACTIONS; ++i) printf("%.9g ", (double)actions[i]);'
    if memory:
        answer += " p_memory memory; p_reset(&memory);"
        call = 'for (i = 0; i < P_MEMORY; ++i) if (scanf("%f", &memory.state[i]) != 1) return 6;\n    ' + call
        call += '\n    for (i = 0; i < P_MEMORY; ++i) printf("%.9g ", (double)memory.state[i]);'
    main = MAIN.replace("ANSWER", answer).replace("CALL", call)
    if language == "cpp":
        main = main.replace("(double)actions[i]", "double(actions[i])").replace(
            "(double)memory.state[i]", "double(memory.state[i])"
        )
    main = re.sub(r"\bp_(?=act|reset|memory|self)", f"{prefix}_", main)
    main = re.sub(r"\bP_(?=NUM|MEM)", f"{prefix.upper()}_", main)
    (folder / f"main.{language}").write_text(main)
    (folder / "policy.h").write_text(text)  # it may be there
    program = folder / f"program-{language}"
    command = [*COMPILERS[language], *(flags or ("-O1",)), "-o", program, folder / f"main.{language}", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, obs: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
    """What the program prints for each row."""
    rows = obs if memory is None else torch.cat((obs, memory), 1)
    given = f"{len(rows)}\n" + "\n".join(" ".join(f"{x:.9g}" for x in row) for row in rows.tolist())
    done = subprocess.run([program], input=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}"
    return torch.tensor([[float(x) for x in line.split()] for line in done.stdout.splitlines()], dtype=torch.float64)


def act(path: Path, obs: torch.Tensor, memory: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Actions [B, A] float32 (discrete: int64 [B]) and, with a memory [B, S], the next one; C and C++ agree."""
    with tempfile.TemporaryDirectory() as folder:
        answers = [run(build(path, language, Path(folder)), obs, memory) for language in COMPILERS]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=0, equal_nan=True)
    size = int(metadata(path)["memory"])
    rows = answers[0]
    actions, state = rows[:, : rows.shape[1] - size], rows[:, rows.shape[1] - size :].float()
    discrete = f"static inline int {prefix_of(path)}_act(" in path.read_text()
    return [actions[:, 0].long() if discrete else actions.float(), *([state] if size else [])]
