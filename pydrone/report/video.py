"""A video of a flight: the recorded path of one drone, shown by a camera in a Genesis scene, without a window.

The flight is replayed, not flown again: it shows what was evaluated, whichever environment that was.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydrone.report.evaluation import Paths

FPS = 25
RESOLUTION = (960, 720)
FIELD_OF_VIEW = 45  # degrees
# The camera stays behind the drone, as seen from the target, so that both are in view.
BEHIND, ABOVE = 0.7, 0.3  # m
LAG = 0.3  # s, in which the camera turns most of the way to a new target
NEAR = 0.3  # m; closer to its target than this the drone is followed without turning


def missing() -> list[str]:
    """The modules that are needed and not installed."""
    return [name for name, module in {"genesis-world": "genesis", "av": "av"}.items() if find_spec(module) is None]


def render(
    paths: Paths,
    length: int,
    out: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    seed: int = 0,
    drone: int = 0,
) -> Path:
    """Writes an H.264 video of ``paths.pos[:length, drone]`` in real time.

    Args:
        paths: what was flown.
        length: steps of the episode.
        out: the file; its name ends in .mp4.
        device: Genesis' device, if it was not initialised before.
        seed: Genesis' seed.
        drone: which path.

    Raises:
        ValueError: ``out`` has another ending.
        ImportError: genesis-world is missing.
        RuntimeError: there is no OpenGL to render with.
    """
    out = Path(out)
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"video: expected a file name that ends in .mp4, got {str(out)!r}")
    import av

    from pydrone.envs.genesis_hover import init_genesis

    try:
        gs = init_genesis(torch.device(device), seed, logging_level="error")
        scene, body, ball, camera = _scene(gs)
    except ImportError:
        raise
    except Exception as error:  # of whatever kind: what is missing shows in the depths of OpenGL's bindings
        raise RuntimeError(
            "video: Genesis could not set up its off-screen camera, which needs OpenGL by EGL (libegl1): "
            f"{type(error).__name__}: {error}"
        ) from error
    poses = torch.cat((paths.pos, paths.quat), dim=-1)[:length, drone]
    poses = poses[: int(poses.isfinite().all(dim=-1).long().cumprod(0).sum())]  # a crash may be a state of NaN
    targets = paths.target[:length, drone]
    frames = [min(round(i / (FPS * paths.dt)), len(poses) - 1) for i in range(math.ceil(len(poses) * paths.dt * FPS))]
    cameras = camera_path(poses[:, :3], targets, frames)
    beside = out.with_name(f".{os.getpid()}.{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(beside), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "20"})
            stream.width, stream.height = RESOLUTION
            stream.pix_fmt = "yuv420p"
            for step, (eye, look) in zip(frames, cameras):
                body.set_qpos(poses[step].to(gs.device))
                ball.set_pos(targets[step].to(gs.device))
                camera.set_pose(pos=eye, lookat=look, up=(0.0, 0.0, 1.0))
                # Without force Genesis draws again only after a step of the simulation.
                image = camera.render(force_render=True)[0]
                for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode(None):
                container.mux(packet)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
        scene.destroy()
    return out


def camera_path(
    pos: Tensor, target: Tensor, frames: list[int]
) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """Where the camera stands in each frame, and what it looks at: behind and above the drone, towards the target.

    Args:
        pos: [T, 3] of the drone, m.
        target: [T, 3] of its target, m.
        frames: the steps that are shown.
    """
    shots = []
    heading = math.atan2(*(target[0] - pos[0])[[1, 0]].tolist())
    for step in frames:
        x, y, z = pos[step].tolist()
        dx, dy, _ = (target[step] - pos[step]).tolist()
        if math.hypot(dx, dy) > NEAR:
            turn = math.remainder(math.atan2(dy, dx) - heading, 2 * math.pi)
            heading += turn * -math.expm1(-1 / (FPS * LAG))
        c, s = math.cos(heading), math.sin(heading)
        # It looks a little ahead of the drone.
        ahead = BEHIND / 3
        shots.append(
            ((x - BEHIND * c, y - BEHIND * s, max(z + ABOVE, 0.05)), (x + ahead * c, y + ahead * s, z - ABOVE / 4))
        )
    return shots


def _scene(gs: Any) -> tuple[Any, Any, Any, Any]:
    """A scene with a floor, the drone, a ball for the target, and a camera."""
    scene = gs.Scene(
        rigid_options=gs.options.RigidOptions(enable_collision=False, disable_constraint=True),
        vis_options=gs.options.VisOptions(
            background_color=(0.65, 0.78, 0.9), ambient_light=(0.35, 0.35, 0.35), shadow=True
        ),
        profiling_options=gs.options.ProfilingOptions(show_FPS=False),
        show_viewer=False,
    )
    scene.add_entity(gs.morphs.Plane())
    body = scene.add_entity(gs.morphs.Drone(file="urdf/drones/cf2x.urdf", pos=(0.0, 0.0, 1.0)))
    ball = scene.add_entity(
        gs.morphs.Sphere(radius=0.03, pos=(0.0, 0.0, 1.0), fixed=True, collision=False),
        surface=gs.surfaces.Rough(color=(0.9, 0.15, 0.1)),
    )
    camera = scene.add_camera(res=RESOLUTION, pos=(-1.0, 0.0, 1.5), lookat=(0.0, 0.0, 1.0), fov=FIELD_OF_VIEW)
    scene.build()
    return scene, body, ball, camera
