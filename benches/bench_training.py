"""A whole training iteration, with simulator and networks, and its update alone. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["update", "training"]


def test_training(case, replay):
    replay()
