"""How well a policy flies: one whole episode in every environment, with deterministic actions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydrone.envs.base import Env, Obs, autoreset_mode, begun, to_act_on

#: the final distance to the target is taken over this last part of an episode
FINAL_SECONDS = 5.0
# Steps between the host's checks whether all episodes have ended.
_LOOK = 50


class Paths(NamedTuple):
    """The states of the drones after each of at most T steps; NaN after the end of an episode."""

    dt: float
    """Seconds per step."""
    at_target: float
    """Distance in m below which a target counts as reached."""
    hold: int
    """Consecutive steps within this distance that it takes to reach a target, at least 1."""
    distance: Tensor
    """[T, N] to the target of the step, m."""
    pos: Tensor
    """[T, K, 3] of the first K environments, world, m."""
    quat: Tensor
    """[T, K, 4] (w, x, y, z), body to world."""
    target: Tensor
    """[T, K, 3] world, m."""


class Episodes(NamedTuple):
    """N episodes, one per environment, on the CPU."""

    resampled: bool
    """Whether targets moved once they were reached."""
    length: Tensor
    """[N] int64, steps."""
    crashed: Tensor
    """[N] bool: ended before the time limit."""
    returns: Tensor
    """[N] float32, sum of rewards."""
    paths: Paths | None
    """None if the environment has no task with drones and targets."""


@torch.no_grad()
def fly(
    env: Env,
    act: Callable[[Obs], Tensor],
    *,
    resample: bool = True,
    seed: int = 0,
    max_steps: int | None = None,
    traced: int = 8,
    ended: Callable[[Tensor | None], None] = lambda dones: None,
) -> Episodes:
    """Flies one episode of every environment, from ``env.reset()``.

    Paths are recorded if the ``task`` of the environment is a :class:`~pydrone.envs.hover_task.HoverTask` (or has its
    ``step``, ``target``, ``generator``, ``config`` and ``resample_targets``). In other environments only length, crash
    and return are known, and ``resample`` and ``seed`` have no effect.

    Args:
        env: the environments.
        act: maps observations [N, ...] to actions [N, ...].
        resample: whether a target moves once it is reached.
        seed: of the targets.
        max_steps: steps after which an episode is stopped, which does not count as a crash. None: the limit of the
            environment.
        traced: the number of environments, from the first, whose whole paths are kept.
        ended: called with None at the start, for all episodes, and after each step with a bool [N] of those whose
            next one begins: where a recurrent policy resets its state.

    Raises:
        ValueError: neither ``max_steps`` nor the environment limits the episodes.
    """
    limits = [limit for limit in (env.max_episode_length, max_steps) if limit is not None]
    if not limits:
        raise ValueError("max_steps: expected a number of steps, since the environment has no limit of its own")
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}")
    steps, num_envs, device = min(limits), env.num_envs, env.device
    autoreset, task = autoreset_mode(env.autoreset), _task(env)
    watch = None if task is None else _Watch(task, steps, min(traced, num_envs))
    if task is not None and watch is not None:
        before = task.resample_targets
        task.resample_targets = resample
        task.generator.manual_seed(seed)
        env.task = watch  # type: ignore[attr-defined]
    try:
        obs = env.reset()
        ended(None)
        flying = torch.ones(num_envs, dtype=torch.bool, device=device)
        crashed = torch.zeros_like(flying)
        length = torch.zeros(num_envs, dtype=torch.int64, device=device)
        returns = torch.zeros(num_envs, device=device)
        for step in range(steps):
            if watch is not None:
                watch.flying = flying
            result = env.step(act(obs))
            length += flying
            returns += torch.where(flying, result.rewards, 0)
            crashed |= flying & result.dones & ~result.truncated
            flying = flying & ~result.dones
            ended(begun(result, autoreset))
            obs = to_act_on(result, autoreset)
            if step % _LOOK == _LOOK - 1 and not flying.any():
                break
    finally:
        if task is not None:
            env.task = task  # type: ignore[attr-defined]
            task.resample_targets = before
    return Episodes(
        resample, length.cpu(), crashed.cpu(), returns.cpu(), None if watch is None else watch.paths(int(length.max()))
    )


def _task(env: Any) -> Any:
    """The task of the environment if it has what recording needs, else None."""
    task = getattr(env, "task", None)
    needed = ("step", "target", "generator", "config", "resample_targets")
    return task if all(hasattr(task, name) for name in needed) else None


class _Watch:
    """Wraps a task and records the drones' states in each step, before the environment resets those that ended."""

    def __init__(self, task: Any, steps: int, traced: int) -> None:
        num_envs, device = task.target.shape[0], task.target.device
        self._task, self._step, self._traced = task, 0, traced
        self._distance = torch.full((steps, num_envs), math.nan, device=device)
        # position 3, quaternion 4, target 3
        self._rows = torch.full((steps, traced, 10), math.nan, device=device)
        self.flying = torch.ones(num_envs, dtype=torch.bool, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def step(self, state: Any, actions: Tensor) -> Any:
        target, k = self._task.target, self._traced
        distance = torch.linalg.vector_norm(target - state.pos, dim=-1)
        self._distance[self._step] = torch.where(self.flying, distance, math.nan)
        row = torch.cat((state.pos[:k], state.quat[:k], target[:k]), dim=1)
        self._rows[self._step] = torch.where(self.flying[:k, None], row, math.nan)
        self._step += 1
        return self._task.step(state, actions)

    def paths(self, steps: int) -> Paths:
        pos, quat, target = self._rows[:steps].cpu().split((3, 4, 3), dim=-1)
        config = self._task.config
        hold = max(1, round(getattr(config, "hold", 0.0) / config.dt))
        return Paths(config.dt, config.at_target, hold, self._distance[:steps].cpu(), pos, quat, target)


def final_distance(paths: Paths, length: Tensor) -> Tensor:
    """[N]: median distance to the target over the last ``FINAL_SECONDS`` of each episode, or a shorter one's whole."""
    steps = torch.arange(paths.distance.shape[0])[:, None]
    last = steps >= length - round(FINAL_SECONDS / paths.dt)
    return torch.where(last, paths.distance, math.nan).nanmedian(dim=0).values


def targets_reached(episodes: Episodes) -> Tensor | None:
    """[N] int64: targets reached in each episode, at most one if they do not move; None without paths."""
    if episodes.paths is None:
        return None
    reached = episodes.paths.distance < episodes.paths.at_target
    if episodes.paths.hold > 1:
        held = torch.zeros(reached.shape[1], dtype=torch.int64)
        for step in reached:
            # a moving target is held for exactly `hold` steps, a fixed one possibly longer
            held = (held % episodes.paths.hold + 1 if episodes.resampled else held + 1) * step
            step.copy_(held == episodes.paths.hold)
    return reached.sum(dim=0) if episodes.resampled else reached.any(dim=0).long()


def success_distance(paths: Paths) -> float:
    """The final distance in m below which a drone counts as staying at a fixed target.

    Twice ``at_target``: in training a target moves once a drone is within ``at_target``, so that nothing rewards coming
    closer.
    """
    return 2 * paths.at_target


def succeeded(episodes: Episodes, within: float | None = None) -> Tensor | None:
    """[N] bool: no crash, and at least one moving target reached, or, with a fixed target, a final distance below
    ``within`` (default ``success_distance``). None without paths."""
    if episodes.paths is None:
        return None
    if episodes.resampled:
        reached = targets_reached(episodes)
        assert reached is not None
        arrived = reached > 0
    else:
        within = success_distance(episodes.paths) if within is None else within
        arrived = final_distance(episodes.paths, episodes.length) < within
    return arrived & ~episodes.crashed


def summary(episodes: Episodes, within: float | None = None) -> dict[str, Any]:
    """The figures of an evaluation as plain numbers, distances in m or None. ``within`` as in :func:`succeeded`."""
    figures: dict[str, Any] = {"episodes": len(episodes.length)}
    success, reached = succeeded(episodes, within), targets_reached(episodes)
    if episodes.paths is not None and success is not None and reached is not None:
        final = final_distance(episodes.paths, episodes.length)
        finite = final[final.isfinite()].tolist()  # a state that is not finite has no distance
        figures["success_rate"] = success.double().mean().item()
        figures["final_distance"] = statistics.median(finite) if finite else None
        figures["final_distance_quartiles"] = quartiles(finite)
        figures["targets_reached"] = reached.double().mean().item()
    figures["crash_rate"] = episodes.crashed.double().mean().item()
    figures["episode_length"] = episodes.length.double().mean().item()
    if episodes.paths is not None:
        figures["episode_seconds"] = figures["episode_length"] * episodes.paths.dt
    figures["episode_return"] = episodes.returns.double().mean().item()
    return figures


def quartiles(values: list[float]) -> list[float] | None:
    """The first and the third quartile; None if there are no values."""
    if len(values) < 2:
        return [values[0]] * 2 if values else None
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]
