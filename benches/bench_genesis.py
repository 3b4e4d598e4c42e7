"""A whole training iteration on the Genesis simulator. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["training on Genesis"]


def test_training_on_genesis(case, replay):
    replay()
