"""Measures an iteration: the seconds of its stages, and the episodes that ended in it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pydrone.ops.schema import INVALID, RUNNING

# The timed stages of an iteration. One that is replayed as a graph has a single stage.
STAGES = ("env", "policy", "storage", "gae", "update")
REPLAY = "replay"


def stages_of(figures: Mapping[str, float]) -> dict[str, float]:
    """The seconds of those stages that ``figures`` contain."""
    return {stage: figures[f"time/{stage}"] for stage in (*STAGES, REPLAY) if f"time/{stage}" in figures}


_IMPORTED = time.monotonic()


def since_process_start() -> float:
    """Seconds since this process began; where the system does not say, since this module was imported."""
    try:
        # Fields after the command, which may hold blanks: the 22nd of all is the start, in ticks since the boot.
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.monotonic() - _IMPORTED


class Stopwatch:
    """Seconds per stage. On CUDA it records events in the stream, and does not wait for the device.

    Args:
        device: the device that does the work.
        stages: the stages of an iteration.
    """

    def __init__(self, device: torch.device, stages: Sequence[str] = STAGES) -> None:
        self._stages = tuple(stages)
        self._cuda = device.type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self._laps: list[tuple[str | None, torch.cuda.Event]] = []
        self._seconds = dict.fromkeys(self._stages, 0.0)
        self._last = 0.0

    def start(self) -> None:
        """Starts an iteration at zero seconds."""
        self._seconds = dict.fromkeys(self._stages, 0.0)
        self._last = time.perf_counter()
        if self._cuda:
            self._spare += [event for _, event in self._laps]
            self._laps = []
            self._record(None)

    def lap(self, stage: str) -> None:
        """Counts the time since the last call as ``stage``."""
        if self._cuda:
            self._record(stage)
        else:
            now = time.perf_counter()
            self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._last
            self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds per stage since :meth:`start`. On CUDA the device must have finished."""
        for (_, before), (stage, after) in zip(self._laps, self._laps[1:]):
            self._seconds[stage] = self._seconds.get(stage, 0.0) + before.elapsed_time(after) * 1e-3
        return dict(self._seconds)

    def _record(self, stage: str | None) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._laps.append((stage, event))


class EpisodeMeter:
    """Counts the episodes that end within a rollout, with their lengths and rewards, in a dozen launches per rollout.

    rsl_rl keeps the last 100 episodes in a deque on the host, which costs a synchronisation per step; this covers all
    episodes that ended in the iteration. An episode's reward is the plain sum, not discounted.
    """

    def __init__(self, num_envs: int, num_steps: int, device: torch.device) -> None:
        self._steps = torch.arange(1, num_steps + 1, device=device)
        # Of the running episodes, in earlier rollouts.
        self._length = torch.zeros(num_envs, device=device)
        self._reward = torch.zeros(num_envs, device=device)

    def update(self, rewards: Tensor, codes: Tensor) -> Tensor:
        """[3]: count, summed length and summed reward of the episodes that ended.

        rewards: [N, T]. codes: uint8 [N, T], the buffer's. Every step up to an environment's last end
        belongs to an episode that ended, so earlier ends do not matter.
        """
        counted = codes != INVALID
        ends = counted & (codes != RUNNING)
        last = torch.where(ends, self._steps, 0).amax(1, keepdim=True)  # steps up to the last end, 0 without one
        ended = last.squeeze(1) > 0
        before = self._steps <= last
        rewards = torch.where(counted, rewards, 0)
        reward_before, length_before = torch.where(before, rewards, 0).sum(1), (before & counted).sum(1)
        reward_after, length_after = torch.where(before, 0, rewards).sum(1), (counted & ~before).sum(1)
        totals = torch.stack(
            (
                ends.sum(),
                (length_before + torch.where(ended, self._length, 0)).sum(),
                (reward_before + torch.where(ended, self._reward, 0)).sum(),
            )
        )
        # In place: a captured graph keeps reading and writing the same memory.
        self._length.copy_(length_after + torch.where(ended, 0, self._length))
        self._reward.copy_(reward_after + torch.where(ended, 0, self._reward))
        return totals

    def state_dict(self) -> dict[str, Tensor]:
        """Length and reward so far of the running episodes; not copied."""
        return {"length": self._length, "reward": self._reward}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what ``state_dict`` returned."""
        self._length.copy_(state["length"])
        self._reward.copy_(state["reward"])
