"""``pydrone memory``: its arguments reach the plan; tests/test_memory.py tests the plan itself."""

from __future__ import annotations

import pytest
import torch

from pydrone import memory
from pydrone.cli.main import main

GIVEN = ["--num-envs", "6", "--num-steps", "10", "--num-obs", "3", "--num-actions", "2", "--iterations", "7"]
GIVEN += ["--capacity", "20", "--obs-dtype", "bfloat16", "--max-episode-length", "5", "--reused-minibatch", "15"]


def test_the_defaults_are_the_tasks(capsys):
    assert main(["memory"]) == 0
    assert capsys.readouterr().out == memory.render(memory.plan()) + "\n"


def test_every_argument_counts(capsys):
    assert main(["memory", *GIVEN, "--field", "mu=2", "--field", "sigma=2"]) == 0
    options = {"capacity": 20, "obs_dtype": torch.bfloat16, "max_episode_length": 5, "fields": {"mu": 2, "sigma": 2}}
    made = memory.plan(6, 10, 3, 2, iterations=7, reused_minibatch=15, **options)
    assert capsys.readouterr().out == memory.render(made) + "\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-envs", "-3"], "num_envs: expected at least 1, got -3"),
        (["--field", "mu"], "--field: expected NAME=WIDTH, like mu=4, got 'mu'"),
    ],
)
def test_a_bad_argument_is_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["memory", *argv])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
