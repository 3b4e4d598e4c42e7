"""The type of a planted mistake."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``tests``: the tests that should fail, run before all others; pytest arguments, separated by spaces."""

    name: str
    file: str
    old: str
    new: str
    tests: str
