"""The hover protocol: held-out episodes, equal for every policy and simulator. docs/evaluation.md is its definition."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pydrone.envs import Randomization, make
from pydrone.envs.base import Obs
from pydrone.envs.drone import DroneState
from pydrone.envs.hover_task import HoverTask, initial_motion

VERSION = 1
EPISODES = 256  # in each scene
SECONDS, FINAL_SECONDS = 10.0, 5.0
SETTLED = 0.2  # m
CENTRE = (0.0, 0.0, 1.0)  # of the targets, m

# Initial states, uniform: |x|, |y| and |z| from the centre in m, tilt in rad, |velocity| and |angular velocity| along
# and about each body axis in m/s and rad/s.
OFFSET, TILT, VELOCITY, ANGULAR_VELOCITY = (1.0, 1.0, 0.5), math.pi / 4, 1.0, 2.0
RADIUS, SPEED = 0.5, 0.5  # of a moving target's circle: m, m/s

RANGES = Randomization(
    mass=(0.9, 1.1),
    inertia=(0.8, 1.2),
    thrust=(0.95, 1.05),
    motor_lag=(0.0, 0.03),
    latency=(0, 1),
    wind=(0.0, 0.02),
    pos_noise=(0.0, 0.005),
    att_noise=(0.0, 0.01),
    vel_noise=(0.0, 0.02),
    gyro_noise=(0.0, 0.05),
)
#: name -> (whether targets move, whether the drone is randomised)
SCENES = {
    "fixed": (False, False),
    "moving": (True, False),
    "fixed, randomised": (False, True),
    "moving, randomised": (True, True),
}


class Drones(Protocol):
    """What the protocol needs of an environment beside :class:`pydrone.envs.Env`: the drones' task and ``place``."""

    task: HoverTask

    def place(self, state: DroneState) -> Tensor:
        """Puts the drones into ``state`` and returns the observations."""
        ...


class Flight(NamedTuple):
    """The episodes of all scenes, on the CPU."""

    dt: float
    """Seconds per step."""
    distance: dict[str, Tensor]
    """[T, 256] of each scene: to the target after each step, m; NaN from a crash on."""


def environment(name: str, device: torch.device | str = "cpu", seed: int = 0) -> Any:
    """The environment ``name`` as the protocol flies it: every scene's episodes side by side.

    ``seed``: of the randomised drones and the sensor noise. Raises ValueError for an environment without hover task.
    """
    env = make(name, len(SCENES) * EPISODES, device, seed, randomization=RANGES, resample_targets=False)
    if type(getattr(env, "task", None)) is not HoverTask or not hasattr(env, "place"):
        env.close()
        raise ValueError(f"--protocol hover: expected an environment with the hover task, as quadrotor, got {name}")
    return env


def initial_states(device: torch.device | str = "cpu") -> DroneState:
    """The initial states of a scene's episodes: [256, ...], the same in every scene, simulator and run."""
    drawn = torch.rand(EPISODES, 11, generator=torch.Generator().manual_seed(VERSION), dtype=torch.float64)
    pos = torch.tensor(CENTRE) + (2 * drawn[:, :3] - 1) * torch.tensor(OFFSET)
    state = DroneState(pos, *initial_motion(drawn[:, 3:], TILT, VELOCITY, ANGULAR_VELOCITY))
    return DroneState(*(x.to(device, torch.float32) for x in state))


def moving_targets(seconds: float) -> Tensor:
    """[256, 3]: the moving targets at a time, m: on a horizontal circle, even episodes one way, odd ones the other."""
    number = torch.arange(EPISODES, dtype=torch.float64)
    way = 1 - 2 * (number % 2)
    angle = 2 * math.pi * number / EPISODES + way * (seconds * SPEED / RADIUS)
    x, y, z = CENTRE
    at = torch.stack((x + RADIUS * angle.cos(), y + RADIUS * angle.sin(), torch.full_like(angle, z)), dim=1)
    return at.float()


@torch.no_grad()
def fly(env: Any, act: Callable[[Obs], Tensor], ended: Callable[[Tensor | None], None] = lambda dones: None) -> Flight:
    """Flies all scenes. ``env`` as :func:`environment` makes it; ``act`` and ``ended`` as in
    :func:`pydrone.report.evaluation.fly`."""
    task, device = env.task, env.device
    dt, scenes = task.config.dt, list(SCENES.values())
    steps = round(SECONDS / dt)
    randomised = torch.tensor([x for _, x in scenes]).repeat_interleave(EPISODES).to(device)
    still = torch.tensor(CENTRE, device=device).expand(EPISODES, 3)
    moving = torch.stack([moving_targets(step * dt) for step in range(steps + 1)]).to(device)

    def targets(step: int) -> Tensor:
        return torch.cat([moving[step] if moves else still for moves, _ in scenes])

    env.reset()
    task.randomizer.make_nominal(~randomised)
    task.target.copy_(targets(0))
    state = initial_states(device)
    obs = env.place(DroneState(*(x.repeat(len(scenes), 1) for x in state)))
    ended(None)
    distance = torch.full((steps, env.num_envs), math.nan, device=device)
    flying = torch.ones(env.num_envs, dtype=torch.bool, device=device)
    for step in range(steps):
        target = targets(step + 1)  # what the observation after this step shows
        task.target.copy_(target)
        result = env.step(act(obs))
        flying = flying & ~result.dones
        away = torch.linalg.vector_norm(target - task.last_pos, dim=1)
        distance[step] = torch.where(flying, away, math.nan)
        ended(result.dones)
        obs = result.obs
    parts = distance.cpu().split(EPISODES, dim=1)
    return Flight(dt, dict(zip(SCENES, parts, strict=True)))


def figures(distance: Tensor, dt: float) -> dict[str, float | None]:
    """The figures of a scene from ``distance`` [T, N]: see docs/evaluation.md. None: infinite.

    Keys: survival, crash_rate, distance, distance_p95 (m), settling_time (s), settled.
    """
    survived = distance[-1].isfinite()
    last = distance[-round(FINAL_SECONDS / dt) :].double().mean(dim=0)
    final = torch.where(survived, last, math.inf)
    outside = ~(distance <= SETTLED)  # NaN, after a crash, is outside
    # the step after the last one outside
    steps = torch.arange(1, len(distance) + 1)[:, None]
    settled_at = (outside * steps).amax(dim=0)
    settled = settled_at < len(distance)
    settling = torch.where(settled, settled_at.double() * dt, math.inf)
    survival = survived.double().mean().item()
    found = {
        "survival": survival,
        "crash_rate": 1 - survival,
        "distance": _quantile(final, 0.5),
        "distance_p95": _quantile(final, 0.95),
        "settling_time": _quantile(settling, 0.5),
        "settled": settled.double().mean().item(),
    }
    return {name: None if math.isinf(x) else x for name, x in found.items()}


def _quantile(x: Tensor, q: float) -> float:
    """The smallest of ``x`` that at least a fraction ``q`` of them does not exceed; infinite ones count."""
    return x.sort().values[max(0, math.ceil(q * len(x)) - 1)].item()


def summary(runs: Sequence[Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{scene: {figure: {median, low, high}}} over the figures of several runs; None is infinite."""

    def spread(values: list[float | None]) -> dict[str, Any]:
        given = [math.inf if x is None else x for x in values]
        ends = {"median": statistics.median(given), "low": min(given), "high": max(given)}
        return {name: None if math.isinf(x) else x for name, x in ends.items()}

    return {
        scene: {name: spread([run[scene][name] for run in runs]) for name in found} for scene, found in runs[0].items()
    }
