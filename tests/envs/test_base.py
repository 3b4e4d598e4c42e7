from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from pydrone.envs import ENVIRONMENTS, Env, EpisodeStats, LogMeter, make
from pydrone.envs.base import check_actions


def test_import_is_light() -> None:
    code = "import sys, pydrone.envs, pydrone.envs.adapters; print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pydrone.envs.adapters" in modules
    assert not {"genesis", "gymnasium", "rsl_rl", "pydrone.envs.genesis_hover", "tensordict"} & set(modules)


def test_make_unknown_name() -> None:
    names = "genesis-course, genesis-hover, quadrotor, quadrotor-course"
    with pytest.raises(ValueError, match=f"name: expected one of {names}, got 'nope'"):
        make("nope", 1)


def test_make_passes_options_on() -> None:
    env = make("quadrotor", 3, "cpu", 5, max_episode_length=7)
    assert isinstance(env, Env)
    assert (env.num_envs, env.obs, env.actions, env.max_episode_length) == (3, 17, 4, 7)
    assert env.autoreset == "same_step"
    assert set(ENVIRONMENTS) == {"genesis-course", "genesis-hover", "quadrotor", "quadrotor-course"}


def test_episode_stats_table() -> None:
    stats = EpisodeStats(3, ("return",))
    no, yes = False, True
    # environments:      rewards             dones            count length return
    steps = [
        ([1.0, 10.0, 100.0], [no, no, no], (0, 0, 0)),
        ([2.0, 20.0, 200.0], [no, yes, no], (1, 2, 30)),
        ([3.0, 30.0, 300.0], [yes, no, yes], (2, 6, 606)),
        ([4.0, 40.0, 400.0], [yes, yes, no], (2, 3, 74)),
    ]
    for rewards, dones, expected in steps:
        log = stats.update(torch.tensor([rewards]), torch.tensor(dones))
        assert tuple(log[f"episode/{k}"].item() for k in ("count", "length", "return")) == expected
        assert all(value.ndim == 0 for value in log.values())


def test_episode_stats_leave_invalid_steps_out() -> None:
    stats = EpisodeStats(2, ("return",))
    stats.update(torch.tensor([[1.0, 1.0]]), torch.tensor([False, False]))
    stats.update(torch.tensor([[float("nan"), 1.0]]), torch.tensor([False, False]), torch.tensor([False, True]))
    log = stats.update(torch.tensor([[1.0, 1.0]]), torch.tensor([True, True]), torch.tensor([True, True]))
    assert {key: value.item() for key, value in log.items()} == {
        "episode/count": 2,
        "episode/length": 2 + 3,
        "episode/return": 2 + 3,
    }


def test_episode_stats_reset_forgets() -> None:
    stats = EpisodeStats(1, ("return",))
    stats.update(torch.tensor([[5.0]]), torch.tensor([False]))
    stats.reset()
    log = stats.update(torch.tensor([[2.0]]), torch.tensor([True]))
    assert [value.item() for value in log.values()] == [1, 1, 2]


def test_log_meter_means() -> None:
    meter = LogMeter()
    reused = torch.tensor(1.0)
    meter.add({"x": reused, "episode/count": torch.tensor(1.0), "episode/return": torch.tensor(10.0)})
    reused.fill_(3.0)  # an environment overwrites its own tensors
    meter.add({"x": reused, "episode/count": torch.tensor(3.0), "episode/return": torch.tensor(2.0)})
    meter.add({"y": torch.tensor(7.0)})
    assert meter.means() == {"x": 2.0, "episode/count": 4.0, "episode/return": 3.0, "y": 7.0}
    assert meter.means() == {}


@pytest.mark.parametrize(
    "value",
    [
        *(2.0, 2, np.float32(2), np.int64(2), np.array(2.0), torch.tensor(2), torch.tensor(2.0, requires_grad=True)),
        *(torch.tensor([1.0, 3.0]), torch.tensor([1, 3]), np.array([1.0, 3.0]), np.array([1, 3], np.uint16)),
    ],
    ids=repr,
)
def test_a_log_may_hold_numbers_of_any_kind(value: object) -> None:
    meter = LogMeter()
    meter.add({"x": value, "episode/count": value, "episode/x": value})
    meter.add({"x": torch.tensor(5.0), "empty": torch.zeros(0)})  # as of the episodes that ended, where none did
    per_env = getattr(value, "shape", ()) != ()
    # one number for each environment: its mean, and for what is a sum over episodes its sum
    assert meter.means() == {"x": 3.5, "episode/count": 4.0 if per_env else 2.0, "episode/x": 1.0}


def test_a_log_may_hold_what_is_not_a_number_and_keys_that_come_and_go() -> None:
    meter = LogMeter()
    meter.add({"x": math.nan, "y": 1.0, "z": True})
    meter.add({"y": np.array([2.0, 4.0])})
    meter.add({"x": 1.0, "y": torch.tensor(math.inf), "z": False})
    means = meter.means()
    assert math.isnan(means.pop("x")) and means == {"y": math.inf, "z": 0.5}


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ({"a/b": "x"}, r"log\['a/b'\]: expected a number, or one for each environment, got 'x'"),
        ({"a": None}, r"log\['a'\]: expected a number, or one for each environment, got None"),
        ({"a": {"b": 1.0}}, r"log\['a'\]: expected a number, or one for each environment, got \{'b': 1.0\}"),
        ({"a": [[1.0]]}, r"log\['a'\]: expected a number, or one for each environment, got shape \[1, 1\]"),
        ({"a": torch.zeros(2, 3)}, r"log\['a'\]: expected a number, or one for each environment, got shape \[2, 3\]"),
        ({"a": torch.tensor(1j)}, r"log\['a'\]: expected a number, or one for each environment, got torch.complex64"),
        ({3: 1.0}, r"log: expected names as keys, got 3"),
        ([1.0], r"log: expected a mapping of names to numbers, got list"),
    ],
)
def test_what_a_log_cannot_hold_is_named(log: object, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        LogMeter().add(log)


def test_log_meter_without_ended_episodes() -> None:
    meter = LogMeter()
    meter.add({"episode/count": torch.tensor(0.0), "episode/return": torch.tensor(0.0)})
    assert meter.means() == {"episode/count": 0.0}


def test_log_meter_across_inference_mode() -> None:
    meter = LogMeter()
    with torch.inference_mode():
        meter.add({"x": torch.tensor(1.0)})
    meter.add({"x": torch.tensor(2.0)})
    assert meter.means() == {"x": 1.5}


@pytest.mark.parametrize(
    ("actions", "error", "text"),
    [
        ([[0.0] * 4] * 2, TypeError, "actions: expected a torch.Tensor, got list"),
        (torch.zeros(4, 2), ValueError, r"actions: expected shape \[2, 4\], got \[4, 2\]"),
        (torch.zeros(2, 4, device="meta"), ValueError, "actions: expected a tensor on cpu, got one on meta"),
    ],
)
def test_check_actions(actions: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        check_actions(actions, 2, 4, torch.device("cpu"))


def test_check_actions_converts() -> None:
    out = check_actions(torch.ones(2, 4, dtype=torch.float64, requires_grad=True), 2, 4, torch.device("cpu"))
    assert out.dtype == torch.float32
    assert not out.requires_grad
