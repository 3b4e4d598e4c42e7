"""The kernels of the learner and of the environment's step, each beside torch's code. See contenders.py."""

from __future__ import annotations

from contenders import KERNELS

OPERATIONS = KERNELS


def test_kernel(case, replay):
    replay()
