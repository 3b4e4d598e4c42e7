"""A step of the hover and course tasks as one call of a kernel, with the quadrotor's physics if wanted.

:mod:`pydrone.envs.hover_task` and :mod:`pydrone.envs.quadrotor` specify what it computes, on the same random numbers,
and write the same tensors. On CUDA it is Triton's: ``triton_kernels/quadrotor.py`` reads the tuples below by their
fields' names. On a CPU it is the native library's: ``csrc/cpu/quadrotor.cpp`` takes their fields one by one, since
tuples would cost more. The tensors are the task's own, float32 and contiguous unless said otherwise.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydrone.envs.base import StepResult
from pydrone.envs.drone import DroneState
from pydrone.ops import dispatch, native, triton
from pydrone.ops.schema import TASK_NUMBERS

#: what a step's log has, in the kernel's order: means over the drones, then sums over the episodes that ended
LOG = (
    *(f"reward/{name}" for name in ("target", "smooth", "yaw", "angular", "crash", "near")),
    "distance",
    "non_finite",
    *(f"episode/{name}" for name in ("count", "length", "return", "targets")),
)
LOG_SIZE = 16
#: the tasks that the kernels compute; a class derived from one may differ
SERVED = ("pydrone.envs.hover_task.HoverTask", "pydrone.envs.course_task.CourseTask")


class Task(NamedTuple):
    """What a task remembers, see :class:`~pydrone.envs.hover_task.HoverTask`; None: it needs none."""

    target: Tensor
    last_pos: Tensor
    last_actions: Tensor
    age: Tensor
    held: Tensor | None
    leg: Tensor | None
    waypoints: Tensor | None
    sums: Tensor
    """[2 or 3 + 1, N]: of :class:`~pydrone.envs.base.EpisodeStats`."""
    initial: Tensor | None
    """[K, 16]: of :class:`~pydrone.envs.hover_task.Constants`, of which the last uniform number picks a row; None: all
    begin at ``init_pos``, at rest."""


class Varied(NamedTuple):
    """What a :class:`~pydrone.envs.randomizer.Randomizer` has drawn, and the ranges; None: nothing is late, or lags."""

    drawn: Tensor
    wind: Tensor
    history: Tensor | None
    latest: int
    """The largest latency in steps."""
    rpm: Tensor | None
    low: tuple[float, ...]
    span: tuple[float, ...]
    high: tuple[float, ...]


class Draws(NamedTuple):
    """The random numbers of a step, a row a drone, see ``HoverTask.draw``."""

    uniform: Tensor
    normal: Tensor | None


class Outputs(NamedTuple):
    """What a step returns; ``dones`` and ``truncated`` are bool [N], ``log`` is [LOG_SIZE], on a CPU [len(LOG)]."""

    obs: Tensor
    final_obs: Tensor
    rewards: Tensor
    dones: Tensor
    truncated: Tensor
    log: Tensor


class Scratch(NamedTuple):
    """``partials`` [programs, LOG_SIZE]; ``ticket`` int32 [1], 0 between launches."""

    partials: Tensor
    ticket: Tensor


class TaskNumbers(NamedTuple):
    """The numbers of a :class:`~pydrone.envs.hover_task.HoverConfig`, ready for use: angles in rad, decays of 2^x."""

    init_pos: tuple[float, ...]
    target_low: tuple[float, ...]
    target_span: tuple[float, ...]
    weights: tuple[float, ...]
    pos_scale: float
    lin_vel_scale: float
    ang_vel_scale: float
    max_xy: float
    max_z: float
    min_height: float
    max_tilt: float
    at_target: float
    yaw_decay: float
    near_decay: float
    per_pi: float
    rpm_range: float
    hover_rpm: float
    lag: float
    max_age: int
    hold_steps: int


class Solver(NamedTuple):
    """Views of the memory of Genesis' rigid solver, see :mod:`pydrone.envs.genesis_arrays`; N is the last axis but one
    of vectors. Forces and torques are those on the drone, negated, and 0 after a step."""

    qpos: Tensor
    """[7, N]: position, quaternion (w, x, y, z)."""
    vel: Tensor
    """[6, N]: velocity in the world, angular velocity in the body frame."""
    error: Tensor
    """int32 [N]; not 0 where a step could not be integrated."""
    quat: Tensor
    """[4, N, 4]: of the propellers' inertial frames."""
    arm: Tensor
    """[4, N, 3]: from the drone's centre of mass to the propellers'."""
    force: Tensor
    """[4, N, 3]: on the propellers."""
    torque: Tensor
    """[4, N, 3]: about the drone's centre of mass."""
    base_pos: Tensor
    """[N, 3]: where the wind acts."""
    base_com: Tensor
    """[N, 3]: the drone's centre of mass."""
    base_force: Tensor
    base_torque: Tensor


