"""A video of a flight: the recorded path of one drone, rendered off-screen by a camera in a Genesis scene.

The recorded path is replayed, not simulated again, so the video shows what was evaluated, in any environment.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydrone.ops.packages import needed
from pydrone.report.evaluation import Paths

FPS = 25
RESOLUTION = (960, 720)
FIELD_OF_VIEW = 45  # degrees
# The camera stays behind the drone as seen from the target, so that both are in view.
BEHIND, ABOVE = 0.7, 0.3  # m
LAG = 0.3  # s, time constant of the camera's turn to a new target
NEAR = 0.3  # m; closer to the target than this, the camera does not turn


def missing() -> list[str]:
    """The packages that are needed and not installed."""
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
        paths: the recorded paths.
        length: steps of the episode.
        out: the file, with the suffix .mp4.
        device: Genesis' device, if Genesis is not initialised yet.
        seed: Genesis' seed.
        drone: the index of the path.

    Raises:
        ValueError: ``out`` has another suffix.
        ImportError: genesis-world or av is missing or broken.
        RuntimeError: OpenGL is not available for rendering.
    """
    out = Path(out)
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"video: expected a file name that ends in .mp4, got {str(out)!r}")
    with needed("av", "a video", "av"):
        import av

    from pydrone.envs.genesis_hover import init_genesis

    try:
        gs = init_genesis(torch.device(device), seed, logging_level="error")
        scene, body, ball, camera = _scene(gs)
    except ImportError:
        raise
    except Exception as error:  # of any type: a missing part shows up deep in the OpenGL bindings
        raise RuntimeError(
            "video: Genesis could not set up its off-screen camera, which needs OpenGL by EGL (libegl1): "
            f"{type(error).__name__}: {error}"
        ) from error
    poses = torch.cat((paths.pos, paths.quat), dim=-1)[:length, drone]
    poses = poses[: int(poses.isfinite().all(dim=-1).long().cumprod(0).sum())]  # a crash may leave a state of NaN
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
                # Without force_render, Genesis only draws again after a simulation step.
                image = camera.render(force_render=True)[0]
                distance = torch.linalg.vector_norm(targets[step] - poses[step, :3]).item()
                image = captioned(image, f"{(step + 1) * paths.dt:5.2f} s   {distance:.2f} m from the target")
                for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode(None):
                container.mux(packet)
        os.replace(beside, out)
    finally:
        beside.unlink(missing_ok=True)
        scene.destroy()
    return out


def captioned(image: Any, text: str) -> Any:
    """``image``, uint8 [height, width, 3], with a line of text on a band across its top. Needs Pillow."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(np.ascontiguousarray(image))
    draw = ImageDraw.Draw(picture, "RGBA")
    size = picture.height // 24
    draw.rectangle((0, 0, picture.width, 2 * size), fill=(0, 0, 0, 140))
    draw.text((size // 2, size // 3), text, fill=(255, 255, 255), font=ImageFont.load_default(size))
    return np.asarray(picture)


def camera_path(
    pos: Tensor, target: Tensor, frames: list[int]
) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """The position of the camera and the point it looks at, for each frame: behind and above the drone, to the target.

    Args:
        pos: [T, 3] positions of the drone, m.
        target: [T, 3] positions of its target, m.
        frames: the step shown in each frame.
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
