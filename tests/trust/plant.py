"""Plants known mistakes, one at a time, and checks that the tests fail for each: ``make faults``.

    python tests/trust/plant.py [--only WORDS] [--relevant] [--list]

Works in a copy of the tree. For each fault in faults/, it rebuilds the C++ library if csrc/ changed, then runs the
tests until one fails: first those that should catch the fault, then all others. A fault that survives them all shows
that a test is missing; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
# The folders that the tests need; the rest of a checkout may be large.
FOLDERS = ("benches", "csrc", "docs", "examples", "pydrone", "tests", "triton_kernels")
TEST_LIMIT, BUILD_LIMIT = 1800, 900  # seconds; a fault that hangs counts as caught
# The table's own test looks for the replaced text, and the packaging test at the installed package.
OTHERS = ("--ignore", "tests/trust/test_faults.py", "--ignore", "tests/house/test_packaging.py")


class BadTable(Exception):
    """A fault that proves nothing: its text does not occur exactly once, it does not compile, it cannot be imported, or
    its tests are skipped because a package is missing."""


def planted(text: str, fault: Fault) -> str:
    """``text`` with the mistake."""
    found = text.count(fault.old)
    if found != 1:
        raise BadTable(f"{fault.name}: expected its text once in {fault.file}, found it {found} times")
    changed = text.replace(fault.old, fault.new)
    if changed == text:
        raise BadTable(f"{fault.name}: it changes nothing")
    return changed


class Tree:
    """A copy of the tree that can be built, tested and restored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        junk = shutil.ignore_patterns("__pycache__", ".*", "_triton", "results")
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, path / folder, ignore=junk)
        for file in ROOT.iterdir():
            if file.is_file() and not file.name.startswith("."):
                shutil.copy2(file, path)
        # An editable install points to the original tree; PYTHONPATH puts this copy before it.
        (path / "pydrone" / "_triton").symlink_to("../triton_kernels")
        self.environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
        self._built = self._sources()

    def _sources(self) -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in (self.path / "csrc").rglob("*") if file.is_file()}

    def run(self, *command: str, limit: int) -> tuple[int, str]:
        """(exit status, output) of a Python command; status 124 after ``limit`` seconds."""
        try:
            done = subprocess.run(
                [sys.executable, *command],
                cwd=self.path,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return 124, ""
        return done.returncode, done.stdout

    def test(self, *arguments: str) -> tuple[int, str]:
        """Runs pytest until the first failure."""
        return self.run("-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", *arguments, limit=TEST_LIMIT)

    def build(self) -> None:
        """Builds the C++ library if its sources changed since the last build."""
        sources = self._sources()
        if sources == self._built:
            return
        status, output = self.run("setup.py", "-q", "build_ext", "--inplace", limit=BUILD_LIMIT)
        if status:
            raise BadTable(f"the C++ library does not build:\n{output[-2000:]}")
        self._built = sources

    def check(self) -> None:
        """Checks that Python imports this tree's packages."""
        code = "import os, pydrone, pydrone._triton as t; print(*map(os.path.realpath, (pydrone.__file__, t.__file__)))"
        _, output = self.run("-c", code, limit=TEST_LIMIT)
        wanted = f"{self.path}/pydrone/__init__.py {self.path}/triton_kernels/__init__.py"
        if output.strip() != wanted:
            raise BadTable(f"expected Python to import {wanted}, got {output}")

    def caught(self, fault: Fault, relevant: bool) -> str | None:
        """Plants the fault, runs the tests and removes it. Returns the first failure, or None if there was none."""
        failed = self._planted(fault, fault.tests.split())
        if failed is None and not relevant:
            failed = self._planted(fault, ["tests", *OTHERS])
            if failed is not None:
                self.build()
                if "::" in failed and self.test(failed)[0]:
                    raise BadTable(f"{fault.name}: {failed} fails without it as well")
        return failed

    def _planted(self, fault: Fault, tests: Sequence[str]) -> str | None:
        file = self.path / fault.file
        text = file.read_text(encoding="utf-8")
        file.write_text(planted(text, fault), encoding="utf-8")
        try:
            self.build()
            return failure(fault, *self.test(*tests))
        finally:
            file.write_text(text, encoding="utf-8")


def failure(fault: Fault, status: int, output: str) -> str | None:
    """The first failure, from pytest's exit status and output; None if all tests passed."""
    if status == 0:
        return None
    if status == 124:
        return "ran too long"
    if status < 0:
        return f"crashed by signal {-status}"
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    if status != 1 or found is None:
        raise BadTable(f"{fault.name}: pytest ended with status {status}:\n{output[-2000:]}")
    return found[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only faults whose name or file contains this")
    parser.add_argument("--relevant", action="store_true", help="run only the tests that should catch a fault")
    parser.add_argument("--list", action="store_true", help="list the faults, plant none")
    options = parser.parse_args(arguments)
    faults = [x for x in FAULTS if options.only in x.name or options.only in x.file]
    if options.list:
        print(*(f"{x.file}: {x.name}" for x in faults), sep="\n")
        return 0
    if not faults:
        parser.error(f"--only: expected a part of a fault's name or file, got {options.only!r}")
    survivors, bad = [], []
    with tempfile.TemporaryDirectory(prefix="pydrone-faults-") as folder:
        tree = Tree(Path(folder).resolve())
        try:
            tree.check()
            # If the tests fail without a fault, their failing with one proves nothing.
            tests = sorted({test for fault in faults for test in fault.tests.split()})
            status, output = tree.test(*tests)
            if status:
                raise BadTable(f"expected the tests to pass without a fault:\n{output[-2000:]}")
            for number, fault in enumerate(faults, 1):
                began = time.monotonic()
                try:
                    by = tree.caught(fault, options.relevant)
                    survivors += [] if by else [fault.name]
                    said = f"caught by {by}" if by else "SURVIVED"
                except BadTable as error:
                    bad.append(fault.name)
                    said = f"NOT SHOWN: {error}"
                seconds = time.monotonic() - began
                print(f"{number:3}/{len(faults)}  {fault.file}: {fault.name}: {said} ({seconds:.0f} s)", flush=True)
        except BadTable as error:
            print(f"nothing can be shown: {error}", file=sys.stderr)
            return 2
    print(f"{len(faults) - len(survivors) - len(bad)} of {len(faults)} faults caught")
    print(*(f"  survived: {name}\n" for name in survivors), *(f"  not shown: {name}\n" for name in bad), sep="", end="")
    return 2 if bad else 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