class Body(NamedTuple):
    """The numbers of the quadrotor's physics, see :mod:`pydrone.envs.quadrotor`; ``wrench`` by rows."""

    wrench: tuple[float, ...]
    gyro: tuple[float, ...]
    damping: tuple[float, ...]
    gravity: float
    mass: float
    h: float


def _interpreted(task: Any, wanted: bool | None) -> bool:
    """Whether Triton's interpreter computes the steps of a task on a CPU, to be tested."""
    return task.device.type == "cpu" and bool(wanted) and triton.interpreted()


def why_not(task: Any, wanted: bool | None) -> str | None:
    """Why PyTorch computes the steps of a ``HoverTask``, or None: a kernel does, Triton's on CUDA, C++ on a CPU.

    ``wanted`` None: it does where it can, unless ``PYDRONE_BACKEND`` is ``reference``; where it cannot on CUDA, a
    warning says why. Raises ValueError where it is wanted and cannot be had.
    """
    if wanted is False:
        return "fused is False"
    device = task.device.type
    reason = triton.missing()
    if device == "cpu" and not _interpreted(task, wanted):
        reason = None if native.CPU_MISSING is None else f"there is no native library: {native.CPU_MISSING}"
        if torch.get_default_dtype() != torch.float32:
            reason = f"the kernel computes in float32, torch's default dtype is {torch.get_default_dtype()}"
    elif device not in ("cpu", "cuda"):
        reason = f"the kernels need a CPU or a CUDA device, the task is on {device}"
    if f"{type(task).__module__}.{type(task).__qualname__}" not in SERVED:
        reason = f"{type(task).__name__} may differ from the tasks that the kernels compute"
    if wanted is None and os.environ.get("PYDRONE_BACKEND") == "reference":
        return "PYDRONE_BACKEND is 'reference'"
    if wanted and reason is not None:
        raise ValueError(f"fused: expected False or None here: {reason}")
    if reason is not None and device == "cuda":
        warnings.warn(
            f"PyTorch computes the steps of {type(task).__name__}, in more than a hundred launches each: {reason}. "
            "fused=False says that this is wanted",
            RuntimeWarning,
            stacklevel=3,
        )
    return reason


def step_of(task: Any, wanted: bool | None) -> FusedStep:
    """The steps of ``task`` by the kernel of its device, where :func:`why_not` says that it can compute them."""
    return NativeStep(task) if task.device.type == "cpu" and not _interpreted(task, wanted) else FusedStep(task)


