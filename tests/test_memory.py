"""The memory report, to the byte: the table of the reference task, and that the buffer takes what the plan says."""

from __future__ import annotations

import pytest
import torch

from pydrone import memory
from pydrone.buffer import RolloutBuffer


def test_the_tasks_table():
    made = memory.plan(num_envs=8192, num_steps=100, obs=17, actions=4, iterations=301)
    assert {x.name: x.nbytes for x in made.rollout} == {
        "observations": 55_705_600,
        "actions": 13_107_200,
        "rewards": 3_276_800,
        "done flags": 3_276_800,
    }
    assert made.rollout_nbytes == 75_366_400
    assert made.kept_nbytes == 22_685_286_400
    # A row: 17 + 4 observations and actions, log-probability, value, pool row number: 24 words, 96 bytes.
    assert {x.name: x.nbytes for x in made.resident}["rows"] == 8192 * 100 * 96
    # dones: 3 of 4 bytes. bfloat16: 96 bytes to 64 (34 + 7 words = 62). The pool: rows of 96 bytes and counts; without
    # it there is no row number either, but rounding up to 32 bytes hides that.
    assert dict(made.savings) == {
        "done flags as uint8 instead of int32 (always)": 8192 * 100 * 3,
        "bfloat16 observations (obs_dtype=torch.bfloat16)": 8192 * 100 * 32,
        "no pool of final observations (final_obs_rows=0)": 8192 * 96 + 8,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"capacity": 20},
        {"capacity": 13},
        {"obs_dtype": torch.bfloat16},
        {"fields": {"mu": 2, "mask": ((3,), torch.bool)}},
        {"max_episode_length": 4},
        {"final_obs_rows": 0},
    ],
)
@pytest.mark.parametrize("obs", [3, {"policy": 5, "camera": ((2, 4), torch.uint8)}])
def test_the_plan_is_what_the_buffer_takes(obs, options):
    buf = RolloutBuffer(6, 10, obs, 2, **options)
    assert memory.plan(6, 10, obs, 2, **options).nbytes == buf.nbytes


def test_a_reused_minibatch_is_in_the_plan():
    buf = RolloutBuffer(6, 10, 3, 2)
    for _ in range(10):
        scalars = {name: torch.zeros(6) for name in ("rewards", "dones", "values", "log_probs")}
        buf.append(obs=torch.zeros(6, 3), actions=torch.zeros(6, 2), **scalars)
    buf.compute_gae(torch.zeros(6))
    for _ in buf.minibatches(4, reuse=True):
        pass
    assert memory.plan(6, 10, 3, 2, reused_minibatch=15).nbytes == buf.nbytes


def test_render_says_it_all():
    out = memory.render(memory.plan())
    for text in ("75,366,400", "75.4", "71.9", "22,685,286,400 bytes = 22.7 GB", "on-policy", "discard", "93,405,268"):
        assert text in out


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got -3"):
        memory.plan(num_envs=-3)
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        memory.plan(iterations=0)
