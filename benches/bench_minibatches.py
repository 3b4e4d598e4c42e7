"""One epoch of shuffled minibatches of everything that PPO learns from. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["minibatch epoch"]


def test_minibatches(case, replay):
    replay()
