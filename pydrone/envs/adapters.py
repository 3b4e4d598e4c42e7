"""Adapters from the vectorised environments of other libraries to :class:`pydrone.envs.base.Env`.

:class:`GymnasiumEnv` takes a ``gymnasium.vector.VectorEnv``, :class:`RslRlEnv` an ``rsl_rl.env.VecEnv``. Gymnasium is
imported when a :class:`GymnasiumEnv` is constructed, rsl_rl never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pydrone.envs.base import ActionSpec, Autoreset, EpisodeStats, Obs, ObsSpec, StepResult, autoreset_mode

BoundedActions = Literal["clip", "rescale", "none"]


class GymnasiumEnv:
    """A ``gymnasium.vector.VectorEnv`` (Gymnasium 1.1 or later) with autoreset mode SAME_STEP or NEXT_STEP.

    Observation spaces: ``Box``, or ``Dict`` of ``Box``. Observations become float32, except that uint8 images in a
    ``Dict`` stay uint8. Action spaces: ``Box`` of any shape, flattened to ``actions`` numbers, ``Discrete``, and
    ``MultiDiscrete`` of any shape, flattened to D choices.

    Attributes:
        venv: the wrapped environment.
        num_discrete_actions: the number of choices of a ``Discrete`` action space, None for a ``Box``. Discrete actions
            are int64 [N] and start at 0 whatever the ``start`` of the space, and ``actions`` is ``((), torch.int64)``.
            Of a ``MultiDiscrete``, a tuple of D numbers of choices; actions are int64 [N, D].
        action_low, action_high: [A] float32 bounds of a ``Box``, infinite where there are none; None for ``Discrete``.
        action_limits, action_range, action_integers, action_start: what becomes of actions, see
            :class:`pydrone.envs.base.Env`.

    Args:
        venv: the vector environment.
        device: where the tensors live.
        seed: of the first ``reset``.
        bounded_actions: ``"clip"`` clips actions to the ``Box``'s bounds, ``"rescale"`` clips them to [-1, 1] and maps
            this range onto the bounds, ``"none"`` passes them on unchanged.
        max_episode_length: the time limit in steps, if known; taken from ``venv.spec`` by default.

    Raises:
        ValueError: the autoreset mode is DISABLED or unknown, or ``"rescale"`` is used with an infinite bound.
            Or the choices of a ``MultiDiscrete`` start at different numbers.
        TypeError: the space is of another kind.
    """

    def __init__(
        self,
        venv: Any,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        *,
        bounded_actions: BoundedActions = "clip",
        max_episode_length: int | None = None,
    ) -> None:
        self.venv = venv
        self.num_envs: int = venv.num_envs
        self.device = torch.device(device)
        self.autoreset = _autoreset(venv)
        self._seed = seed
        spec = getattr(venv, "spec", None)
        self.max_episode_length = max_episode_length or getattr(spec, "max_episode_steps", None)

        self.obs, self._dtypes = _obs_spec(venv.single_observation_space)
        self._read_actions(venv.single_action_space, bounded_actions)
        self._stats = EpisodeStats(self.num_envs, ("return",), self.device)
        self._resets = np.zeros(self.num_envs, dtype=bool)  # NEXT_STEP: the environments that the next step resets

    def reset(self) -> Obs:
        """Resets all environments, with the seed the first time, and returns the observations."""
        obs, _ = self.venv.reset(seed=self._seed)
        self._seed = None
        self._resets = np.zeros(self.num_envs, dtype=bool)
        self._stats.reset()
        return self._obs(obs)

    def step(self, actions: Tensor) -> StepResult:
        """Applies ``actions``: [N, A] float for a ``Box``; integers [N] for ``Discrete``, [N, D] for several."""
        obs, reward, terminated, truncated, info = self.venv.step(self._actions(actions))
        terminated, truncated = _flags(terminated), _flags(truncated)
        dones = terminated | truncated
        truncated &= ~terminated
        rewards = self._tensor(reward, torch.float32)
        valid: Tensor | None = None
        final_obs: Obs | None = None
        new_obs = self._obs(obs)
        if self.autoreset == "next_step":
            resets = self._resets
            dones &= ~resets
            truncated &= ~resets
            valid = self._tensor(~resets, torch.bool)
            rewards = torch.where(valid, rewards, 0)
            self._resets = dones.copy()
        else:
            final_obs = self._final_obs(new_obs, truncated, info) if truncated.any() else new_obs
        ends = self._tensor(dones, torch.bool)
        log = self._stats.update(rewards[None], ends, valid)
        return StepResult(new_obs, rewards, ends, self._tensor(truncated, torch.bool), final_obs, valid, log)

    def randomize_episode_lengths(self) -> None:
        """Does nothing: Gymnasium does not expose the age of an episode."""

    def close(self) -> None:
        """Closes the wrapped environment."""
        self.venv.close()

    def _read_actions(self, space: Any, bounded: BoundedActions) -> None:
        from gymnasium import spaces

        if bounded not in ("clip", "rescale", "none"):
            raise ValueError(f"bounded_actions: expected 'clip', 'rescale' or 'none', got {bounded!r}")
        self.actions: ActionSpec
        self.num_discrete_actions: int | tuple[int, ...] | None = None
        self.action_low: Tensor | None = None
        self.action_high: Tensor | None = None
        self._bounded = bounded
        self.action_limits: Any = None
        self.action_range: Any = None
        self.action_integers, self.action_start = False, 0
        self._action_shape: tuple[int, ...] = ()
        if isinstance(space, spaces.Discrete):
            self.actions = ((), torch.int64)
            self.num_discrete_actions = int(space.n)
            self.action_start = int(space.start)
            return
        if isinstance(space, spaces.MultiDiscrete):
            first = set(space.start.reshape(-1).tolist())
            if len(first) > 1:
                raise ValueError(f"venv: expected choices that all start at the same number, got {space}")
            self._action_shape = tuple(space.shape)
            self.num_discrete_actions = tuple(map(int, space.nvec.reshape(-1)))
            self.actions = ((len(self.num_discrete_actions),), torch.int64)
            self.action_start = first.pop()
            return
        if not isinstance(space, spaces.Box):
            raise TypeError(f"venv: expected a Box or Discrete action space, or a MultiDiscrete one, got {space}")
        low, high = (np.asarray(bound, np.float32).reshape(-1) for bound in (space.low, space.high))
        if bounded == "rescale" and not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"bounded_actions: 'rescale' needs finite bounds, got {space}")
        self.actions = int(low.size)
        self._action_shape = tuple(space.shape)
        self._action_dtype = space.dtype
        self._action_bounds = low, high
        self.action_low, self.action_high = self._tensor(low, torch.float32), self._tensor(high, torch.float32)
        self.action_integers = not np.issubdtype(space.dtype, np.floating)
        if bounded == "clip":
            self.action_limits = low.tolist(), high.tolist()
        elif bounded == "rescale":
            self.action_limits, self.action_range = (-1.0, 1.0), (low.tolist(), high.tolist())

    def _actions(self, actions: Tensor) -> np.ndarray:
        if self.num_discrete_actions is not None:
            choices = self.num_discrete_actions
            expected = [self.num_envs] if isinstance(choices, int) else [self.num_envs, len(choices)]
            if actions.is_floating_point():
                raise TypeError(f"actions: expected integers for a Discrete space, got {actions.dtype}")
        else:
            expected = [self.num_envs, len(self._action_bounds[0])]
        if list(actions.shape) != expected:
            raise ValueError(f"actions: expected shape {expected}, got {list(actions.shape)}")
        array = actions.detach().cpu().numpy()
        if self.num_discrete_actions is not None:
            return array.astype(np.int64).reshape(self.num_envs, *self._action_shape) + self.action_start
        low, high = self._action_bounds
        if self._bounded == "clip":
            array = np.clip(array, low, high)
        elif self._bounded == "rescale":
            # clipped again, since rounding may carry the sum beyond a bound
            array = np.clip(low + (np.clip(array, -1, 1) + 1) * 0.5 * (high - low), low, high)
        return array.reshape(self.num_envs, *self._action_shape).astype(self._action_dtype)

    def _tensor(self, value: Any, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value).to(self.device, dtype)

    def _obs(self, obs: Any) -> Obs:
        if isinstance(self._dtypes, dict):
            return {key: self._tensor(obs[key], dtype) for key, dtype in self._dtypes.items()}
        return self._tensor(obs, self._dtypes)

    def _final_obs(self, obs: Obs, rows: np.ndarray, info: Mapping[str, Any]) -> Obs:
        """``obs``, with the final observations in ``rows``."""
        final = info.get("final_obs")
        if final is None:
            raise RuntimeError(
                "venv: an episode was truncated under SAME_STEP autoreset, but info has no 'final_obs'; without it the "
                "truncation cannot be bootstrapped"
            )
        index = np.flatnonzero(rows)
        where = torch.from_numpy(index).to(self.device)

        def patch(old: Tensor, key: str | None, dtype: torch.dtype) -> Tensor:
            # Gymnasium gives an object array of single observations; others give a batch, or a dict of batches
            if isinstance(final, np.ndarray) and final.dtype == object:
                picked: Any = np.stack([np.asarray(final[i] if key is None else final[i][key]) for i in index])
                new = self._tensor(picked, dtype)
            else:
                new = self._tensor(final if key is None else final[key], dtype)[where]
            return old.index_copy(0, where, new)

        if isinstance(self._dtypes, dict):
            assert isinstance(obs, dict)
            return {key: patch(obs[key], key, dtype) for key, dtype in self._dtypes.items()}
        assert isinstance(obs, Tensor)
        return patch(obs, None, self._dtypes)


class RslRlEnv:
    """An ``rsl_rl.env.VecEnv`` (rsl_rl 5: TensorDict observations, autoreset in the same step).

    Time-outs are read from ``extras["time_outs"]``; without that key there are none. Final observations are read from
    ``extras["final_obs"]``, a tensor [N, ...] or a mapping of groups (Isaac Lab with ``compute_final_obs``). rsl_rl's
    protocol has none: in a step without that key ``final_obs`` is None, and time-outs can only be bootstrapped with
    the stored value (``timeout_bootstrap="stored_value"``). ``extras["log"]`` is passed on.

    Args:
        venv: the environment.
        groups: the observation groups to use: a name gives a tensor, a list of names a dict, None a dict of all.

    Raises:
        KeyError: the environment has no such group.
    """

    autoreset: Autoreset = "same_step"

    def __init__(self, venv: Any, groups: str | Sequence[str] | None = None) -> None:
        self.venv = venv
        self.num_envs: int = venv.num_envs
        self.actions: ActionSpec = int(venv.num_actions)
        self.device = torch.device(venv.device)
        limit = getattr(venv, "max_episode_length", None)
        # each environment may have its own limit; the largest bounds them all
        self.max_episode_length = None if limit is None else int(torch.as_tensor(limit).max())
        first = venv.get_observations()
        self._groups: str | list[str]
        if groups is None:
            self._groups = [str(key) for key in first.keys()]  # noqa: SIM118 (a TensorDict iterates over its rows)
        else:
            self._groups = groups if isinstance(groups, str) else list(groups)
        present = list(first.keys())
        for name in [self._groups] if isinstance(self._groups, str) else self._groups:
            if name not in present:
                raise KeyError(f"groups: expected some of {present}, got {name!r}")
        obs = self._obs(first)
        self.obs: ObsSpec = (
            {key: (tuple(value.shape[1:]), value.dtype) for key, value in obs.items()}
            if isinstance(obs, dict)
            else tuple(obs.shape[1:])
        )
        self._stats = EpisodeStats(self.num_envs, ("return",), self.device)

    def reset(self) -> Obs:
        """Resets the environment if it has a ``reset``, and returns the observations."""
        reset = getattr(self.venv, "reset", None)
        if callable(reset):
            reset()
        self._stats.reset()
        return self._obs(self.venv.get_observations())

    def step(self, actions: Tensor) -> StepResult:
        """Applies ``actions`` [N, A]."""
        obs, rewards, dones, extras = self.venv.step(actions)
        rewards = self._flat(rewards, "rewards").to(torch.float32)
        dones = self._flat(dones, "dones") != 0
        time_outs = extras.get("time_outs")
        truncated = torch.zeros_like(dones) if time_outs is None else (self._flat(time_outs, "time_outs") != 0) & dones
        log = {}
        for key, value in (extras.get("log") or {}).items():
            if isinstance(value, (int, float, np.number, np.ndarray, Tensor)):
                numbers = torch.as_tensor(value, dtype=torch.float32, device=self.device)
                if numbers.numel():  # none where an environment logs its ended episodes, and none has ended
                    log[key] = numbers.mean()
        log |= self._stats.update(rewards[None], dones)
        return StepResult(self._obs(obs), rewards, dones, truncated, self._final_obs(extras), None, log)

    def randomize_episode_lengths(self) -> None:
        """Draws ``episode_length_buf`` at random, as rsl_rl's runner does."""
        ages = getattr(self.venv, "episode_length_buf", None)
        if ages is not None and self.max_episode_length is not None:
            self.venv.episode_length_buf = torch.randint_like(ages, high=self.max_episode_length)

    def close(self) -> None:
        """Closes the environment if it has a ``close``."""
        close = getattr(self.venv, "close", None)
        if callable(close):
            close()

    def _obs(self, obs: Any) -> Obs:
        if isinstance(self._groups, str):
            return _float32(obs[self._groups]).to(self.device)
        return {key: _float32(obs[key]).to(self.device) for key in self._groups}

    def _final_obs(self, extras: Mapping[str, Any]) -> Obs | None:
        given = extras.get("final_obs")
        if given is None:
            return None
        names = [self._groups] if isinstance(self._groups, str) else self._groups
        if isinstance(given, Tensor) and isinstance(self._groups, str):
            given = {self._groups: given}
        # A TensorDict is a mapping in all but its class.
        got = list(given.keys()) if hasattr(given, "keys") else type(given).__name__
        if not set(names) <= set(got if isinstance(got, list) else ()):
            raise ValueError(f"extras['final_obs']: expected a mapping of the groups {names}, got {got}")
        return self._obs(given)

    def _flat(self, value: Any, name: str) -> Tensor:
        tensor = torch.as_tensor(value, device=self.device)
        if tensor.numel() != self.num_envs:
            raise ValueError(f"{name}: expected shape {[self.num_envs]}, got {list(tensor.shape)}")
        return tensor.reshape(self.num_envs)


