"""What a planted mistake is."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``tests``: those that should fail, looked at before all others; arguments of pytest, separated by spaces."""

    name: str
    file: str
    old: str
    new: str
    tests: str
