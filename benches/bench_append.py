"""Storing a rollout step by step. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["append"]


def test_append(case, replay):
    replay()
