"""Stubs for NVIDIA's libraries, so that a CUDA build of torch can be imported where they are not installed.

PyPI has no CPU builds of torch for Linux on x86-64, and the dependencies of its CUDA builds take several GB. Code on
the CPU calls none of them, but the loader needs every library that torch is linked with, and every symbol. Each stub
returns an error, so torch finds no device. Needs gcc, nm and objdump.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

NVIDIAS = re.compile(r"_*(cu|nccl|nv|Nv)\w+")
ERROR = 35  # cudaErrorInsufficientDriver


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def make(torch_libraries: Path, out: Path) -> None:
    """Writes to ``out`` the stub libraries that the libraries in ``torch_libraries`` need."""
    wanted, defined, undefined, home = set(), set(), set(), {}
    for library in torch_libraries.glob("*.so*"):
        headers = _run("objdump", "-p", library)
        wanted |= set(re.findall(r"NEEDED\s+(lib(?:cu|nccl|nv)\S+)", headers))
        file = None
        for line in headers.partition("Version References:")[2].splitlines():
            if found := re.match(r"\s+required from (\S+):", line):
                file = found[1]
            elif file and line.strip():
                home[line.split()[-1]] = file
        for line in _run("nm", "-D", library).splitlines():
            kind, name = line.split()[-2:]
            if kind == "U":
                undefined.add(name)
            else:
                defined.add(name.split("@")[0])
    wanted -= {library.name for library in torch_libraries.iterdir()}
    runtime = next(name for name in wanted if "cudart" in name)
    # Library to version to symbols: the loader looks symbols up by version.
    symbols: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for symbol in sorted(undefined):
        name, _, version = symbol.partition("@")
        if name not in defined and NVIDIAS.fullmatch(name):
            symbols[home.get(version, runtime)][version].append(name)
    out.mkdir(parents=True, exist_ok=True)
    source, script = out / "stand_in.c", out / "stand_in.map"
    for library in wanted:
        source.write_text("".join(map(_function, sorted({name for x in symbols[library].values() for name in x}))))
        versions = [f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in symbols[library].items() if v]
        script.write_text("".join(versions) or "{ global: *; };\n")
        options = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        _run("gcc", *options, source, "-o", out / library)


def _function(name: str) -> str:
    if name.endswith(("ErrorString", "ErrorName")):
        return f'const char *{name}(void) {{ return "a stand-in, not CUDA"; }}\n'
    return f"int {name}(void) {{ return {ERROR}; }}\n"
