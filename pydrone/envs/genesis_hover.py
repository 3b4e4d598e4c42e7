"""The hover task in the Genesis simulator: a Crazyflie 2.x (cf2x) over a plane, as in Genesis' own drone example.

Needs ``genesis-world`` (1.4 or later), imported when an environment is built. Building the scene compiles kernels for
10 to 80 s the first time, about half of that in later processes (docs/environments.md).

A step makes no host synchronisation of its own: drones are reset by mask. (Genesis reads its error flags from time to
time.) What surrounds ``scene.step`` goes straight to and from Genesis' arrays where this version of it has them, see
:mod:`pydrone.envs.genesis_arrays`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from pydrone.envs.base import Autoreset, StepResult, check_actions
from pydrone.envs.course_task import CourseTask
from pydrone.envs.drone import (
    ACTION_DIM,
    ACTION_LIMITS,
    DroneState,
    clip_actions,
    propeller_rpm,
    rotate,
    rotate_inverse,
)
from pydrone.envs.genesis_arrays import GenesisArrays, of_scene
from pydrone.envs.hover_task import OBS_DIM, HoverTask
from pydrone.envs.randomization import Randomization
from pydrone.ops.packages import needed


def init_genesis(device: torch.device, seed: int, performance_mode: bool = True, logging_level: str = "warning") -> Any:
    """Initialises Genesis for ``device`` unless it is initialised already, and returns its module.

    Raises:
        ImportError: genesis-world is not installed, or one of its own imports fails.
        ValueError: Genesis was initialised for another device.
    """
    # Genesis and Triton each bring an LLVM, and the process crashes if Triton's is loaded second (Adam imports it).
    if find_spec("triton") is not None:
        import triton  # noqa: F401
    with needed("genesis", "genesis-hover", "genesis-world"):
        import genesis as gs
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {str(device)!r}")
    if not gs._initialized:
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Genesis uses the current device
        gs.init(
            backend=gs.cpu if device.type == "cpu" else gs.cuda,
            logging_level=logging_level,
            seed=seed,
            performance_mode=performance_mode,
        )
    if gs.device.type != device.type or (device.index is not None and gs.device.index not in (None, device.index)):
        raise ValueError(f"device: Genesis was initialised on {str(gs.device)!r} already, got {str(device)!r}")
    return gs


def now(call: Callable[[], None]) -> None:
    call()


class GenesisHover:
    """N drones that learn to hover: 17 observations, 4 actions, see :mod:`pydrone.envs.hover_task`.

    On the CPU, runs with the same seed are bit-identical, whatever else uses torch's global generator.

    Args:
        num_envs: N.
        device: ``"cpu"`` or ``"cuda"``; Genesis uses one device per process.
        seed: of the targets, the initial states and the random ages.
        dt: seconds per step.
        max_episode_length: steps after which an episode is truncated.
        substeps: integration steps per step.
        collisions: whether the drone collides with the plane. An episode ends at ``min_height`` above the plane, out of
            reach of the drone (radius 6 cm), so contacts only matter in the last step of a fast crash; without them a
            step takes a quarter less time.
        performance_mode: Genesis' static arrays: faster steps, but a compilation for every scene and number of
            environments. No effect if Genesis is initialised already.
        show_viewer: opens Genesis' window.
        camera: keyword arguments of ``scene.add_camera``; the camera is then ``self.camera``.
        randomization: the ranges that every drone draws from for each episode; None: no randomisation. If mass or
            inertia vary, Genesis stores them per environment (``batch_links_info``).
        fused: whether a kernel computes the task, in one call after the simulator's step; None: where there is one,
            see :class:`~pydrone.envs.hover_task.HoverTask`.
        direct: whether steps use Genesis' arrays, where they can; ``not_direct`` is the reason where they do not, else
            None. With ``fused`` too, a step on CUDA is three launches beside the simulator's and those of the random
            numbers.
        config: other constants of the task.
    """

    autoreset: Autoreset = "same_step"
    action_limits = ACTION_LIMITS
    obs = OBS_DIM
    actions = ACTION_DIM
    task_type: ClassVar[type[HoverTask]] = HoverTask
    #: does what a CUDA graph cannot hold, the simulator's step and kinematics, in each step
    outside: Callable[[Callable[[], None]], None] = staticmethod(now)

    @torch.inference_mode(False)
    def __init__(
        self,
        num_envs: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        dt: float = 0.01,
        max_episode_length: int = 1500,
        substeps: int = 2,
        collisions: bool = False,
        performance_mode: bool = True,
        show_viewer: bool = False,
        camera: dict[str, Any] | None = None,
        randomization: Randomization | None = None,
        fused: bool | None = None,
        direct: bool = True,
        **config: Any,
    ) -> None:
        cfg = self.task_type.config_type(dt=dt, max_episode_length=max_episode_length, **config)
        self._heavy = randomization is not None and randomization.varies("mass")
        self._inert = randomization is not None and randomization.varies("mass", "inertia")
        gs = init_genesis(torch.device(device), seed, performance_mode)
        self.device = torch.device(gs.device)
        self.task = self.task_type(num_envs, self.device, seed, cfg, randomization, fused)
        self.config = cfg
        self.num_envs = num_envs
        self.max_episode_length: int | None = max_episode_length

        self.scene: Any = gs.Scene(
            sim_options=gs.options.SimOptions(dt=dt, substeps=substeps),
            rigid_options=gs.options.RigidOptions(
                constraint_solver=gs.constraint_solver.Newton,
                enable_collision=collisions,
                enable_self_collision=False,  # the drone is one rigid body without joints
                enable_joint_limit=False,
                disable_constraint=not collisions,
                batch_links_info=self._inert,
            ),
            vis_options=gs.options.VisOptions(rendered_envs_idx=[0]),
            profiling_options=gs.options.ProfilingOptions(show_FPS=False),
            show_viewer=show_viewer,
        )
        self.scene.add_entity(gs.morphs.Plane())
        # Genesis changes inertial properties at run time only if the body's frame is not aligned with their axes
        unaligned = {"align": False} if self._inert else {}
        self.drone: Any = self.scene.add_entity(
            gs.morphs.Drone(file="urdf/drones/cf2x.urdf", pos=cfg.init_pos, **unaligned)
        )
        self.camera: Any = None if camera is None else self.scene.add_camera(**camera)
        self.scene.build(n_envs=num_envs)
        self._draws = show_viewer or camera is not None
        # as Genesis read them from the URDF file
        link = self.drone.base_link
        self._mass, self._inertia = link.desc.mass, torch.as_tensor(link.desc.inertia).to(self.task.target)
        self.arrays: GenesisArrays | None = None
        self.not_direct: str | None = "direct is False"
        if collisions:
            self.not_direct = "contacts are Genesis' own to clear"
        elif self._draws:
            self.not_direct = "propellers turn in pictures"
        elif direct:
            self.arrays, self.not_direct = of_scene(self.scene, self.drone, num_envs, self.device)
        if self.arrays is None:
            # compiles the masked reset now, not in the first step that ends an episode
            self._set(self.task.initial_states(), torch.zeros(num_envs, dtype=torch.bool, device=self.device))
        self._set(self.task.initial_states())
        self._weigh()

    def reset(self) -> Tensor:
        """Starts new episodes and returns the observations [N, 17]."""
        self._open().drone._prev_prop_t = None  # Genesis would refuse the next step after one that an exception left
        obs = self.task.reset()
        self._set(self.task.initial_states())
        self._weigh()
        return obs

    def step(self, actions: Tensor) -> StepResult:
        """Applies ``actions`` [N, 4], clipped to [-1, 1], for one step."""
        self._open()
        actions = check_actions(actions, self.num_envs, ACTION_DIM, self.device)
        task, arrays = self.task, self.arrays
        if arrays is not None and isinstance(task, HoverTask) and task.fused is not None and task.fused.in_solver:
            task.fused.propel(task, actions, arrays.solver, arrays.thrust, arrays.moments)
            self.outside(self._simulate)
            task.draw()
            result = task.fused(task, arrays.solver, actions)
            self.outside(lambda: self._place(result.dones))
            return result
        actions = clip_actions(actions)
        drawn = task.randomizer
        rpm = propeller_rpm(actions, self.config) if drawn is None else drawn.propeller_rpm(actions)
        rpm = rpm.nan_to_num(self.config.hover_rpm)  # the task ends these episodes
        if drawn is not None and drawn.blows:
            if arrays is not None:
                arrays.wind(drawn.wind)
            else:
                self.drone.apply_links_external_wrench(drawn.wind[:, None], links_idx_local=0)
        self.outside(lambda: self._simulate(rpm))
        result = task.step(self.state(), actions)
        # on the CPU the check is free, and most steps end no episode
        if self.device.type != "cpu" or self.outside is not now or bool(result.dones.any()):
            if arrays is not None:
                arrays.rewind(task.initial_states(), result.dones)
            self.outside(lambda: self._place(result.dones))
        return result

    def place(self, state: DroneState) -> Tensor:
        """Puts the drones into ``state``, in the episodes that run, and returns the observations [N, 17]."""
        self._open()
        self._set(torch.cat((state.pos, state.quat, rotate(state.quat, state.lin_vel), state.ang_vel), dim=1))
        return self.task.place(state)

    def state(self) -> DroneState:
        """The state of the drones, read from the simulator; NaN where it could not integrate a step."""
        if self.arrays is not None:
            row = self.arrays.rows()
        else:
            # Genesis stores a row per coordinate, the task needs a row per drone
            row = torch.cat((self.drone.get_qpos(), self.drone.get_dofs_velocity()), dim=1)
            # Genesis keeps the state before the step there, and raises at a later step unless the drone is reset
            row.masked_fill_(self.scene.rigid_solver.get_error_envs_mask()[:, None], math.nan)
        # a free joint has its linear velocity in the world frame and its angular velocity in the body frame
        pos, quat, lin_vel, ang_vel = row.split((3, 4, 3, 3), dim=1)
        return DroneState(pos, quat, rotate_inverse(quat, lin_vel), ang_vel)

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can capture a step but for what it gives to ``outside``, see ``pydrone.envs.Env``."""
        return self.arrays is not None

    @property
    def generator(self) -> torch.Generator:
        """The source of all random numbers."""
        return self.task.generator

    def randomize_episode_lengths(self) -> None:
        """Sets every running episode to a random age."""
        self.task.randomize_ages()

    def close(self) -> None:
        """Destroys the scene. Genesis stays initialised, so that another environment can be built."""
        if self.scene is not None:
            self.scene.destroy()
        self.scene = self.drone = self.camera = self.arrays = None

    def _simulate(self, rpm: Tensor | None = None) -> None:
        if rpm is not None:
            (self.drone.set_propellers_rpm if self.arrays is None else self.arrays.propellers)(rpm)
        self.scene.step(update_visualizer=self._draws)

    def _place(self, ended: Tensor) -> None:
        """What Genesis derives from the coordinates of drones that begin a new episode."""
        if self.arrays is None:
            self._set(self.task.initial_states(), ended)
        else:
            self.arrays.place(ended)
        self._weigh()

    def _set(self, rows: Tensor, envs: Tensor | None = None) -> None:
        """Gives the drones, of ``envs`` [N] bool or all, the coordinates and velocities [N, 13 or more] of the solver,
        and clears their errors."""
        self.drone.set_qpos(rows[:, :7], envs_idx=envs, zero_velocity=True)
        self.drone.set_dofs_velocity(rows[:, 7:13], envs_idx=envs)

    def _weigh(self) -> None:
        """Passes the drawn masses and inertias to Genesis; all of them, since selecting some would synchronise."""
        drawn = self.task.randomizer
        if drawn is not None and self._heavy:
            self.drone.set_links_mass(drawn.mass * self._mass, links_idx_local=0)
        if drawn is not None and self._inert:
            self.drone.set_links_inertia(drawn.inertia[:, :, None, None] * self._inertia, links_idx_local=0)

    def _open(self) -> GenesisHover:
        if self.scene is None:
            raise RuntimeError("this environment was closed")
        return self


class GenesisCourse(GenesisHover):
    """N drones that learn to fly a course of waypoints, see :mod:`pydrone.envs.course_task`."""

    task_type = CourseTask
