"""A whole training iteration, simulator and networks included. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["training"]


def test_training(case, replay):
    replay()
