"""Storage, GAE and all epochs of minibatches: an iteration without simulator and networks. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["iteration"]


def test_iteration(case, replay):
    replay()
