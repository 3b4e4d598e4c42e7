"""The ring below :class:`~pydrone.buffer.RolloutBuffer`: its memory, its counters, its views and its state."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pydrone.estimators import check_strided
from pydrone.ops import pages
from pydrone.ops.dispatch import select
from pydrone.ops.schema import CURSOR_DISCARDED, CURSOR_FLAG, CURSOR_NUM_STEPS, INVALID, SCALAR_TYPES, TRUNCATED
from pydrone.rollout.layout import Allocation, Field, Layout


class BufferFull(RuntimeError):
    """An append would overwrite a rollout that has not been discarded; nothing was written."""


class NonFinite(NamedTuple):
    """A field of a rollout with ``count`` numbers that are NaN or infinite: first in ``step``, and there in ``env``."""

    name: str
    count: int
    env: int
    step: int

    def __str__(self) -> str:
        values = "1 value that is" if self.count == 1 else f"{self.count} values that are"
        return f"{self.name}: {values} not finite, the first of environment {self.env} at step {self.step}"


class Ring:
    """Steps [discarded, appended), counted from the first ever; step k lies in slot k % capacity.

    The oldest rollout, steps [discarded, discarded + T), is what all views show.
    """

    def __init__(
        self,
        arguments: dict[str, object],
        device: torch.device | str,
        seed: int,
        rank: int,
        backend: str | None,
        non_finite: str,
    ) -> None:
        if non_finite not in ("ignore", "warn", "raise"):
            raise ValueError(f"non_finite: expected 'ignore', 'warn' or 'raise', got {non_finite!r}")
        self._policy = non_finite
        self.device = _indexed(device)
        self._on_cuda = self.device.type == "cuda"
        self._arguments = arguments
        self._layout = Layout(**self._arguments)
        for name, x in (("seed", seed), ("rank", rank)):
            if isinstance(x, bool) or not isinstance(x, int):
                raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
        self._seed, self._rank, self._backend = seed, rank, backend
        self._key = mix_seed(self._seed, self._rank)
        self._ops = select(self.device, backend)
        layout = self._layout
        self.num_envs, self.num_steps, self.capacity = layout.num_envs, layout.num_steps, layout.capacity
        # Tensors made in inference mode cannot be trained on later.
        with torch.inference_mode(False):
            self._memory = _allocate(layout.allocations(), self.device)
            self._views = {x.name: field_view(self._memory["rows"], x) for x in layout.fields.values()}
            self._final_rows = self._views["final_row"].t() if layout.final_obs_rows else None
        memory = self._memory
        self._rows, self._codes = memory["rows"], memory["dones"]
        self._final_obs, self._pool_count = memory.get("final_obs"), memory.get("final_obs_count")
        self._pool = [] if self._final_obs is None else [self._final_obs, self._pool_count, self._final_rows]
        self._cursor = memory["cursor"]
        self._cursor[CURSOR_NUM_STEPS] = self.num_steps
        self._not_finite = memory["not_finite"]
        self._sources = [field for name, field in self._layout.fields.items() if name != "final_row"]
        self._offsets = [field.offset for field in self._sources]
        self._dtypes = [SCALAR_TYPES[field.dtype] for field in self._sources]
        self._appended = 0  # steps, ever
        self._discarded = 0  # likewise; a multiple of num_steps
        self._open: str | None = None  # the half of a step that has been begun: "begin" or "slot"
        self._cursor_live = False  # whether the device's counters equal the host's
        # What the rollout at [.., ..) % num_rollouts was given, as far as the host knows.
        self._truncations = [False] * layout.num_rollouts
        self._resets = [False] * layout.num_rollouts
        # What captured calls were given holds for every replay.
        self._captured_truncations = self._captured_resets = self._captured_gae = False
        self._as_captured = False
        self._computed = False
        self._not_finite_in: int | None = None  # the last rollout that was found to be so
        self._pool_valued = self._captured_pool_valued = False  # whether compute_gae read the pool
        self._epoch = 0
        # How often the oldest rollout was another from then on, and its advantages: what was drawn before is neither's.
        self._discards = self._scans = 0
        self._subset: Tensor | None = None
        self._reused: dict[int, dict[str, Tensor]] = {}
        self._turns: dict[int, int] = {}  # how many minibatches were handed out on each of these

    def __len__(self) -> int:
        """Steps stored and not discarded."""
        return self._appended - self._discarded

    @property
    def full(self) -> bool:
        """Whether the rollout being collected has T steps."""
        return len(self) > 0 and len(self) % self.num_steps == 0

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the buffer holds; equals the plan of :mod:`pydrone.memory`."""
        reused = (x for tensors in self._reused.values() for x in tensors.values())
        return sum(x.numel() * x.element_size() for x in (*self._memory.values(), *reused))

    def __repr__(self) -> str:
        obs = {name: list(shape) for name, (shape, _) in self._layout.obs.items()}
        obs = obs if self._layout.obs_is_mapping else next(iter(obs.values()))
        extra = f", fields={list(self._layout.extra)}" if self._layout.extra else ""
        ring = "" if self.capacity == self.num_steps else f", capacity={self.capacity}"
        return (
            f"RolloutBuffer(num_envs={self.num_envs}, num_steps={self.num_steps}, obs={obs}, "
            f"actions={list(self._layout.fields['actions'].shape)}{extra}{ring}, device={str(self.device)!r}, "
            f"backend={self._ops.name!r}, steps={len(self)}, {self.nbytes / 1e6:.1f} MB)"
        )

    def clear(self) -> None:
        """Discards the oldest full rollout; in the middle of the only one, rewinds to its start.

        A step that was begun is forgotten.
        """
        self._open = None
        rollout = self._rollout % self._layout.num_rollouts
        if self._capturing():
            if self._layout.num_rollouts > 1:
                raise RuntimeError("clear: in a captured graph it needs a ring of one rollout, capacity == num_steps")
            self._cursor[CURSOR_DISCARDED] += self.num_steps
        elif len(self) >= self.num_steps:
            self._discarded += self.num_steps
            if self._cursor_live:
                self._cursor[CURSOR_DISCARDED] += self.num_steps
        else:
            self._appended = self._discarded
            self._cursor_live = False
        if self._pool_count is not None and (self._truncations[rollout] or self._captured_truncations):
            self._pool_count[rollout].zero_()
        if not self._capturing():
            self._truncations[rollout] = self._resets[rollout] = False
        if self._policy != "ignore":  # of the next rollout there
            self._not_finite[rollout].zero_()
        self._computed, self._pool_valued, self._subset, self._epoch = False, False, None, 0
        self._discards += 1

    def advance(self, steps: int, rollouts: int = 0) -> None:
        """Tells the host what a captured graph is about to do: ``steps`` appends, ``rollouts`` calls of clear().

        Call it before each replay. Raises BufferFull, and changes nothing, if the appends would overwrite a rollout
        that has not been discarded.
        """
        self._idle("advance")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps: expected an int of at least 0, got {steps!r}")
        complete = (len(self) + steps) // self.num_steps
        if isinstance(rollouts, bool) or not isinstance(rollouts, int) or not 0 <= rollouts <= complete:
            raise ValueError(f"rollouts: expected an int from 0 to {complete}, the full ones then, got {rollouts!r}")
        if len(self) + steps > self.capacity:
            raise BufferFull(f"the ring of {self.capacity} steps holds {len(self)}; {steps} more would overwrite them")
        if not self._cursor_live:
            # The flag is not the host's to take back.
            self._cursor[: CURSOR_DISCARDED + 1].copy_(torch.tensor([self._appended, self._discarded]))
            self._cursor_live = True
        self._appended += steps
        if rollouts:
            self._discarded += rollouts * self.num_steps
            self._computed, self._subset, self._epoch = False, None, 0
            self._discards += 1

    def flags(self) -> Tensor:
        """float64 [5] on the device, for :meth:`check`, to be read along with other figures.

        Whether a captured append found the ring full; of the oldest rollout, if :meth:`compute_gae` valued its final
        observations: how many there are, and the truncations that came without one; whether an observation is not
        finite; a number that is not finite if an advantage is not.
        """
        full, rollout = self._cursor[CURSOR_FLAG : CURSOR_FLAG + 1].double(), self._rollout % self._layout.num_rollouts
        if self._pool_count is None or not (self._pool_valued or self._captured_pool_valued):
            pool = full.new_zeros(2)
        else:
            pool = self._pool_count[rollout].double()
        if self._policy == "ignore":
            return torch.cat((full, pool, full.new_zeros(2)))
        observed = self._not_finite[rollout : rollout + 1].double()
        mean, m2 = self._memory["statistics"][1:2], self._memory["statistics"][2:]
        known = self._computed or self._captured_gae
        return torch.cat((full, pool, observed, mean + m2 if known else full.new_zeros(1)))

    def check(self, flags: Sequence[float] | None = None) -> None:
        """Raises, or warns of, what :meth:`flags` say; None reads them, one host sync.

        BufferFull: a captured append found the ring full and wrote nothing. RuntimeError: as :meth:`compute_gae`.
        FloatingPointError, or with ``non_finite="warn"`` a RuntimeWarning once a rollout: what
        :meth:`non_finite` finds. To be called before :meth:`clear`.
        """
        full, used, missing, observed, advantages = self.flags().tolist() if flags is None else flags
        if full:
            raise BufferFull(
                "a captured append found the ring full; nothing was written: call advance() before replays"
            )
        self._check_pool(int(used), int(missing))
        self._check_finite(observed, advantages, 3)

    def non_finite(self) -> list[NonFinite]:
        """What is NaN or infinite in the oldest rollout, in the order of steps: observations by group, actions, values
        and rewards.

        If all of these are finite, the advantages, whose cause is then ``last_values``, a final value or an overflow.
        Steps that are none (``valid`` 0) do not count. Plain PyTorch over the whole rollout, with host syncs:
        :meth:`compute_gae` and :meth:`check` call it where a launch has found something.
        """
        groups = self.obs if self._layout.obs_is_mapping else {"": self.obs}
        # A step's observation comes before its action and its reward: of one step the first is the cause.
        fields = {f"obs[{name!r}]" if name else "obs": x for name, x in groups.items()}
        fields |= {"actions": self.actions, "values": self.values, "rewards": self.rewards}
        sampled = self.dones != INVALID
        found = [x for name, field in fields.items() if (x := _look(name, field, sampled)) is not None]
        if not found and self._computed:
            found = [x for x in [_look("advantages", self._memory["advantages"], sampled)] if x is not None]
        return sorted(found, key=lambda x: x.step)

    def _check_finite(self, observed: float, advantages: float, level: int) -> None:
        """Acts by the policy on what the launches have found, two of :meth:`flags`; ``level`` of a warning's caller."""
        rollout = self._rollout
        if not observed and math.isfinite(advantages) and self._not_finite_in != rollout:
            return
        found = self.non_finite()
        # What append's launches have said was of this rollout, or of one that was begun anew.
        self._not_finite[rollout % self._layout.num_rollouts] = 0
        if not found:  # steps that are none; finite numbers whose squares are not; gone with a captured clear()
            return
        warned, self._not_finite_in = self._not_finite_in == rollout, rollout
        message = f"rollout {rollout}: {'; '.join(map(str, found))}"
        if found[0].name == "advantages":
            message += ", and observations, rewards and values are finite: last_values, a final value or an overflow"
        if self._policy == "raise":
            raise FloatingPointError(message)
        if not warned:
            warnings.warn(message, RuntimeWarning, stacklevel=level)

    def _check_pool(self, used: int, missing: int) -> None:
        if missing:
            raise RuntimeError(
                f"final_obs: {missing} truncations of this rollout came without a final observation: "
                "pass final_obs with truncated, or timeout_bootstrap to compute_gae"
            )
        if used > self._layout.final_obs_rows:
            raise RuntimeError(
                f"final_obs: {used} truncations in this rollout, the pool has room for {self._layout.final_obs_rows}: "
                "construct the buffer with a larger final_obs_rows, or with max_episode_length"
            )

    @property
    def obs(self) -> Tensor | dict[str, Tensor]:
        """[N, T, ...], or a dict of groups; in the dtype it is stored in."""
        groups = {name: self._field(f"obs.{name}") for name in self._layout.obs}
        return groups if self._layout.obs_is_mapping else groups["obs"]

    @property
    def actions(self) -> Tensor:
        """[N, T, ...]."""
        return self["actions"]

    @property
    def log_probs(self) -> Tensor:
        """[N, T] float32."""
        return self["log_probs"]

    @property
    def rewards(self) -> Tensor:
        """[N, T] float32."""
        return self._plane(self._memory["rewards"])

    @property
    def values(self) -> Tensor:
        """[N, T] float32, as appended. To be read: minibatches take their own copy."""
        return self._plane(self._memory["values"])

    @property
    def dones(self) -> Tensor:
        """[N, T] uint8 codes: 0 running, 1 terminated, 2 truncated, 3 no transition (NEXT_STEP's reset step)."""
        return self._plane(self._codes)

    @property
    def truncated(self) -> Tensor:
        """[N, T] bool, a copy."""
        return self.dones == TRUNCATED

    @property
    def advantages(self) -> Tensor:
        """[N, T] float32, not normalised."""
        self._need_gae("advantages")
        return self._memory["advantages"]

    @property
    def returns(self) -> Tensor:
        """[N, T] float32: advantages + values."""
        self._need_gae("returns")
        return self._memory["returns"]

    @property
    def statistics(self) -> Tensor:
        """float64 [3]: count, mean and M2 of the advantages of all valid samples.

        Written to in place (by an all-reduce over several processes, say), it is what minibatches normalise with.
        """
        self._need_gae("statistics")
        return self._memory["statistics"]

    def __getitem__(self, name: str) -> Tensor:
        """[N, T, ...] of a field by name; of the steps so far while the rollout is being collected.

        A view, unless the rollout wraps around the ring's end: then a copy.
        """
        if name in _NAMES or (name == "obs" and not self._layout.obs_is_mapping):
            return getattr(self, name)
        if name not in self._views or name == "final_row":
            names = [x for x in self._views if x not in ("final_row", "obs.obs")]
            names = names if self._layout.obs_is_mapping else ["obs", *names]
            raise KeyError(f"{name}: not a field of this buffer; it has {', '.join([*names, *_NAMES])}")
        return self._field(name)

    def _field(self, name: str) -> Tensor:
        return self._plane(self._views[name].transpose(0, 1))

    def _plane(self, plane: Tensor) -> Tensor:
        start, steps = self._start, min(len(self), self.num_steps)
        if start + steps <= self.capacity:
            return plane[:, start : start + steps]
        return torch.cat([plane[:, start:], plane[:, : start + steps - self.capacity]], dim=1)

    def _need_gae(self, name: str) -> None:
        if not self._computed and not (self._captured_gae and len(self) >= self.num_steps):
            raise RuntimeError(f"{name}: expected compute_gae() before it")

    @property
    def _rollout(self) -> int:
        """Number of the oldest rollout, of all that were ever begun."""
        return self._discarded // self.num_steps

    @property
    def _start(self) -> int:
        """Slot of its first step."""
        return self._discarded % self.capacity

    def _capturing(self) -> bool:
        return self._as_captured or (self._on_cuda and torch.cuda.is_current_stream_capturing())

    @contextlib.contextmanager
    def as_captured(self) -> Iterator[None]:
        """Calls within it do at once what a captured graph's do: they follow the device's counters.

        Before a capture they load the kernels that it needs, which a capture may not be able to. :meth:`advance` comes
        before them, as before a replay.
        """
        before, self._as_captured = self._as_captured, True
        try:
            yield
        finally:
            self._as_captured = before

    def to(self, device: torch.device | str) -> Ring:
        """This buffer if it lies on ``device``, else a new one there with the same contents."""
        device = _indexed(device)
        if device == self.device:
            return self
        backend = self._backend if self._backend == "reference" else None
        options = {"seed": self._seed, "rank": self._rank, "backend": backend, "non_finite": self._policy}
        moved = type(self)(**self._arguments, device=device, **options)
        moved.load_state_dict(self.state_dict())
        return moved

    def __reduce__(self) -> tuple:
        arguments = (self._arguments, str(self.device), self._seed, self._rank, self._backend, self._policy)
        return _rebuild, (type(self), arguments, self.state_dict())

    def state_dict(self) -> dict[str, object]:
        """Everything that :meth:`load_state_dict` needs to go on as if nothing had happened; tensors are not copied."""
        if self._open is not None:
            raise RuntimeError(f"state_dict: expected end() first, {self._open}() has begun a step")
        state: dict[str, object] = {f"memory.{name}": x for name, x in self._memory.items() if name not in _TRANSIENT}
        state |= {name: getattr(self, f"_{name}") for name in _COUNTERS}
        layout = [(x.name, tuple(x.shape), str(x.dtype), x.offset) for x in self._layout.fields.values()]
        flags = {"truncations": list(self._truncations), "resets": list(self._resets)}
        return state | flags | {"layout": [self.num_steps, *layout]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes over the state of a buffer constructed with the same sizes, from any device.

        Raises ValueError, and changes nothing, where a size or a key differs.
        """
        own = self.state_dict()
        self._check_state(state, own)
        self._discards += 1
        for name, x in own.items():
            if isinstance(x, Tensor):
                x.copy_(state[name])
        for name in _COUNTERS:
            setattr(self, f"_{name}", state[name])
        self._truncations, self._resets = list(state["truncations"]), list(state["resets"])
        self._key = mix_seed(self._seed, self._rank)
        self._open, self._subset, self._cursor_live, self._not_finite_in = None, None, False, None
        self._not_finite.fill_(1)  # what its launches have found is not known: look once

    def _check_state(self, state: Mapping[str, object], own: Mapping[str, object]) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state).__name__}")
        if state.keys() != own.keys():
            raise ValueError(f"state_dict: expected the keys {sorted(own)}, got {sorted(map(str, state))}")
        if state["layout"] != own["layout"]:
            raise ValueError(f"state_dict: expected the fields {own['layout']}, got {state['layout']}")
        for name, x in own.items():
            if not isinstance(x, Tensor):
                continue
            given = state[name]
            if not isinstance(given, Tensor):
                raise TypeError(f"state_dict: {name}: expected a tensor, got {type(given).__name__}")
            if given.device.type == "meta":
                raise ValueError(f"state_dict: {name}: expected a tensor that holds data, got one on 'meta'")
            check_strided(f"state_dict: {name}", given)
            if given.shape != x.shape or given.dtype != x.dtype:
                raise ValueError(
                    f"state_dict: {name}: expected {list(x.shape)} {x.dtype}, got {list(given.shape)} {given.dtype}"
                )
        for name, kind in {**dict.fromkeys(_COUNTERS, int), "computed": bool}.items():
            if type(state[name]) is not kind:
                raise TypeError(f"state_dict: {name}: expected {kind.__name__}, got {type(state[name]).__name__}")
        appended, discarded = state["appended"], state["discarded"]
        if discarded < 0 or discarded % self.num_steps or state["epoch"] < 0:
            raise ValueError(
                f"state_dict: discarded: expected a multiple of {self.num_steps}, and an epoch of at least 0, "
                f"got {discarded} and {state['epoch']}"
            )
        if not 0 <= appended - discarded <= self.capacity:
            raise ValueError(
                f"state_dict: appended: expected {discarded} to {discarded + self.capacity}, "
                f"what a ring of {self.capacity} steps can hold, got {appended}"
            )
        for name in ("truncations", "resets"):
            flags = state[name]
            whole = isinstance(flags, (list, tuple)) and len(flags) == len(own[name])
            if not whole or not all(isinstance(x, bool) for x in flags):
                raise ValueError(f"state_dict: {name}: expected {len(own[name])} bools, got {flags!r}")


def _rebuild(kind: type[Ring], arguments: tuple, state: dict[str, object]) -> Ring:
    """A pickled or copied buffer."""
    sizes, device, seed, rank, backend, non_finite = arguments
    made = kind(**sizes, device=device, seed=seed, rank=rank, backend=backend, non_finite=non_finite)
    made.load_state_dict(state)
    return made


# Rebuilt by the next launch, or by advance().
_TRANSIENT = ("workspace", "cursor", "not_finite")
_NAMES = ("rewards", "dones", "truncated", "advantages", "returns")  # what buf[...] knows beside the fields
_COUNTERS = ("appended", "discarded", "computed", "epoch", "seed")


def _indexed(device: torch.device | str) -> torch.device:
    """With its index: tensors say cuda:0 where a user says cuda."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a device that PyTorch knows, got {device!r}") from error
    if device.type == "meta":
        raise ValueError("device: expected one that holds data, got 'meta'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected one that this PyTorch can use, got {str(device)!r}, and it finds no CUDA device"
        )
    if device.type not in ("cpu", "cuda"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # NotImplementedError among them
            raise ValueError(f"device: expected one that this PyTorch can use, got {str(device)!r}") from error
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _allocate(wanted: Sequence[Allocation], device: torch.device) -> dict[str, Tensor]:
    """Zeros; planes, [N, T or C], lie as their device's scan wants them."""
    planes = ("rewards", "values", "dones", "advantages", "returns") if device.type != "cuda" else ()
    specs = [(x.shape[::-1] if x.name in planes else x.shape, x.dtype) for x in wanted]
    try:
        made = pages.together(specs, device)
    except (OSError, OverflowError) as error:
        size = sum(x.nbytes for x in wanted)
        raise RuntimeError(
            f"num_envs: the buffer takes {size} bytes of memory, which cannot be had: {error}"
        ) from error
    return {x.name: y.zero_().t() if x.name in planes else y.zero_() for x, y in zip(wanted, made, strict=True)}


def _look(name: str, x: Tensor, sampled: Tensor) -> NonFinite | None:
    """What is not finite in ``x`` [N, T, ...] where ``sampled``, bool [N, T]."""
    if not x.is_floating_point():
        return None
    bad = ~x.isfinite().flatten(2) & sampled[..., None] if x.dim() > 2 else (~x.isfinite() & sampled)[..., None]
    count = int(bad.sum())
    if not count:
        return None
    step, env = bad.any(2).t().nonzero()[0].tolist()
    return NonFinite(name, count, env, step)


def field_view(rows: Tensor, field: Field) -> Tensor:
    """[..., *field.shape], typed, of rows [..., row_bytes]."""
    view = rows[..., field.offset : field.offset + field.nbytes].view(field.dtype)
    return view.unflatten(-1, field.shape) if field.shape else view[..., 0]


def mix_seed(seed: int, rank: int) -> int:
    """A signed 64-bit key of (seed, rank): two rounds of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    x = seed & mask
    for word in (rank, 0):
        x = (x + 0x9E3779B97F4A7C15 * (2 * (word & mask) + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x
