"""The protocol of an environment, :class:`Env`, its :class:`StepResult`, and episode statistics.

**Autoreset.** A vectorised environment resets each of its environments by itself when an episode ends. When it does so
determines where the last observation of the episode is found, and so the value that a *truncated* episode bootstraps
with (a terminated one needs none):

``"same_step"``
    ``step`` resets at once: ``StepResult.obs`` of an ended environment is the first observation of the next episode.
    The last one of the old episode is ``final_obs``, and a truncation bootstraps with ``V(final_obs)``. If the
    environment does not provide it (``final_obs`` is None, as with rsl_rl), only an approximation is left: the stored
    value of the observation before the step (``timeout_bootstrap="stored_value"``). V(obs) would be the value of
    another episode.
``"next_step"``
    ``step`` leaves an ended environment alone: ``StepResult.obs`` *is* the final observation, and a truncation
    bootstraps with ``V(obs)``, the value of the next step (``timeout_bootstrap="next_value"``). The next step
    ignores its action and only resets. That transition belongs to no episode: its ``valid``, ``dones`` and
    ``truncated`` are False, and neither its reward nor the action counts, whatever they are.

Each step says for itself whether it has a ``final_obs``: where one step's is None, the truncations of that step take
the approximation, and those of the others do not.

**Ends.** ``dones`` is set for every end; ``truncated`` only if the time limit alone caused it: an environment that
crashes in the step of its time-out has terminated.

**Log.** ``StepResult.log`` holds 0-dimensional tensors on the environment's device, so that logging costs no
host synchronisation: ``episode/count`` is the number of episodes that ended in this step, every other ``episode/...``
the *sum* of a quantity over those episodes, and any other key a mean over the environments. Python's and NumPy's
numbers do too, and so does one number for each environment, [N], of which the sum or the mean is taken. Keys may come
and go. :class:`LogMeter` adds them up over a rollout and reads them once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from torch import Tensor

Obs: TypeAlias = "Tensor | dict[str, Tensor]"
Shape: TypeAlias = "int | Sequence[int]"
#: as in ``RolloutBuffer(obs=...)``: an int, a shape, or a mapping of names to shapes or (shape, dtype)
ObsSpec: TypeAlias = "Shape | Mapping[str, Shape | tuple[Shape, torch.dtype]]"
#: as in ``RolloutBuffer(actions=...)``: an int for continuous actions, ``((), torch.int64)`` for discrete ones
ActionSpec: TypeAlias = "int | tuple[Shape, torch.dtype]"
Autoreset: TypeAlias = Literal["same_step", "next_step"]

COUNT = "episode/count"


class StepResult(NamedTuple):
    """One transition of all N environments.

    The environment may overwrite all of these tensors in its next ``step``: store them before that (the rollout
    buffer's ``begin`` before ``env.step``, ``end`` after it), or clone them.
    """

    obs: Obs
    """[N, ...]: the observations to act on next (after the reset under ``"same_step"``)."""
    rewards: Tensor
    """[N] float32."""
    dones: Tensor
    """[N] bool: terminated or truncated."""
    truncated: Tensor
    """[N] bool: ended by the time limit alone."""
    final_obs: Obs | None
    """Like ``obs``: the true final observation in rows where ``truncated`` is set; other rows are undefined. None if
    unknown or if no row is truncated, and under ``"next_step"``, where it is ``obs``."""
    valid: Tensor | None
    """[N] bool: False marks a ``"next_step"`` reset transition. None: all are valid."""
    log: dict[str, Tensor]
    """0-dimensional device tensors, or other numbers, see the documentation of this module."""


@runtime_checkable
class Env(Protocol):
    """A vectorised environment of N = ``num_envs`` copies that resets them by itself.

    If it also has ``state_dict()`` and ``load_state_dict(state)`` (:mod:`pydrone.envs.state`), a resumed training
    continues it bit for bit; otherwise all episodes start anew.

    With ``capturable = True`` CUDA graphs capture its steps: they have fixed shapes, wait for nothing, write
    observations to the same memory, and draw from ``generator`` alone. If it also has ``outside``, a function that
    calls the function it is given, ``step`` passes to it what a graph cannot hold; a capture replaces it.

    It may also say what becomes of a policy's actions, which an export then does to them. ``action_limits = (low,
    high)``: they are clipped to these bounds, numbers or one for each dimension; None: they are not. ``action_range =
    (low, high)``: what the limits are mapped onto. ``action_integers``: whether fractions are dropped.
    ``action_start``: the first of discrete actions. Without any of them an exported policy's actions are left alone.
    """

    num_envs: int
    obs: ObsSpec
    actions: ActionSpec
    device: torch.device
    max_episode_length: int | None
    """Steps after which an episode is truncated; None if there is no limit or it is unknown. A hint: episodes that are
    truncated earlier cost memory, see :meth:`~pydrone.buffer.RolloutBuffer.grow_final_obs`."""
    autoreset: Autoreset

    def reset(self) -> Obs:
        """Starts a new episode everywhere and returns the first observations [N, ...]."""
        ...

    def step(self, actions: Tensor) -> StepResult:
        """Applies ``actions`` [N, ...] for one step."""
        ...

    def randomize_episode_lengths(self) -> None:
        """Gives every episode a random age, so that they do not all time out at once. No-op if unsupported."""
        ...

    def close(self) -> None:
        """Frees the resources of the environment. It cannot be stepped afterwards."""
        ...


def autoreset_mode(mode: Any, name: str = "env.autoreset") -> Autoreset:
    """``mode`` as :data:`Autoreset` spells it, from Gymnasium's ``AutoresetMode`` or a name in other letters.

    Raises ValueError, which calls it ``name``, for any other.
    """
    text = mode if isinstance(mode, str) else getattr(mode, "name", "")
    plain = str(text).replace("_", "").lower()
    for known in get_args(Autoreset):
        if plain == known.replace("_", ""):
            return known
    hint = ": it would leave ended environments to the caller" if plain == "disabled" else ""
    raise ValueError(f"{name}: expected 'same_step' or 'next_step', got {mode!r}{hint}")


def begun(result: StepResult, autoreset: Autoreset) -> Tensor:
    """[N] bool: where ``result.obs`` is the first of an episode: what a recurrent policy remembers ends before it."""
    if autoreset == "same_step":
        return result.dones
    return torch.zeros_like(result.dones) if result.valid is None else result.valid == 0


def to_act_on(result: StepResult, autoreset: Autoreset) -> Obs:
    """``result.obs``, with zeros where an episode has terminated and the next step only resets it.

    Such an observation serves nobody, and may be NaN. Where an episode was truncated it serves the bootstrap.
    """
    if autoreset == "same_step":
        return result.obs
    over = (result.dones != 0) & (result.truncated == 0)

    def cleared(x: Tensor) -> Tensor:
        return x.masked_fill(over.reshape(-1, *[1] * (x.dim() - 1)), 0)

    return cleared(result.obs) if isinstance(result.obs, Tensor) else {k: cleared(x) for k, x in result.obs.items()}


class EpisodeStats:
    """Sums of quantities over the running episode of each environment, and over the episodes that end.

    ``names`` are the quantities passed to ``update``. The length is counted in addition: the steps actually taken,
    whatever age ``randomize_episode_lengths`` has set. Updates take few launches and no synchronisation.
    """

    @torch.inference_mode(False)
    def __init__(self, num_envs: int, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = ("count", "length", *names)
        self._sums = torch.zeros(len(names) + 2, num_envs, device=device)
        self._sums[0] = 1  # so that the sum of row 0 over ended episodes counts them
        self._ended = torch.zeros(num_envs, device=device)

    def reset(self) -> None:
        """Discards the running episodes."""
        self._sums[1:].zero_()

    def update(self, values: Tensor, dones: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Adds one step.

        Args:
            values: [K, N] float32, the step's quantities in the order of ``names``. Must be finite.
            dones: [N] bool, whether the episode ended with this step.
            valid: [N] bool, False where the step belongs to no episode.

        Returns:
            ``episode/count``, ``episode/length`` and ``episode/<name>``: sums over the episodes that ended.
        """
        sums = self._sums
        if valid is None:
            sums[1].add_(1)
            sums[2:].add_(values)
        else:
            sums[1].add_(valid)
            sums[2:].add_(torch.where(valid, values, 0))
        self._ended.copy_(dones)
        ended = torch.mv(sums, self._ended)
        sums[1:].masked_fill_(dones, 0)
        return {f"episode/{name}": total for name, total in zip(self.names, ended.unbind(), strict=True)}


