"""The hover task: fly to a target near the start and stay there, upright and calm. Shared by all simulators.

It is the task of the Genesis drone example (observations, rewards, ends and constants), written as pure functions of
the drone's state (:mod:`pydrone.envs.drone` has the frames) and a class :class:`HoverTask` for the state of the task
(target, last action, age). A simulator only moves the drones and resets those in ``StepResult.dones``.

It differs from the example where the example has errors. Here, rewards and final observations are computed before the
reset; a time-out is no truncation if the drone crashed in the same step; an episode has ``max_episode_length`` steps,
not one more; the last action in the first observation of an episode is zero; an observation holds the action that led
to it and the target of the next step. A state or an action that is not finite counts as a crash; the log's
``non_finite`` is the share of the drones that it happens to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from pydrone.envs.base import EpisodeStats, StepResult
from pydrone.envs.drone import (  # noqa: F401 (some are re-exported only)
    ACTION_DIM,
    ACTION_LIMITS,
    DroneConfig,
    DroneState,
    clip_actions,
    propeller_rpm,
    roll_pitch,
    rotate,
    rotate_inverse,
    yaw,
)
from pydrone.envs.fused import FusedStep, step_of, why_not
from pydrone.envs.randomization import Randomization
from pydrone.envs.randomizer import Randomizer
from pydrone.envs.task_options import TaskOptions

OBS_DIM = 17
#: how many initial states there are if they differ
INITIAL_STATES = 4096
#: the rewards; the last one only if its weight is not 0
REWARDS = ("target", "smooth", "yaw", "angular", "crash", "near")


@dataclass(frozen=True)
class HoverConfig(TaskOptions, DroneConfig):
    """Constants of the task beside its options: lengths in m, angles in degrees."""

    init_pos: tuple[float, float, float] = (0.0, 0.0, 1.0)
    target_low: tuple[float, float, float] = (-1.0, -1.0, 1.0)
    target_high: tuple[float, float, float] = (1.0, 1.0, 1.0)
    at_target: float = 0.1
    pos_scale: float = 1 / 3
    lin_vel_scale: float = 1 / 3
    ang_vel_scale: float = 1 / math.pi
    max_xy: float = 3.0
    max_z: float = 2.0
    min_height: float = 0.1
    max_tilt: float = 180.0
    """Limit of roll and pitch; 180 is never exceeded, so it is not checked."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dt <= 0:
            raise ValueError(f"dt: expected a positive number of seconds, got {self.dt}")


class Constants(NamedTuple):
    """A :class:`HoverConfig` with its values as tensors on a device."""

    config: HoverConfig
    scale: Tensor
    """[17] factors of the observation."""
    limit: Tensor
    """[17] upper clip limits of the observation, infinite where it is not clipped; ``lowest`` are the lower ones."""
    lowest: Tensor
    max_rel: Tensor
    """[3] largest distance to the target along x, y, z."""
    weights: Tensor
    """[5, 1] reward weights times dt, [6, 1] with ``near``."""
    initial: Tensor
    """[1 or INITIAL_STATES, 16] the states that an episode may begin in: position 3, quaternion 4, velocity 3 in the
    world, angular velocity 3, velocity 3 in the body frame. Those of one seed are the same on every device."""
    target_low: Tensor
    target_span: Tensor

    @classmethod
    def of(cls, config: HoverConfig, device: torch.device | str = "cpu", seed: int = 0) -> Constants:
        """The constants of ``config`` on ``device``; ``seed`` is that of the initial states."""

        def row(*values: float) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        one, free = (1.0,), (math.inf,)
        scale = (config.pos_scale,) * 3 + one * 4 + (config.lin_vel_scale,) * 3 + (config.ang_vel_scale,) * 3 + one * 4
        weights = (
            config.weight_target,
            config.weight_smooth,
            config.weight_yaw,
            config.weight_angular,
            config.weight_crash,
            *((config.weight_near,) if config.weight_near else ()),
        )
        limit = row(*one * 3, *free * 4, *one * 6, *free * 4)
        low = row(*config.target_low)
        return cls(
            config=config,
            scale=row(*scale),
            limit=limit,
            lowest=-limit,
            max_rel=row(config.max_xy, config.max_xy, config.max_z),
            weights=row(*weights)[:, None] * config.dt,
            initial=_initial_states(config, seed).to(device, torch.float32),
            target_low=low,
            target_span=row(*config.target_high) - low,
        )


