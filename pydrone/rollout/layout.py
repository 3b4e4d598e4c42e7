"""The memory layout of a rollout, which :mod:`pydrone.buffer` allocates and :mod:`pydrone.memory` reports.

All fields of a sample are packed into one row of bytes, so that a shuffled read touches two cache lines instead of
nine (17 observations, 4 actions, log-probability, value, 4 means, 4 stds and a row number are just 128 bytes). The
backward scan reads planes of its own. Rows are time-major; planes are time-major on a CPU, where the scan runs across
environments, and environment-major on a GPU, where a warp runs along the steps of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from pydrone.ops.arguments import boolean, positive
from pydrone.ops.schema import CURSOR_SIZE, MAX_SAMPLES, SCALAR_TYPES, workspace_size

ROW_ALIGNMENT = 32  # bytes: a sector of GPU memory; a row of 96 fits two cache lines wherever it starts
HALVES = (torch.float16, torch.bfloat16)
RESERVED = {
    *("obs", "actions", "values", "log_probs", "rewards", "dones", "truncated", "valid", "final_obs"),
    *("advantages", "returns", "indices", "final_row", "self"),
}


class Field(NamedTuple):
    """One field of a row: the shape of one environment's sample, the stored dtype, the byte offset."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def width(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.width * self.dtype.itemsize


def of_append(
    fields: Sequence[Field], num_planes: int, final_fields: Sequence[Field], looked_at: int = 0
) -> torch.Tensor:
    """The argument ``layout`` of ``append`` for a step with these fields, see :mod:`pydrone.ops.schema`."""
    rows = [(x.offset, SCALAR_TYPES[x.dtype], x.width, len(x.shape)) for x in (*fields, *final_fields)]
    return torch.tensor(
        [(len(fields), num_planes, len(final_fields), looked_at), *rows], dtype=torch.int64, device="cpu"
    )


