"""What a call costs on the host, at a size whose kernels take less. See contenders.py."""

from __future__ import annotations

OPERATIONS = ["calls"]


def test_calls(case, replay):
    replay()