def _float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.uint8 else value.to(torch.float32)


def _flags(value: Any) -> np.ndarray:
    """A bool copy on the host of an array of any library."""
    return np.array(value.cpu() if isinstance(value, Tensor) else value, dtype=bool)


def _autoreset(venv: Any) -> Autoreset:
    mode = (venv.metadata or {}).get("autoreset_mode")
    try:
        return autoreset_mode(mode)
    except ValueError:
        pass
    if str(getattr(mode, "name", mode)).upper() == "DISABLED":
        raise ValueError(
            "venv: autoreset mode DISABLED leaves ended environments to the caller, expected SAME_STEP or NEXT_STEP "
            "(for instance gymnasium.make_vec(..., vector_kwargs={'autoreset_mode': AutoresetMode.SAME_STEP}))"
        )
    raise ValueError(f"venv: expected metadata['autoreset_mode'] to be SAME_STEP or NEXT_STEP, got {mode!r}")


def _obs_spec(space: Any) -> tuple[ObsSpec, torch.dtype | dict[str, torch.dtype]]:
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return tuple(space.shape), torch.float32
    if isinstance(space, spaces.Dict) and all(isinstance(part, spaces.Box) for part in space.values()):
        dtypes = {key: torch.uint8 if part.dtype == np.uint8 else torch.float32 for key, part in space.items()}
        return {key: (tuple(part.shape), dtypes[key]) for key, part in space.items()}, dtypes
    raise TypeError(f"venv: expected an observation space Box or Dict of Box, got {space}")
