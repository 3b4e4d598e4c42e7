"""Genesis' rigid solver without its Python checks: what surrounds ``scene.step`` goes to and from the solver's arrays.

This uses internals of Genesis (1.4.5 has them), so :func:`of_scene` tries them out against the public methods when an
environment is built. Where they differ or are missing, the environment calls the public methods, and says why.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from pydrone.envs.drone import ACTION_DIM
from pydrone.envs.fused import Solver


class GenesisArrays:
    """One drone's part of a built scene, for all environments. :func:`of_scene` makes one.

    Raises AttributeError, ImportError, TypeError or Genesis' own exception where this version has no such internals,
    ValueError where they are not laid out as expected.

    Attributes:
        solver: views of the solver's memory, in which its kernels and these methods work.

    Args:
        scene, drone: a built scene and its only moving entity, a ``gs.morphs.Drone``.
        num_envs: N.
        device: Genesis' own.
    """

    def __init__(self, scene: Any, drone: Any, num_envs: int, device: torch.device) -> None:
        from genesis.engine.solvers.rigid.abd import forward_kinematics
        from genesis.utils.misc import qd_to_torch

        def view(array: Any, *shape: int) -> Tensor:
            found = qd_to_torch(array, copy=False)
            if found.shape != shape or not found.is_contiguous() or found.device != device:
                raise ValueError(f"an array of shape {tuple(found.shape)}, expected {shape}, contiguous")
            return found

        self._rigid, self._drone = scene.rigid_solver, drone
        self._kinematics = forward_kinematics.kernel_masked_forward_kinematics_links_geoms
        links, n = self._rigid.dyn_state.links, num_envs
        base, propellers = drone.base_link.idx, drone._propellers_link_idx.tolist()
        rows = slice(propellers[0], propellers[0] + ACTION_DIM)
        if propellers != list(range(rows.start, rows.stop)):
            raise ValueError(f"propellers {propellers}, expected {ACTION_DIM} in a row")
        count = self._rigid.n_links
        pos, com = view(links.pos, count, n, 3), view(links.root_COM, count, n, 3)
        force, torque = view(links.cfrc_applied_vel, count, n, 3), view(links.cfrc_applied_ang, count, n, 3)
        self.solver = Solver(
            qpos=view(self._rigid.rigid_info.qpos, 7, n),
            vel=view(self._rigid.dyn_state.dofs.vel, 6, n),
            error=view(self._rigid._errno, n),
            quat=view(links.i_quat, count, n, 4)[rows],
            arm=view(links.i_pos, count, n, 3)[rows],
            force=force[rows],
            torque=torque[rows],
            base_pos=pos[base],
            base_com=com[base],
            base_force=force[base],
            base_torque=torque[base],
        )
        self._inverted = drone._model == "RACE"
        spins = -drone._propellers_spin if self._inverted else drone._propellers_spin
        #: thrust, and torque about the axis, of each propeller at a squared speed of 1 rpm^2
        self.thrust, self.moments = float(drone.KF), tuple((drone.KM * spins).tolist())

    def propellers(self, rpm: Tensor) -> None:
        """Propeller speeds [N, 4], float32 and contiguous, for the next step: ``drone.set_propellers_rpm``, to the bit.

        The propellers are not turned in pictures.
        """
        drone = self._drone
        self._rigid.set_drone_rpm(
            drone._propellers_link_idx, drone.KF, drone.KM, rpm, drone._propellers_spin, self._inverted
        )

    def wind(self, force: Tensor) -> None:
        """A force [N, 3] in the world on the base link in the next step: ``drone.apply_links_external_wrench``."""
        own = self.solver
        own.base_force.sub_(force)
        own.base_torque.sub_(torch.linalg.cross(own.base_pos - own.base_com, force))

    def rows(self) -> Tensor:
        """[N, 13]: position, quaternion, velocity in the world, angular velocity in the body frame; new memory.

        NaN where Genesis could not integrate a step: it keeps the state before it, and raises at a later step unless
        the drone is reset.
        """
        rows = torch.cat((self.solver.qpos.t(), self.solver.vel.t()), dim=1)
        return rows.masked_fill_((self.solver.error > 0)[:, None], math.nan)

    def rewind(self, rows: Tensor, ended: Tensor) -> None:
        """Writes the drones of ``ended`` [N] bool, from ``rows`` as :meth:`rows` has them. Then :meth:`place`.

        Both together are ``drone.set_qpos`` and ``drone.set_dofs_velocity`` for ``envs_idx=ended``, to the bit.
        """
        own = self.solver
        torch.where(ended, rows[:, :7].t(), own.qpos, out=own.qpos)
        torch.where(ended, rows[:, 7:13].t(), own.vel, out=own.vel)
        own.error.masked_fill_(ended, 0)

    def place(self, ended: Tensor) -> None:
        """Computes what follows from the coordinates of ``ended`` [N] bool, which were written; a kernel of Genesis."""
        own = self._rigid
        self._kinematics(ended, own.dyn_state, own.dyn_info, own.rigid_info, own.rigid_config)

    def wrench(self, rpm: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`propellers` adds to ``solver.force`` and ``solver.torque``, both [4, N, 3]; for the proof."""
        w, x, y, z = self.solver.quat.unbind(-1)
        up = torch.stack((2 * (x * z + w * y), 2 * (y * z - w * x), w * w - x * x - y * y + z * z), dim=-1)
        up = up / self.solver.quat.square().sum(-1, keepdim=True)
        square = rpm.t().square()[:, :, None]
        force = up * square * self.thrust
        moments = torch.tensor(self.moments, device=rpm.device)[:, None, None]
        return -force, -(up * square * moments + torch.linalg.cross(self.solver.arm, force))

    def prove(self) -> None:
        """Does everything once in both ways. ValueError where the results differ; the drones end anywhere."""
        drone, rigid, own = self._drone, self._rigid, self.solver
        n, device = own.qpos.shape[1], own.qpos.device
        g = torch.Generator().manual_seed(0)
        rows = torch.randn(n, 13, generator=g).to(device)
        rows[:, 3:7] = torch.nn.functional.normalize(rows[:, 3:7])
        rpm = 14000 + 1000 * torch.randn(n, ACTION_DIM, generator=g).to(device)
        links = drone.get_links_pos, drone.get_links_quat, drone.get_links_vel, drone.get_links_ang
        drone.set_qpos(rows[:, :7], zero_velocity=True)
        drone.set_dofs_velocity(rows[:, 7:])
        placed = [get().clone() for get in links]
        if not _close(self.rows(), torch.cat((drone.get_qpos(), drone.get_dofs_velocity()), dim=1)):
            raise ValueError("coordinates differ from those of get_qpos and get_dofs_velocity")
        drone.set_propellers_rpm(rpm)
        drone._prev_prop_t = None
        drone._propellers_revs.zero_()
        expected = own.force.clone(), own.torque.clone()
        rigid.clear_external_force()
        self.propellers(rpm)
        if not all(map(_close, (own.force, own.torque, *self.wrench(rpm)), expected * 2)):
            raise ValueError("forces differ from those of set_propellers_rpm")
        rigid.clear_external_force()
        everyone = torch.ones(n, dtype=torch.bool, device=device)
        for there in (rows.roll(1, dims=0) * 1.5, rows):
            own.error.fill_(1)
            self.rewind(there, everyone)
            self.place(everyone)
        if not all(map(_close, (get() for get in links), placed)) or rigid.get_error_envs_mask().any():
            raise ValueError("a reset leads elsewhere than set_qpos and set_dofs_velocity")


def of_scene(scene: Any, drone: Any, num_envs: int, device: torch.device) -> tuple[GenesisArrays | None, str | None]:
    """The arrays, or None and why Genesis' public methods have to be called; on CUDA a warning says so too."""
    try:
        arrays = GenesisArrays(scene, drone, num_envs, device)
        arrays.prove()
    except Exception as err:  # whatever another version does, its public methods work
        import genesis

        drone._prev_prop_t = None  # else Genesis would refuse the next step after a proof that failed halfway
        reason = f"Genesis {genesis.__version__} has other internals: {type(err).__name__}: {err}"
        if device.type == "cuda":
            text = f"each step makes dozens of further launches around Genesis' own: {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return None, reason
    return arrays, None


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
