"""GAE over a whole rollout: advantages and returns. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["gae"]


def test_gae(case, replay):
    replay()