class Allocation(NamedTuple):
    """One tensor of the buffer. ``purpose`` is a line for the memory report."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    purpose: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Spec = tuple[tuple[int, ...], torch.dtype]


def parse_spec(name: str, spec: object, dtype: torch.dtype = torch.float32, empty: bool = False) -> Spec:
    """An int, a shape or (shape, dtype) as (shape, dtype). ``empty``: sizes of 0 are accepted."""
    if isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[1], torch.dtype):
        spec, dtype = spec
    if dtype not in SCALAR_TYPES:
        raise TypeError(f"{name}: expected a dtype of {', '.join(map(str, SCALAR_TYPES))}, got {dtype}")
    shape = (spec,) if isinstance(spec, int) and not isinstance(spec, bool) else spec
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(size, int) and not isinstance(size, bool) and size >= (not empty) for size in shape
    ):
        raise ValueError(f"{name}: expected a positive int, a shape or (shape, dtype), got {spec!r}")
    return tuple(shape), dtype


def parse_obs(obs: object, obs_dtype: torch.dtype, empty: bool = False) -> tuple[dict[str, Spec], bool]:
    """(specs by group name, whether ``obs`` named groups); one unnamed group is called "obs"."""
    if obs_dtype not in (torch.float32, *HALVES):
        raise TypeError(f"obs_dtype: expected float32, float16 or bfloat16, got {obs_dtype}")
    if not isinstance(obs, Mapping):
        return {"obs": parse_spec("obs", obs, obs_dtype, empty)}, False
    if not obs:
        raise ValueError("obs: expected at least one group, got an empty mapping")
    for key in obs:
        if not isinstance(key, str):
            raise TypeError(f"obs: expected names of groups as str, got {key!r}")
    return {key: parse_spec(f"obs[{key!r}]", spec, obs_dtype, empty) for key, spec in obs.items()}, True


def pack(specs: dict[str, Spec]) -> tuple[dict[str, Field], int]:
    """(fields by name, bytes of a row). The widest dtypes come first, so that no field needs padding."""
    fields, offset = {}, 0
    for name in sorted(specs, key=lambda name: -specs[name][1].itemsize):
        shape, dtype = specs[name]
        fields[name] = Field(name, shape, dtype, offset)
        offset += fields[name].nbytes
    return {name: fields[name] for name in specs}, -(-offset // ROW_ALIGNMENT) * ROW_ALIGNMENT


class Layout:
    """Fields, rows and allocations of a :class:`~pydrone.buffer.RolloutBuffer` with these arguments.

    ``final_obs_rows`` None: N * (1 + T // max_episode_length), all the time-outs that a rollout can have if episodes
    last ``max_episode_length`` steps, or N if that is unknown. 0: no pool.
    """

    def __init__(
        self,
        num_envs: int,
        num_steps: int,
        obs: object,
        actions: object,
        capacity: int | None = None,
        obs_dtype: torch.dtype = torch.float32,
        fields: Mapping[str, object] | None = None,
        max_episode_length: int | None = None,
        final_obs_rows: int | None = None,
        verbatim: bool = False,
    ) -> None:
        self.num_envs = positive("num_envs", num_envs)
        self.num_steps = positive("num_steps", num_steps)
        self.capacity = num_steps if capacity is None else positive("capacity", capacity)
        if self.capacity < num_steps:
            raise ValueError(f"capacity: expected at least num_steps, {num_steps}, got {capacity}")
        if num_envs * num_steps > MAX_SAMPLES:
            raise ValueError(f"num_envs: expected num_envs * num_steps < 2**31, got {num_envs * num_steps}")
        self._verbatim = boolean("verbatim", verbatim)
        self.obs, self.obs_is_mapping = parse_obs(obs, obs_dtype, verbatim)
        if fields is not None and not isinstance(fields, Mapping):
            raise TypeError(f"fields: expected a mapping of names to shapes, got {type(fields).__name__}")
        extra = {name: parse_spec(f"fields[{name!r}]", spec, empty=verbatim) for name, spec in (fields or {}).items()}
        for name in extra:
            if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
                raise ValueError(f"fields: {name!r} is no name for a field: not an identifier, or one of pydrone's own")
        self.extra = tuple(extra)

        if max_episode_length is not None:
            positive("max_episode_length", max_episode_length)
        if final_obs_rows is None:
            ends = 0 if max_episode_length is None else num_steps // max_episode_length
            final_obs_rows = min(num_envs * (1 + ends), num_envs * num_steps)
        elif isinstance(final_obs_rows, bool) or not isinstance(final_obs_rows, int) or final_obs_rows < 0:
            raise ValueError(f"final_obs_rows: expected an int of at least 0, or None, got {final_obs_rows!r}")
        self.final_obs_rows = final_obs_rows

        specs = {f"obs.{name}": spec for name, spec in self.obs.items()}
        specs["actions"] = parse_spec("actions", actions, empty=verbatim)
        specs["log_probs"] = specs["values"] = ((), torch.float32)
        specs |= extra
        if final_obs_rows:
            specs["final_row"] = ((), torch.int32)
        self.fields, self.row_bytes = pack(specs)
        #: the fields that a caller stores: all but the number of a row in the pool
        self.stored = {name: field for name, field in self.fields.items() if name != "final_row"}
        # The pool is evaluated as it is, never gathered: it has the precision of minibatches.
        pooled = {f"obs.{k}": (s, self._output(d)) for k, (s, d) in self.obs.items()}
        self.pool_fields, self.pool_row_bytes = pack(pooled)
        # Rollouts that can be in the ring at once, at least in part.
        self.num_rollouts = -(-self.capacity // num_steps)

    def _output(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in a minibatch of what is stored as ``dtype``."""
        return torch.float32 if dtype in HALVES and not self._verbatim else dtype

    def allocations(self) -> list[Allocation]:
        """Every tensor the constructor makes; planes as [N, T or C]."""
        n, t, c = self.num_envs, self.num_steps, self.capacity
        made = [
            Allocation("rows", (c, n, self.row_bytes), torch.uint8, "packed rows: all that minibatches gather"),
            Allocation("rewards", (n, c), torch.float32, "plane of the scan"),
            Allocation("values", (n, c), torch.float32, "plane of the scan (a copy of the rows')"),
            Allocation("dones", (n, c), torch.uint8, "plane of the scan: running, terminated, truncated, invalid"),
            Allocation("advantages", (n, t), torch.float32, "written by the scan"),
            Allocation("returns", (n, t), torch.float32, "written by the scan"),
            Allocation("statistics", (3,), torch.float64, "count, mean, M2 of the advantages"),
            Allocation("workspace", (workspace_size(n),), torch.float64, "partial statistics"),
            Allocation("cursor", (CURSOR_SIZE,), torch.int64, "the ring's counters, for CUDA graphs"),
            Allocation("not_finite", (self.num_rollouts,), torch.int32, "whether an observation is not finite"),
        ]
        if self.final_obs_rows:
            shape = (self.num_rollouts, self.final_obs_rows, self.pool_row_bytes)
            made.append(Allocation("final_obs", shape, torch.uint8, "pool of final observations"))
            made.append(Allocation("final_obs_count", (self.num_rollouts, 2), torch.int32, "rows of the pool in use"))
        return made

    def minibatch(self, size: int) -> list[Allocation]:
        """The tensors of one minibatch of ``size`` samples."""
        made = [
            Allocation(name, (size, *field.shape), self._output(field.dtype), "minibatch")
            for name, field in self.stored.items()
        ]
        made += [Allocation(name, (size,), torch.float32, "minibatch") for name in ("advantages", "returns")]
        return made