class LogMeter:
    """Adds up the logs of many steps on the device; ``means`` reads them with a single host synchronisation.

    Keys may differ from step to step; a mean is over the steps that had the key.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def add(self, log: Mapping[str, Any]) -> None:
        """Adds one step's ``StepResult.log``; a key that holds no number, [0], counts as absent.

        Raises TypeError, with the key, where a value is no number and not one for each environment.
        """
        scalars = log_scalars(log)
        new = [key for key in scalars if key not in self._sums]
        known = [key for key in scalars if key in self._sums]
        # new tensors each time: the environment may overwrite its own; all by one launch on a GPU
        if new:
            self._sums.update(zip(new, torch._foreach_add([scalars[key] for key in new], 0.0)))
        if known:
            sums = torch._foreach_add([self._sums[key] for key in known], [scalars[key] for key in known])
            self._sums.update(zip(known, sums))
        for key in scalars:
            self._steps[key] = self._steps.get(key, 0) + 1

    def copy(self) -> LogMeter:
        """An independent meter with the same sums."""
        other = LogMeter()
        other._sums, other._steps = dict(self._sums), dict(self._steps)
        return other

    def keys(self) -> set[str]:
        """The keys logged since the last call of ``means``."""
        return set(self._sums)

    def align(self, keys: Sequence[str]) -> None:
        """Puts the sums in the order of ``keys``, a superset of those logged; the sums of new keys are 0."""
        self._sums = {key: self._sums.get(key, torch.zeros(())) for key in keys}
        self._steps = {key: self._steps.get(key, 0) for key in keys}

    def steps(self) -> list[int]:
        """The number of steps that had each key, in the order of ``totals()``."""
        return [self._steps[key] for key in self._sums]

    def totals(self) -> list[Tensor]:
        """The sums, scalars on the device, to be read together with other figures and passed to ``means``."""
        return list(self._sums.values())

    def means(
        self, totals: Sequence[float] | None = None, clear: bool = True, steps: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Means since the last call: ``episode/...`` per ended episode (left out if none ended), others per step.

        ``episode/count`` stays the number of ended episodes. ``totals`` and ``steps``: the numbers of ``totals()`` and
        ``steps()`` if they have been read already; both may be summed over several meters with the same key order.
        """
        keys = list(self._sums)
        if not keys:
            return {}
        if totals is None:
            device = self._sums[keys[0]].device
            totals = torch.stack([x.to(device) for x in self.totals()]).tolist()
        sums: dict[str, float] = dict(zip(keys, totals, strict=True))
        counted = dict(zip(keys, self.steps() if steps is None else steps, strict=True))
        episodes = sums.get(COUNT, 0.0)
        means: dict[str, float] = {}
        for key, total in sums.items():
            if key == COUNT:
                means[key] = total
            elif key.startswith("episode/"):
                if episodes > 0:
                    means[key] = total / episodes
            elif counted[key]:
                means[key] = total / counted[key]
        if clear:
            self._sums.clear()
            self._steps.clear()
        return means


