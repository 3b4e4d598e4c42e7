"""Imports run one way, from the command line down to the operations, and never form a cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pydrone

PACKAGE = Path(pydrone.__file__).resolve().parent
KERNELS = Path(__file__).resolve().parents[2] / "triton_kernels"  # installed as pydrone._triton

# The house from top to bottom: a room imports only from rooms below it. Rooms on one line are neighbours and do not
# import each other. A room is a module, or a package with all its contents.
HOUSE = (
    "pydrone.__main__",
    "pydrone.cli",
    "pydrone.report pydrone.doctor",
    "pydrone.integrations",
    "pydrone.ppo.trainer pydrone.ppo.export",
    "pydrone.ppo.exporting",
    "pydrone.ppo.training",
    "pydrone.ppo.learner",
    "pydrone.ppo.policy",
    "pydrone.ppo.configfile",
    "pydrone.ppo.presets",
    "pydrone.ppo.config pydrone.ppo.distributed",
    "pydrone.envs",
    "pydrone.buffer pydrone.memory",
    "pydrone.rollout",
    "pydrone.estimators",
    "pydrone.ops pydrone._triton",
    "pydrone._version",
)
# Packages with names for users that are imported on first use (``pydrone.gae``, ``pydrone.ppo.fused_update``).
DOORS = {"pydrone", "pydrone.ppo"}
# Two neighbours that need each other without a cycle: a launcher is loaded when it is called, and reads the schemas.
ONE_ROOM = {"pydrone.ops", "pydrone._triton"}


def modules() -> dict[str, Path]:
    found = {}
    for name, folder in (("pydrone", PACKAGE), ("pydrone._triton", KERNELS)):
        for path in folder.rglob("*.py"):
            parts = (name, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(module: str, source: str, known: set[str]) -> Iterator[str]:
    """The modules of pydrone that ``source`` imports: anywhere in it, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            kernels = module.startswith("pydrone._triton")  # whose package may have either name
            assert node.level == 0 or kernels, f"{module}: relative imports do not say in which room a name lives"
            base = f"pydrone._triton.{node.module}" if node.level else node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module:
                yield name


def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: set(imported(name, path.read_text(), set(found))) for name, path in found.items()}


def floor(module: str) -> int:
    """The line of HOUSE that holds a module."""
    for number, rooms in enumerate(HOUSE):
        if any(module == room or module.startswith(f"{room}.") for room in rooms.split()):
            return number
    raise AssertionError(f"{module}: in no room of the house; give it one in HOUSE, and in CONTRIBUTING.md")


def room(module: str) -> str:
    found = next(x for x in HOUSE[floor(module)].split() if module == x or module.startswith(f"{x}."))
    return "pydrone.ops" if found in ONE_ROOM else found


def upwards(imports: dict[str, set[str]]) -> list[str]:
    """The imports that run up the house or to a neighbour."""
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        if module not in DOORS
        for name in names - DOORS
        if floor(name) <= floor(module) and room(name) != room(module)
    ]


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """The modules of one import cycle, or None."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for name in sorted(imports[module]):
            if found := walk(name, [*path, module]):
                return found
        done.add(module)
        return None

    return next((found for module in sorted(imports) if (found := walk(module, []))), None)


def test_no_import_runs_up_the_house():
    assert not upwards(graph())


def test_no_circle():
    assert circle(graph()) is None


def test_the_three_that_an_embedder_touches_stand_at_the_top():
    files = {path.name for path in PACKAGE.glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "_version.py", "buffer.py", "estimators.py", "memory.py"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pydrone.b", ["pydrone.b"]),
        ("def f():\n    from pydrone.b import c", ["pydrone.b"]),
        ("from pydrone import b", ["pydrone.b"]),
        ("if TYPE_CHECKING:\n    from pydrone.b import C", ["pydrone.b"]),
        ("from torch import b", []),
    ],
)
def test_imports_are_found_wherever_they_stand(source, found):
    assert list(imported("pydrone.a", source, {"pydrone.a", "pydrone.b"})) == found


def test_a_circle_and_an_import_upwards_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert upwards({"pydrone.ops.schema": {"pydrone.buffer"}}) == ["pydrone.ops.schema imports pydrone.buffer"]
    assert upwards({"pydrone.report.runs": {"pydrone.doctor.machine"}})
    assert not upwards({"pydrone.buffer": {"pydrone.ops.schema"}, "pydrone.ops.native": {"pydrone.ops.schema"}})