class FusedStep:
    """Computes the steps of ``task``, a ``HoverTask``. All its own tensors are in tuples, as they are no state."""

    #: whether it also takes a :class:`Solver`, and has :meth:`propel`
    in_solver = True

    def __init__(self, task: Any) -> None:
        c, config, device, n = task.constants, task.config, task.device, task.num_envs
        log = torch.zeros(LOG_SIZE, device=device)
        self._out = Outputs(
            task._obs,
            torch.zeros_like(task._obs),
            task._rewards[0],
            *(torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2)),
            log,
        )
        self._scratch = self._scratch_of(task)
        names = [f"reward/{name}" for name in task.rewards] + ["distance", "non_finite"]
        names += [f"episode/{name}" for name in task._stats.names]
        self._places = tuple((name, LOG.index(name)) for name in names)
        self._log = tuple((name, log[place]) for name, place in self._places)
        drawn = task.randomizer
        ranges = () if drawn is None else (drawn._low, drawn._span, drawn._high)
        self._ranges = tuple(tuple(x.tolist()) for x in ranges)
        self._near, self._tilt = bool(config.weight_near), config.max_tilt < 180.0
        self._moving = len(c.initial) > 1
        self._numbers = TaskNumbers(
            init_pos=config.init_pos,
            target_low=tuple(c.target_low.tolist()),
            target_span=tuple(c.target_span.tolist()),
            weights=tuple((c.weights.flatten().tolist() + [0.0])[:6]),
            pos_scale=config.pos_scale,
            lin_vel_scale=config.lin_vel_scale,
            ang_vel_scale=config.ang_vel_scale,
            max_xy=config.max_xy,
            max_z=config.max_z,
            min_height=config.min_height,
            max_tilt=math.radians(config.max_tilt),
            at_target=config.at_target,
            yaw_decay=-config.yaw_decay / math.log(2),
            near_decay=-config.near_decay / math.log(2),
            per_pi=1 / math.pi,
            rpm_range=config.rpm_range * config.hover_rpm,
            hover_rpm=config.hover_rpm,
            lag=-config.dt / math.log(2),
            max_age=config.max_episode_length,
            hold_steps=task._hold_steps,
        )

    def _scratch_of(self, task: Any) -> Scratch | None:
        return Scratch(
            torch.zeros(triton.task_programs(task.num_envs), LOG_SIZE, device=task.device),
            torch.zeros(1, dtype=torch.int32, device=task.device),
        )

    def prepare(self, body: Body) -> None:
        """Does before the first step, which may be captured, what steps with ``body`` need once."""

    def propel(self, task: Any, actions: Tensor, solver: Solver, thrust: float, moments: tuple[float, ...]) -> None:
        """Writes the forces of ``actions`` [N, 4], clipped or not, and of the wind for the simulator's next step.

        Latency and motor lag included, as :meth:`~pydrone.envs.randomizer.Randomizer.propeller_rpm` computes them.

        Args:
            task: the one that the constructor was given.
            actions: NaN and infinite ones turn the propellers at hover speed.
            solver: to whose forces and torques they are added.
            thrust, moments: of a propeller, and about the axis of each of the four, at a speed of 1 rpm.
        """
        triton.task_propel(actions.contiguous(), self._varied(task), solver, self._numbers, thrust, moments)

    def _varied(self, task: Any) -> Varied | None:
        drawn = task.randomizer
        if drawn is None:
            return None
        history = drawn._history if len(drawn._history) else None
        return Varied(
            drawn._drawn, drawn.wind, history, len(drawn._history) - 1, drawn._rpm if drawn._lags else None,
            *self._ranges,
        )  # fmt: skip

    def __call__(
        self, task: Any, state: DroneState | Solver, actions: Tensor, body: Body | None = None, substeps: int = 1
    ) -> StepResult:
        """The result of a step, as ``HoverTask.step`` returns it.

        Args:
            task: the one that the constructor was given. Its random numbers must have been drawn.
            state: the drones after the step. With ``body``: before it, velocities in the world, to be overwritten by
                their state after it and after the reset of those whose episode ended. Without, rows may be strided.
                A :class:`Solver`: Genesis' own memory after the step, where those whose episode ended are reset.
            actions: [N, 4], clipped or not.
            body: the physics to compute; None: none.
            substeps: integration steps of the physics.
        """
        drones = None if isinstance(state, Solver) else state
        if body is None:
            if drones is not None:
                drones = DroneState(*map(_rows, drones))
        elif drones is None or not all(x.is_contiguous() for x in drones):
            raise ValueError("pos, quat, vel, ang_vel: expected contiguous tensors, which the step overwrites")
        out, log = self._launch(task, state, drones, _rows(actions).contiguous(), body, substeps)
        dispatch.written(*out, task.target, *(drones if body is not None and drones is not None else ()))
        return StepResult(out.obs, out.rewards, out.dones, out.truncated, out.final_obs, None, log)

    def _launch(
        self, task: Any, state: DroneState | Solver, drones: DroneState | None, actions: Tensor, body: Body | None,
        substeps: int,
    ) -> tuple[Outputs, dict[str, Tensor]]:  # fmt: skip
        triton.task_step(
            drones,
            state if drones is None else None,
            actions,
            Task(
                task.target, task.last_pos, task.last_actions, task.age, task.held, getattr(task, "leg", None),
                getattr(task, "_waypoints", None), task._stats._sums,
                task.constants.initial if self._moving else None,
            ),
            self._varied(task), Draws(*task.draws), self._out, self._scratch, self._numbers, body, substeps,
            bool(task.resample_targets), self._near, self._tilt,
        )  # fmt: skip
        return self._out, dict(self._log)


