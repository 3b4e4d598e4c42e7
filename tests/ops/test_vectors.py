"""The hot loops' machine code, read from the built library: each version works in whole vectors of its instruction set.

GCC takes selects and comparisons of vectors wider than the instruction set has apart into scalars, without a warning:
the results stay right, and the loop takes four times as long.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import NamedTuple

import instructions
import pytest

from pydrone.ops import native

pytestmark = pytest.mark.skipif(native.CPU_MISSING is not None, reason=f"no native library: {native.CPU_MISSING}")

VERSIONS = {"baseline": 16, "v3": 32, "v4": 64}  # bytes of a vector
# The least share of whole vectors among a loop's vector instructions. An operation on L lanes that is taken apart needs
# L narrow instructions or more (64 bytes for x86-64-v3: shares of 0.23 to 0.5). Loops that only compute, load and store
# have none; others widen bytes, 32-bit numbers or scalars, which takes one narrow instruction for two wide ones.
ONLY_WIDE, WIDENS = 0.8, 0.6
# GAE also widens a code to the size of a float64, and its streaming stores are 16 bytes each.
LEAST = {
    **dict.fromkeys(("permute", "locate", "look_floats", "look_doubles", "sum_of_squares", "moments"), ONLY_WIDE),
    **dict.fromkeys(("transpose", "encode_row"), ONLY_WIDE),
    "update": 0.55,  # without AVX, four of its numbers are scalars
    "mlp": WIDENS,
}
OTHERS = 0.4
REQUIRED = {"permute", "locate", "transpose", "look_floats", "look_doubles", "sum_of_squares", "update"}
SCALAR = re.compile(r"v?(\w+s[sd]|mov[dq]|pextr[bwdq]|pinsr[bwdq]|cvt\w+2s[sdi]l?)$")


class Loop(NamedTuple):
    """An innermost loop: its instructions, those on vectors, and those on vectors of the width asked for."""

    length: int
    vector: int
    whole: int


def width(instruction: str) -> int | None:
    """Bytes of the widest vector that an instruction names; 4 for one number in a vector register; None: no vector."""
    registers = re.findall(r"%([xyz])mm", instruction)
    if not registers:
        return None
    if SCALAR.match(instruction.split()[0]):
        return 4
    return {"x": 16, "y": 32, "z": 64}[max(registers)]


def loops(body: str, wanted: int) -> list[Loop]:
    """The innermost loops of a function: from a jump's target to a jump back to it, with no other loop between."""
    found = [(int(address, 16), text) for address, text in re.findall(r"^ +([0-9a-f]+):\t(.+)$", body, re.M)]
    back = []
    for address, text in found:
        jump = re.match(r"j\w+ +([0-9a-f]+)", text)
        if jump and found[0][0] <= int(jump[1], 16) <= address:
            back.append((int(jump[1], 16), address))
    inner = [x for x in back if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in back)]
    made = []
    for begin, end in inner:
        widths = [width(text) for address, text in found if begin <= address <= end]
        made.append(Loop(len(widths), sum(x is not None for x in widths), widths.count(wanted)))
    return made


def split(text: str) -> list[tuple[str, str, str, str]]:
    """(kind, version, demangled name, code) of the functions that are compiled for several instruction sets.

    The networks' products are in functions of their own, ``column``, or inlined into ``forward`` and ``backward``.
    """
    made, apart = [], set(re.findall(r"(mlp_\w+)::column<", text))
    for block in text.split("\n\n"):
        head = re.match(r"[0-9a-f]+ <(.*)>:\n", block)
        if head is None:
            continue
        versioned = re.search(r"(\w+)_(v3|v4|baseline)\(", head[1])
        network = re.search(r"(mlp_(v3|v4|base))::(column|forward|backward)\b", head[1])
        if versioned:
            made.append((versioned[1], versioned[2], head[1], block))
        elif network and (network[3] == "column") == (network[1] in apart):
            made.append(("mlp", network[2].replace("base", "baseline"), head[1], block))
    return made


@pytest.fixture(scope="module")
def functions() -> list[tuple[str, str, str, str]]:
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    if instructions.versions() == ["baseline"]:
        pytest.skip("the library has one version only: another processor than x86-64, or built by Clang")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(instructions.LIBRARY)]
    return split(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_every_loop_has_every_version(functions):
    found = {kind: {version for other, version, *_ in functions if other == kind} for kind, *_ in functions}
    found.pop("stream_rows")  # 64-byte stores are no faster
    assert found.keys() >= REQUIRED
    assert {kind for kind, versions in found.items() if versions != set(VERSIONS)} == set()


@pytest.mark.parametrize("version", VERSIONS)
def test_hot_loops_use_whole_vectors(version, functions):
    bad = []
    for kind, of, name, code in functions:
        if of != version or kind == "stream_rows":
            continue
        wanted = VERSIONS[version]
        if kind == "transpose":  # squares of at most 32 bytes; 16 x 16 for bytes
            wanted = 16 if "unsigned char" in name else min(wanted, 32)
        hot = max(loops(code, wanted), key=lambda loop: loop.whole, default=Loop(0, 0, 0))
        if hot.whole < LEAST.get(kind, OTHERS) * hot.vector or hot.whole == 0:
            bad.append(f"{name}: {hot}")
    assert not bad


def test_what_is_taken_apart_is_found():
    """Code of a select on 32-byte vectors: whole, and taken apart as GCC does."""
    whole = "\n".join(
        (
            "0000000000000000 <f_v3(float*)>:",
            "   0:\tvmovups (%rdi),%ymm0",
            "   4:\tvcmpltps %ymm1,%ymm0,%ymm2",
            "   8:\tvblendvps %ymm2,%ymm0,%ymm1,%ymm0",
            "   c:\tvmovups %ymm0,(%rdi)",
            "  10:\tjne    0 <f_v3(float*)>",
        )
    )
    assert loops(whole, 32) == [Loop(5, 4, 4)]
    apart = whole.replace(
        "   8:\tvblendvps %ymm2,%ymm0,%ymm1,%ymm0",
        "   5:\tvpextrd $0x1,%xmm2,%eax\n   6:\ttest   %eax,%eax\n   7:\tvmovss %xmm0,%xmm1,%xmm1\n"
        "   8:\tvpinsrd $0x1,%eax,%xmm3,%xmm3\n   9:\tvinserti128 $0x1,%xmm3,%ymm0,%ymm0",
    )
    assert loops(apart, 32) == [Loop(9, 7, 4)]
    assert [x[:2] for x in split(whole)] == [("f", "v3")]
