"""docs/environment-variables.md lists every environment variable that the sources read, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pydrone.doctor import machine

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pydrone", "triton_kernels", "benches", "tests")
# Read only by torch's build commands, but documented.
OTHERS = {"MAX_JOBS"}


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def keys(node: ast.AST) -> Iterator[ast.expr]:
    """The names that ``node`` looks up in the environment."""
    if isinstance(node, ast.Subscript) and is_environ(node.value):
        yield node.slice
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        of_environ = is_environ(node.func.value) and node.func.attr in ("get", "setdefault", "pop")
        if of_environ or node.func.attr == "getenv":
            yield node.args[0]
    if isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
        yield node.left


def variables(source: str) -> set[str]:
    """The environment variables a module reads, including names passed to a function that looks up its parameter."""
    tree = ast.parse(source)
    assert not re.search(r"from os import .*\b(environ|getenv)\b", source), "use os.environ, which this test looks for"
    found, functions = set(), set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            parameters = {argument.arg for argument in function.args.args}
            for node in ast.walk(function):
                for key in keys(node):
                    if isinstance(key, ast.Name) and key.id in parameters:
                        functions.add(function.name)
    for node in ast.walk(tree):
        for key in keys(node):
            if isinstance(key, ast.Constant):
                found.add(key.value)
            else:
                assert isinstance(key, ast.Name) and functions, f"line {key.lineno}: a name that cannot be followed"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def read_by_the_sources() -> dict[str, str]:
    """Each variable and a file that reads it."""
    found = {}
    for path in [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]:
        if path != Path(__file__):
            found |= dict.fromkeys(variables(path.read_text(encoding="utf-8")), path.name)
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            found |= dict.fromkeys(re.findall(r'getenv\("(\w+)"', path.read_text(encoding="utf-8")), path.name)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found |= dict.fromkeys(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE), "Makefile")
    return found | dict.fromkeys(machine.VARIABLES, "machine.py")


def listed() -> list[str]:
    """The names in the table's first column."""
    text = (ROOT / "docs" / "environment-variables.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_table_is_complete():
    read = read_by_the_sources()
    missing = {name: file for name, file in read.items() if name not in listed()}
    assert not missing, f"docs/environment-variables.md lacks {missing}"


def test_the_table_lists_nothing_else_and_nothing_twice():
    names = listed()
    assert set(names) - OTHERS <= set(read_by_the_sources())
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("os.environ['A']; os.environ.get('B'); os.environ.setdefault('C', '1'); os.getenv('D')", {"A", "B", "C", "D"}),
        ("x = 'A' in os.environ or 'B' not in os.environ\nos.environ.pop('C')", {"A", "B", "C"}),
        ("def f(name):\n    return os.environ.get(name)\nf('A'), f('B')", {"A", "B"}),
        ("child = dict(os.environ) | {'A': '1'}", set()),
    ],
)
def test_what_counts_as_read(source, expected):
    assert variables(source) == expected


@pytest.mark.parametrize(
    "source", ["os.environ.get('A' + 'B')", "name = 'A'\nos.environ[name]", "from os import getenv"]
)
def test_a_name_that_cannot_be_followed_is_an_error(source):
    with pytest.raises(AssertionError):
        variables(source)
