"""Environments by name: those of pydrone, and those that other packages register as entry points.

A package registers an environment in the entry point group ``pydrone.envs``, in its ``pyproject.toml``::

    [project.entry-points."pydrone.envs"]
    my-env = "my_package.my_module:MyEnv"

where ``MyEnv(num_envs=..., device=..., seed=..., **options)`` returns a :class:`pydrone.envs.base.Env`. Listing
the names imports none of them. ``gymnasium:ID`` is an environment of Gymnasium
(:mod:`pydrone.envs.gymnasium_ids`); such names are not listed.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pydrone.envs.base import Env, ObsSpec

GROUP = "pydrone.envs"
GYMNASIUM = "gymnasium:"

# name -> module:class, imported on first use
ENVIRONMENTS: dict[str, str] = {
    "genesis-course": "pydrone.envs.genesis_hover:GenesisCourse",
    "genesis-hover": "pydrone.envs.genesis_hover:GenesisHover",
    "quadrotor": "pydrone.envs.quadrotor:Quadrotor",
    "quadrotor-course": "pydrone.envs.quadrotor:QuadrotorCourse",
}


def known() -> list[str]:
    """The names of all environments: pydrone's and those of installed packages."""
    return sorted(ENVIRONMENTS.keys() | {point.name for point in entry_points(group=GROUP)})


def is_gymnasium(name: Any) -> bool:
    """Whether ``name`` is ``gymnasium:`` with an id, which only Gymnasium can tell to be known."""
    return isinstance(name, str) and name.startswith(GYMNASIUM) and name != GYMNASIUM


def check_name(name: Any, argument: str = "env") -> None:
    """Raises ValueError, with the known names, if ``name`` is none of them; the message calls it ``argument``.

    Whether Gymnasium knows the id in ``gymnasium:ID`` is not asked: :func:`check` does.
    """
    if is_gymnasium(name):
        return
    if not isinstance(name, str) or (name not in ENVIRONMENTS and name not in known()):
        raise ValueError(f"{argument}: expected one of {', '.join(known())}, got {name!r} (or {GYMNASIUM}ID)")


def file_name(name: str) -> str:
    """``name`` as part of a file's name: ids of Gymnasium have colons and slashes."""
    return name.replace(":", "-").replace("/", "-")


def check(name: str, **kwargs: Any) -> ObsSpec | None:
    """Raises what :func:`make` would, and returns the observations, where that costs little: for ``gymnasium:ID``."""
    if not is_gymnasium(name):
        return None
    env = make(name, 1, **kwargs)
    env.close()
    return env.obs


def make(name: str, num_envs: int, device: torch.device | str = "cpu", seed: int = 0, **kwargs: Any) -> Env:
    """Builds the environment ``name`` with ``num_envs`` copies on ``device``.

    Args:
        name: one of :func:`known`: ``"genesis-hover"`` and ``"genesis-course"`` (they need genesis-world),
            ``"quadrotor"`` and ``"quadrotor-course"`` (torch only), or one that an installed package registers. The
            names of pydrone's own environments cannot be overridden. Or ``"gymnasium:ID"``, see
            :func:`pydrone.envs.gymnasium_ids.make`.
        num_envs: number of environments stepped together.
        device: where observations, rewards and actions live.
        seed: of all random numbers of the environment.
        **kwargs: options of the environment.

    Raises:
        ValueError: ``name`` is unknown or registered twice, or the registered callable does not accept these arguments
            or does not return a :class:`pydrone.envs.base.Env`.
        ImportError: the entry point cannot be imported.
    """
    check_name(name, "name")
    if is_gymnasium(name):
        build = importlib.import_module("pydrone.envs.gymnasium_ids").make
        return build(name, num_envs=num_envs, device=device, seed=seed, **kwargs)
    if name in ENVIRONMENTS:
        module, cls = ENVIRONMENTS[name].split(":")
        return getattr(importlib.import_module(module), cls)(num_envs=num_envs, device=device, seed=seed, **kwargs)
    point = _entry_point(name)
    try:
        factory = point.load()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"env {name!r}: {_origin(point)} cannot be imported: {error}") from error
    kwargs = {"num_envs": num_envs, "device": device, "seed": seed, **kwargs}
    try:
        inspect.signature(factory).bind(**kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"env {name!r}: {_origin(point)} cannot be called with {', '.join(kwargs)}: {error}"
        ) from error
    env = factory(**kwargs)
    _check_env(env, name, point, num_envs)
    with contextlib.suppress(AttributeError):  # it has slots
        env.registered_name = name
    return env


def name_of(env: Any) -> str | None:
    """The name that :func:`make` builds such an environment by; None: there is none, as for a class derived from one.

    Options that it was built with are not in the name.
    """
    # Not by getattr: a wrapper may pass on the attributes of what it wraps.
    name = getattr(env, "__dict__", {}).get("registered_name")
    if name is not None:
        return name
    home = f"{type(env).__module__}:{type(env).__qualname__}"
    offered = {point.name: point.value for point in entry_points(group=GROUP)} | ENVIRONMENTS
    return next((name for name, value in offered.items() if value == home), None)


def _entry_point(name: str) -> EntryPoint:
    # A package may be found twice: installed, and in the working folder.
    points = list({point.value: point for point in entry_points(group=GROUP, name=name)}.values())
    if len(points) > 1:
        raise ValueError(f"name: {name!r} is offered more than once: {' and '.join(sorted(map(_origin, points)))}")
    return points[0]


def _origin(point: EntryPoint) -> str:
    return f"{point.value} of {point.dist.name}" if point.dist is not None else point.value


def _check_env(env: Any, name: str, point: EntryPoint, num_envs: int) -> None:
    from pydrone.envs.base import Env, autoreset_mode

    parts = ("num_envs", "obs", "actions", "device", "max_episode_length", "autoreset")
    methods = ("reset", "step", "randomize_episode_lengths", "close")
    missing = [part for part in (*parts, *methods) if not hasattr(env, part)]
    if missing or not isinstance(env, Env):
        raise ValueError(
            f"env {name!r}: expected {_origin(point)} to make a pydrone.envs.Env, got a {type(env).__name__} "
            f"without {', '.join(missing)}"
        )
    if env.num_envs != num_envs:
        raise ValueError(f"env {name!r}: expected num_envs {num_envs}, got {env.num_envs}")
    autoreset_mode(env.autoreset, f"env {name!r}: autoreset")