def _rows(x: Tensor) -> Tensor:
    """``x`` [N, n] as float32, the numbers of a row side by side."""
    return x if x.dtype is torch.float32 and x.stride(1) == 1 else x.to(torch.float32).contiguous()


def flat(numbers: TaskNumbers, body: Body | None, ranges: tuple[tuple[float, ...], ...]) -> Tensor:
    """float32 [TASK_NUMBERS]: ``numbers`` from ``target_low`` on, but for the two integers, ``body``, and ``low``,
    ``span`` and ``high`` of :class:`Varied`; 0 for what is missing."""
    found: list[float] = []
    for part in (*numbers[1:-2], *(body or ([0.0] * 25,)), *(ranges or ([0.0] * 39,))):
        found += part if isinstance(part, (tuple, list)) else [part]
    assert len(found) == TASK_NUMBERS
    return torch.tensor(found, dtype=torch.float32)


class NativeStep(FusedStep):
    """The steps of a task on a CPU, by the native library. As PyTorch's, a step overwrites observations and rewards of
    the one before, but not its ends, final observations and log."""

    in_solver = False
    _operation = torch.ops.pydrone.task_step.default

    def __init__(self, task: Any) -> None:
        super().__init__(task)
        self._out = self._out._replace(log=torch.zeros(len(LOG)))
        self._body: Body | None = None
        self._flat = (flat(self._numbers, None, self._ranges),)
        # a limit that int32 cannot hold is never reached
        self._limits = tuple(min(x, 2**31 - 1) for x in (self._numbers.max_age, self._numbers.hold_steps))

    def _scratch_of(self, task: Any) -> Scratch | None:
        return None

    def prepare(self, body: Body | None) -> None:
        self._body, self._flat = body, (flat(self._numbers, body, self._ranges),)

    def _launch(
        self, task: Any, state: DroneState | Solver, drones: DroneState | None, actions: Tensor, body: Body | None,
        substeps: int,
    ) -> tuple[Outputs, dict[str, Tensor]]:  # fmt: skip
        if drones is None:
            raise ValueError("state: expected the drones' rows, got the memory of a simulator, which only CUDA's takes")
        if body is not self._body:
            self.prepare(body)
        obs, final_obs, rewards, dones, truncated, log = self._out
        empty = torch.empty_like
        out = Outputs(obs, empty(final_obs), rewards, empty(dones), empty(truncated), empty(log))
        varied = self._varied(task)
        drawn, wind, history, _, rpm = (None,) * 5 if varied is None else varied[:5]
        self._operation(
            *drones, actions, task.target, task.last_pos, task.last_actions, task.age, task.held,
            getattr(task, "leg", None), getattr(task, "_waypoints", None), task._stats._sums,
            task.constants.initial, drawn, wind, history, rpm, *task.draws, *out, *self._flat, *self._limits,
            0 if body is None else substeps, bool(task.resample_targets), self._near, self._tilt,
        )  # fmt: skip
        logged = out.log.unbind()
        return out, {name: logged[place] for name, place in self._places}