def initial_motion(
    uniform: Tensor, tilt: float, velocity: float, angular_velocity: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attitude [N, 4], velocity [N, 3] and angular velocity [N, 3], in the body frame, from ``uniform`` [N, 8].

    Uniform up to ``tilt`` (rad) about a horizontal axis of any direction, and up to ``velocity`` (m/s) and
    ``angular_velocity`` (rad/s) along and about each axis; without a turn about the vertical.
    """
    way, tilted, along, about = uniform.split((1, 1, 3, 3), dim=1)
    half, way = tilted * tilt / 2, way * 2 * math.pi
    quat = torch.cat((half.cos(), half.sin() * way.cos(), half.sin() * way.sin(), torch.zeros_like(half)), dim=1)
    return quat, (2 * along - 1) * velocity, (2 * about - 1) * angular_velocity


def _initial_states(config: HoverConfig, seed: int) -> Tensor:
    ranges = math.radians(config.init_tilt), config.init_velocity, config.init_angular_velocity
    count = INITIAL_STATES if any(ranges) else 1
    uniform = torch.rand(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quat, lin_vel, ang_vel = initial_motion(uniform, *ranges)
    pos = torch.tensor(config.init_pos, dtype=torch.float64).expand(count, 3)
    return torch.cat((pos, quat, rotate(quat, lin_vel), ang_vel, lin_vel), dim=1) + 0.0  # no -0


def observe(state: DroneState, target: Tensor, last_actions: Tensor, c: Constants) -> Tensor:
    """Observation [N, 17]: target relative to the drone 3, quaternion 4, velocity 3, angular velocity 3, last action 4.

    The relative target and the velocities are scaled and clipped to [-1, 1], the others unchanged.
    """
    row = torch.cat((target - state.pos, state.quat, state.lin_vel, state.ang_vel, last_actions), dim=-1)
    return torch.clamp(row.mul_(c.scale), c.lowest, c.limit, out=row)


def is_finite(state: DroneState, actions: Tensor | float = 0.0) -> Tensor:
    """[N] bool: whether all numbers of a drone's state, and of its action [N, 4], are finite."""
    # a sum is finite only if its terms are
    return ((state.pos + state.lin_vel + state.ang_vel).sum(-1) + (state.quat + actions).sum(-1)).abs() < math.inf


def crashed(state: DroneState, target: Tensor, c: Constants, finite: Tensor | None = None) -> Tensor:
    """[N] bool: too far from the target, too low, tilted too far, or not ``finite`` [N], by default the state's."""
    flying = ((target - state.pos).abs() <= c.max_rel).all(dim=-1) & (state.pos[:, 2] >= c.config.min_height)
    flying &= is_finite(state) if finite is None else finite
    if c.config.max_tilt < 180.0:
        roll, pitch = roll_pitch(state.quat)
        limit = math.radians(c.config.max_tilt)
        flying &= (roll.abs() <= limit) & (pitch.abs() <= limit)
    return ~flying


def reward_terms(
    state: DroneState,
    last_pos: Tensor,
    target: Tensor,
    actions: Tensor,
    last_actions: Tensor,
    crash: Tensor,
    c: Constants,
) -> Tensor:
    """The reward terms [5, N] of a step, weighted and times dt, in the order of ``REWARDS``; their sum is the reward.

    target ``|target - last_pos|^2 - |target - pos|^2``, smooth ``|a - a_last|^2``, yaw ``exp(-10 |yaw|)``,
    angular ``|w / pi|``, crash 1; with a ``weight_near`` a sixth, near ``exp(-near_decay |target - pos|)``.

    Args:
        state: the drones after the step, before any reset.
        last_pos: [N, 3] positions before the step.
        target: [N, 3] targets during the step.
        actions: [N, 4] the applied actions (clipped).
        last_actions: [N, 4] the actions of the step before, 0 in the first step.
        crash: [N] bool, from :func:`crashed`.
        c: the constants of the task.
    """
    # |target - last_pos|^2 - |target - pos|^2 = (pos - last_pos) . (2 target - pos - last_pos), without cancellation
    gain = (state.pos - last_pos).mul_(target.mul(2).sub_(state.pos).sub_(last_pos))
    terms = [
        gain.sum(-1),
        (actions - last_actions).square_().sum(-1),
        # 2^x, since MKL threads e^x even for so few numbers, which stalls on busy machines
        torch.exp2(yaw(state.quat).abs() * (-c.config.yaw_decay / math.log(2))),
        torch.linalg.vector_norm(state.ang_vel, dim=-1).mul_(1 / math.pi),
        crash.to(state.pos.dtype),
    ]
    if c.config.weight_near:
        distance = torch.linalg.vector_norm(target - state.pos, dim=-1)
        terms.append(torch.exp2(distance * (-c.config.near_decay / math.log(2))))
    return torch.stack(terms).mul_(c.weights)


class HoverTask:
    """The state of N hover tasks: given the drones' state after a step, it returns the StepResult.

    A step draws random numbers of a fixed shape from ``generator`` (a CUDA graph that captures a step must register it)
    and never synchronises with the host. The next step may overwrite the tensors of a StepResult.

    Args:
        num_envs: N.
        device: where everything lives.
        seed: of the targets, the initial states and the random ages.
        config: the constants of the task.
        randomization: the ranges that ``randomizer`` draws from for every episode; it is None if nothing varies.
        fused: whether a kernel computes a step, in one call: the native library's on a CPU, Triton's on CUDA; None:
            where there is one, unless ``PYDRONE_BACKEND`` is ``reference``. ``not_fused`` is the reason where it does
            not, else None.
    """

    config_type: ClassVar[type[HoverConfig]] = HoverConfig
    #: sums over an episode: the reward and, if "targets" is listed, the number of targets reached
    sums: ClassVar[tuple[str, ...]] = ("return",)

    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        config: HoverConfig | None = None,
        randomization: Randomization | None = None,
        fused: bool | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        self.config = config or self.config_type()
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.constants = c = Constants.of(self.config, self.device, seed)
        #: the names of the rewards in use
        self.rewards = REWARDS[: len(c.weights)]
        self.resample_targets = self.config.resample_targets  # may change between steps

        def buffer(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.device)

        self.target = buffer(num_envs, 3)
        self.last_pos = buffer(num_envs, 3)
        self.last_actions = buffer(num_envs, ACTION_DIM)
        self.age = torch.zeros(num_envs, dtype=torch.int32, device=self.device)
        #: [N] int32, consecutive steps within ``at_target`` of the target; None if one step is enough to reach it
        self.held: Tensor | None = None
        self._hold_steps = round(self.config.hold / self.config.dt)
        if self._hold_steps > 1:
            self.held = torch.zeros(num_envs, dtype=torch.int32, device=self.device)
        self._step = buffer(len(self.sums), num_envs)
        self._rewards = self._step[:1]
        self._obs = buffer(num_envs, OBS_DIM)
        self._stats = EpisodeStats(num_envs, self.sums, self.device)
        self._everyone = torch.ones(num_envs, dtype=torch.bool, device=self.device)
        self.randomizer: Randomizer | None = None
        if randomization is not None and randomization.varies():
            self.randomizer = Randomizer(num_envs, randomization, self.generator, self.config)
        drawn = self.randomizer
        self._uniforms = 0 if drawn is None else drawn.uniforms
        self._draw = buffer(num_envs, 3 + self._uniforms + (len(c.initial) > 1))
        #: the random numbers of a step: [N, 3 + those of the randomizer + 1 if initial states differ] uniform, [N, n]
        #: normal or None; a tuple, since they are no state
        self.draws = (self._draw, buffer(num_envs, drawn.normals) if drawn is not None and drawn.normals else None)
        self._prepare()
        self.not_fused = why_not(self, fused)
        self.fused: FusedStep | None = step_of(self, fused) if self.not_fused is None else None
        self.reset()

    def reset(self) -> Tensor:
        """Starts new episodes and returns the first observations [N, 17]."""
        self.draw()
        self.target.copy_(self._first_targets(self._drawn_targets(), self._everyone))
        if self.randomizer is not None:
            self.randomizer.restart(self._everyone, *self._draws_of_randomizer())
        first = self.initial_states()
        self.last_pos.copy_(first[:, :3])
        self.last_actions.zero_()
        self.age.zero_()
        if self.held is not None:
            self.held.zero_()
        self._stats.reset()
        return self._obs.copy_(self._first_observations(first))

    def initial_states(self) -> Tensor:
        """The states [N, 16] that new episodes begin in where the last step or reset ended one, see ``Constants``."""
        initial = self.constants.initial
        if len(initial) == 1:
            return initial.expand(self.num_envs, -1)
        # float32's largest number below 1, times a power of 2, is below that power
        return initial.index_select(0, (self._draw[:, -1] * len(initial)).long())

    def place(self, state: DroneState) -> Tensor:
        """Takes ``state`` as the drones' own from now on, and returns the observations [N, 17]; episodes go on."""
        self.last_pos.copy_(state.pos)
        sensed = state if self.randomizer is None else self.randomizer.sense(state)
        return self._obs.copy_(observe(sensed, self.target, self.last_actions, self.constants))

    def randomize_ages(self) -> None:
        """Draws the age of every running episode from [0, max_episode_length)."""
        draw = torch.rand(self.num_envs, generator=self.generator, device=self.device)
        self.age.copy_(draw * self.config.max_episode_length)
        self.age.clamp_(max=self.config.max_episode_length - 1)  # the product may round up to the limit

    def step(self, state: DroneState, actions: Tensor) -> StepResult:
        """The result of the step that led to ``state`` by ``actions`` [N, 4] (clipped); starts new episodes after ends.

        The caller has to put the drones of ``dones`` into their :meth:`initial_states`.
        """
        self.draw()
        if self.fused is not None:
            return self.fused(self, state, actions)
        c = self.constants
        self.age.add_(1)
        finite = is_finite(state, actions)
        crash = crashed(state, self.target, c, finite)
        timeout = self.age >= c.config.max_episode_length
        dones = crash | timeout
        truncated = timeout & ~crash

        terms = reward_terms(state, self.last_pos, self.target, actions, self.last_actions, crash, c)
        terms.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # a diverged simulation must not poison the rollout
        torch.sum(terms, dim=0, keepdim=True, out=self._rewards)
        distance = torch.linalg.vector_norm(self.target - state.pos, dim=-1)
        log = {f"reward/{name}": mean for name, mean in zip(self.rewards, terms.mean(dim=1).unbind(), strict=True)}
        log |= {"distance": distance.nan_to_num(0.0, 0.0).mean(), "non_finite": (~finite).mean(dtype=torch.float32)}
        reached = distance < c.config.at_target
        if self.held is not None:
            self.held.add_(1).mul_(reached)
            reached = self.held >= self._hold_steps
            self.held.masked_fill_(reached | dones, 0)
        self._step[1:].copy_(reached)
        log |= self._stats.update(self._step, dones)

        # a target that is reached is replaced; the target of a new episode must not show in the final observation of
        # the old one
        ended = dones[:, None]
        draw = self._drawn_targets()
        target = self.target
        if self.resample_targets:
            target = torch.where(reached[:, None], self._next_targets(draw, reached), target)
        sensed = state if self.randomizer is None else self.randomizer.sense(state, self._noise(0))
        final_obs = observe(sensed, target, actions, c)
        torch.where(ended, self._first_targets(draw, dones), target, out=self.target)
        first = self.initial_states()
        torch.where(ended, first[:, :3], state.pos, out=self.last_pos)
        self.last_actions.copy_(actions).masked_fill_(ended, 0)
        self.age.masked_fill_(dones, 0)
        if self.randomizer is not None:
            self.randomizer.restart(dones, *self._draws_of_randomizer())
        torch.where(ended, self._first_observations(first), final_obs, out=self._obs)
        return StepResult(self._obs, self._rewards[0], dones, truncated, final_obs, None, log)

    def _prepare(self) -> None:
        """Allocates the state that a subclass adds, before the first reset."""

    def _next_targets(self, draw: Tensor, reached: Tensor) -> Tensor:
        """The targets [N, 3] to use where ``reached`` [N] is set."""
        return draw

    def _first_targets(self, draw: Tensor, ended: Tensor) -> Tensor:
        """The targets [N, 3] of new episodes, which start where ``ended`` [N] is set."""
        return draw

    def draw(self) -> None:
        """Draws the random numbers of a step for all drones, of which those use theirs that need any."""
        uniform, normal = self.draws
        torch.rand(uniform.shape, generator=self.generator, out=uniform)
        if normal is not None:
            torch.randn(normal.shape, generator=self.generator, out=normal)

    def _drawn_targets(self) -> Tensor:
        return self._draw[:, :3].mul_(self.constants.target_span).add_(self.constants.target_low)

    def _draws_of_randomizer(self) -> tuple[Tensor, Tensor | None]:
        return self._draw[:, 3 : 3 + self._uniforms], self.draws[1]

    def _noise(self, observation: int) -> Tensor | None:
        """[N, 12]: the noise of the state's observation (0), or of a new episode's first one (1)."""
        normal = self.draws[1]
        return None if normal is None else normal[:, 12 * observation : 12 * observation + 12]

    def _first_observations(self, first: Tensor) -> Tensor:
        # only the rows of new episodes are used, and those have no last action
        pos, quat, _, ang_vel, lin_vel = first.split((3, 4, 3, 3, 3), dim=1)
        state = DroneState(pos, quat, lin_vel, ang_vel)
        if self.randomizer is not None:
            state = self.randomizer.sense(state, self._noise(1))
        return observe(state, self.target, self.last_actions, self.constants)
