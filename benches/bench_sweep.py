"""How the cost grows with N at 100 steps, and with T at 1024 environments; pydrone, rsl_rl and a memcpy, cold."""

from __future__ import annotations

from suite import SWEPT

OPERATIONS = [f"sweep: {operation}" for operation in SWEPT]


def test_sweep(case, replay):
    replay()
