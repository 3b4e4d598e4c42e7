"""One process and NCCL: its messages, and torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import one_rank
import pytest
import torch
from torch import distributed

from pydrone.ppo.training import checkpoint

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_nccl_available() and distributed.is_gloo_available()),
        reason="this PyTorch lacks NCCL or gloo",
    ),
]


def test_messages_by_nccl(tmp_path):
    """Gradients, statistics and figures go through NCCL, a checkpoint's parts through gloo."""
    one_rank.compare("cuda", "cpu:gloo,cuda:nccl", tmp_path)


def test_torchrun_with_one_process_is_the_command_alone(tmp_path):
    pytest.importorskip("tyro")
    settings = ["train", "--env", "quadrotor", "--num-envs", "64", "--num-steps", "8", "--hidden-dims", "32", "32"]
    settings += ["--no-tensorboard", "--no-live", "--iterations", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "pydrone"]
    states = []
    for name, command in (("torchrun", torchrun), ("alone", [sys.executable, "-m", "pydrone"])):
        folder = tmp_path / name
        done = subprocess.run(
            [*command, *settings, "--run-dir", str(folder)], capture_output=True, text=True, env=dict(os.environ)
        )
        assert done.returncode == 0, done.stdout + done.stderr
        states.append(checkpoint.load(folder / "model_3.pt"))
    for name, x in states[0]["policy"].items():
        torch.testing.assert_close(states[1]["policy"][name], x, rtol=1e-5, atol=1e-6, msg=name)