def log_scalars(log: Mapping[str, Any]) -> dict[str, Tensor]:
    """A ``StepResult.log`` as 0-dimensional float32 tensors, which may be the environment's own."""
    if not isinstance(log, Mapping):
        raise TypeError(f"log: expected a mapping of names to numbers, got {type(log).__name__}")
    scalars = {}
    for key, value in log.items():
        if not isinstance(key, str):
            raise TypeError(f"log: expected names as keys, got {key!r}")
        expected = f"log[{key!r}]: expected a number, or one for each environment, got"
        try:
            x = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{expected} {value!r:.80}") from None
        if x.dim() > 1 or x.is_complex():
            raise TypeError(f"{expected} {x.dtype if x.is_complex() else f'shape {list(x.shape)}'}")
        x = x.to(torch.float32)
        if x.dim() == 0:
            scalars[key] = x
        elif len(x):
            scalars[key] = x.sum() if key.startswith("episode/") else x.mean()
    return scalars


def check_actions(actions: Any, num_envs: int, width: int, device: torch.device) -> Tensor:
    """Returns ``actions`` as float32 [num_envs, width]; TypeError or ValueError if it has another shape or device."""
    if not isinstance(actions, Tensor):
        raise TypeError(f"actions: expected a torch.Tensor, got {type(actions).__name__}")
    if tuple(actions.shape) != (num_envs, width):
        raise ValueError(f"actions: expected shape {[num_envs, width]}, got {list(actions.shape)}")
    if actions.device.type != device.type:
        raise ValueError(f"actions: expected a tensor on {device}, got one on {actions.device}")
    actions = actions.detach()
    return actions if actions.dtype is torch.float32 else actions.to(torch.float32)
