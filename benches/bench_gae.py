"""GAE over a whole rollout: advantages and returns, of everybody. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["gae"]


def test_gae(case, replay):
    replay()
