"""Gymnasium's environments by their ids: ``gymnasium:Pendulum-v1``, or ``gymnasium:my_module:Mine-v0``.

Gymnasium builds and steps them one after another (``SyncVectorEnv``), with autoreset mode SAME_STEP, so that no step is
lost and truncations bootstrap from the final observation. :class:`pydrone.envs.adapters.GymnasiumEnv` adapts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydrone.envs.registry import GYMNASIUM
from pydrone.ops.packages import needed

if TYPE_CHECKING:
    import torch

    from pydrone.envs.adapters import GymnasiumEnv


def make(
    name: str, num_envs: int, device: torch.device | str = "cpu", seed: int | None = 0, **kwargs: Any
) -> GymnasiumEnv:
    """``num_envs`` environments of Gymnasium.

    ``Box`` observations of several dimensions are flattened, ``Discrete`` and ``MultiDiscrete`` ones become one-hot,
    ``MultiBinary`` ones float; the parts of a ``Dict`` become groups. Actions of a ``Box`` with finite bounds are in
    [-1, 1] and mapped onto them; if a bound is infinite, actions are only clipped to the finite ones.

    Args:
        name: ``gymnasium:`` and an id as ``gymnasium.make`` takes it; ``module:id`` imports the module first.
        num_envs: number of environments stepped together.
        device: where observations, rewards and actions live.
        seed: of the first reset; environment i gets a number drawn from it, plus i.
        **kwargs: arguments of the environment.

    Raises:
        ImportError: Gymnasium, the module, or a package that the environment needs is not installed.
        ValueError: Gymnasium does not know the id, the environment cannot be made with these arguments, or its
            observations or actions are of a kind that is not supported.
    """
    with needed("gymnasium", f"env {name!r}", '"pydrone-rl[gymnasium]"'):
        import gymnasium
    import numpy as np
    from gymnasium.vector import AutoresetMode

    from pydrone.envs.adapters import GymnasiumEnv

    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    wanted = f"env {name!r}{f' with {given}' if given else ''}"
    try:
        venv = gymnasium.make_vec(
            name.removeprefix(GYMNASIUM),
            num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP},
            wrappers=[lambda env: _flat(env, name)],
            **kwargs,
        )
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(f"{wanted}: {error}") from error
    except _Unsupported as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever an environment's constructor raises
        raise ValueError(f"{wanted}: cannot be made: {error}") from error
    space = venv.single_action_space
    bounded = isinstance(space, gymnasium.spaces.Box) and bool(space.is_bounded())
    if seed is not None:
        # Neighbouring processes and resumed trainings have seeds that lie close together: seed + i would overlap.
        seed = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
    try:
        env = GymnasiumEnv(venv, device, seed, bounded_actions="rescale" if bounded else "clip")
    except (TypeError, ValueError) as error:
        venv.close()
        raise ValueError(f"env {name!r}: {error}") from error
    env.registered_name, env.env_kwargs = name, kwargs
    return env


class _Unsupported(ValueError):
    """The space is of a kind that is not supported."""


def _flat(env: Any, name: str) -> Any:
    """``env`` with each observation, or each part of a ``Dict``, a vector."""
    from gymnasium import spaces
    from gymnasium.wrappers import TransformObservation

    space = env.observation_space
    named = isinstance(space, spaces.Dict)
    parts = dict(space.items()) if named else {None: space}
    known = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    for key, part in parts.items():
        if not isinstance(part, known):
            where = "observations" if key is None else f"observations {key!r}"
            raise _Unsupported(
                f"env {name!r}: {where}: expected a Box, Discrete, MultiDiscrete or MultiBinary space, or a Dict of "
                f"these, got {part}"
            )
    if all(isinstance(part, spaces.Box) and len(part.shape) == 1 for part in parts.values()):
        return env
    flat = {key: spaces.flatten_space(part) for key, part in parts.items()}
    if named:
        return TransformObservation(
            env, lambda obs: {key: spaces.flatten(parts[key], obs[key]) for key in parts}, spaces.Dict(flat)
        )
    return TransformObservation(env, lambda obs: spaces.flatten(space, obs), flat[None])
