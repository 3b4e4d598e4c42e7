"""The rollout between simulator and network: a ring of packed rows, scanned, shuffled and overwritten by kernels.

>>> buf = RolloutBuffer(num_envs=8192, num_steps=100, obs=17, actions=4, device="cuda")
>>> for _ in range(100):
...     buf.append(obs=obs, actions=actions, rewards=rewards, dones=dones, values=values, log_probs=log_probs)
>>> buf.compute_gae(last_values, gamma=0.99, lam=0.95)
>>> for mb in buf.minibatches(num_minibatches=4, num_epochs=5):
...     loss(mb.obs, mb.actions, mb.values, mb.log_probs, mb.advantages, mb.returns)
>>> buf.clear()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .estimators import env_scalars, pick_bootstrap, unit_interval
from .layout import Field, Layout, positive
from .minibatch import Minibatch, Plan
from .ops import pages
from .ops.dispatch import select, written
from .ops.schema import (
    CURSOR_APPENDED,
    CURSOR_DISCARDED,
    CURSOR_FLAG,
    CURSOR_NUM_STEPS,
    INVALID,
    SCALAR_TYPES,
    TRUNCATED,
)

__all__ = ["BufferFull", "Minibatch", "RolloutBuffer"]


class BufferFull(RuntimeError):
    """An append would overwrite a rollout that has not been discarded; nothing was written."""


class RolloutBuffer:
    """Storage of N environments x T steps, with GAE and shuffled minibatches as kernels.

    Everything is allocated here, once; memory is constant however many iterations follow (see docs/memory.md).

    Args:
        num_envs: N.
        num_steps: T, the steps of a rollout.
        obs: an int, a shape, or a mapping of group names to shapes or (shape, dtype).
        actions: an int, a shape or (shape, dtype): ``((), torch.int64)`` for discrete ones.
        device: where it lies.
        capacity: steps in the ring; None for T, 2 * T to collect the next rollout while one is learnt from. At a
            multiple of T every rollout is a view; at another, rollouts wrap around the ring's end, which GAE and
            minibatches follow, but a view of a wrapped rollout is a copy.
        obs_dtype: torch.float16 or torch.bfloat16 halve what observations take. Minibatches are float32 all the same.
        fields: further fields, name to shape or (shape, dtype): old means and stds, costs, masks.
        seed: of the minibatches' permutations. Each rollout and each epoch has its own.
        max_episode_length: steps, if known; with ``final_obs_rows`` None it sizes the pool of final observations.
        final_obs_rows: rows of that pool for one rollout; None: N * (1 + T // max_episode_length); 0: no pool.
        rank: this process's number among several, so that each shuffles on its own.
        backend: "reference", "cpu", "triton" or "cuda"; None: ``PYDRONE_BACKEND`` or the best for the device.
    """

    def __init__(
        self,
        num_envs: int,
        num_steps: int,
        obs: int | tuple | Mapping[str, object],
        actions: int | tuple,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        obs_dtype: torch.dtype = torch.float32,
        fields: Mapping[str, object] | None = None,
        seed: int = 0,
        max_episode_length: int | None = None,
        final_obs_rows: int | None = None,
        rank: int = 0,
        backend: str | None = None,
    ) -> None:
        self.device = _indexed(torch.device(device))
        self._arguments = {
            "num_envs": num_envs,
            "num_steps": num_steps,
            "obs": obs,
            "actions": actions,
            "capacity": capacity,
            "obs_dtype": obs_dtype,
            "fields": fields,
            "max_episode_length": max_episode_length,
            "final_obs_rows": final_obs_rows,
        }
        self._layout = Layout(**self._arguments)
        self._seed, self._rank, self._backend = int(seed), int(rank), backend
        self._key = _mix_seed(self._seed, self._rank)
        self._ops = select(self.device, backend)
        self.num_envs, self.num_steps, self.capacity = num_envs, num_steps, self._layout.capacity
        # Tensors made in inference mode cannot be trained on later.
        with torch.inference_mode(False):
            self._memory = {
                made.name: _allocate(made.shape, made.dtype, self.device, made.name) for made in self._layout.allocations()
            }
        memory = self._memory
        self._rows, self._codes = memory["rows"], memory["dones"]
        self._pool, self._pool_count = memory.get("final_obs"), memory.get("final_obs_count")
        self._cursor = memory["cursor"]
        self._cursor[CURSOR_NUM_STEPS] = num_steps
        self._views = {name: _field_view(self._rows, field) for name, field in self._layout.fields.items()}
        self._final_rows = self._views["final_row"].t() if self._pool is not None else None
        self._sources = [field for name, field in self._layout.fields.items() if name != "final_row"]
        self._offsets = [field.offset for field in self._sources]
        self._dtypes = [SCALAR_TYPES[field.dtype] for field in self._sources]
        pooled = self._layout.pool_fields.values()
        self._pool_offsets = [field.offset for field in pooled]
        self._pool_dtypes = [SCALAR_TYPES[field.dtype] for field in pooled]
        self._appended = 0  # steps, ever
        self._discarded = 0  # likewise; a multiple of num_steps
        self._open: str | None = None  # the half of a step that has been begun: "begin" or "slot"
        self._cursor_live = False  # whether the device's counters equal the host's
        # What the rollout at [.., ..) % num_rollouts was given, as far as the host knows.
        self._truncations = [False] * self._layout.num_rollouts
        self._resets = [False] * self._layout.num_rollouts
        self._computed = False
        self._epoch = 0
        self._subset: Tensor | None = None
        self._reused: dict[int, dict[str, Tensor]] = {}

    # ------------------------------------------------------------------------------------------------ state

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

    # ------------------------------------------------------------------------------------------------ collecting

    def append(
        self,
        *,
        obs: Tensor | Mapping[str, Tensor],
        actions: Tensor,
        rewards: Tensor,
        dones: Tensor,
        values: Tensor,
        log_probs: Tensor,
        truncated: Tensor | None = None,
        final_obs: Tensor | Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
        **fields: Tensor,
    ) -> None:
        """Stores one step, in one launch.

        Args:
            obs: [N, ...], or one for each group: what the actions were chosen for.
            actions: [N, ...].
            rewards: [N] or [N, 1].
            dones: [N] or [N, 1], any dtype; nonzero: the episode ended with this step, for whatever reason.
            values: V(obs), [N] or [N, 1].
            log_probs: of the actions, [N] or [N, 1].
            truncated: as dones; nonzero: it ended by a time limit and nothing else.
            final_obs: shaped as obs; where truncated, the true final observation (other rows are not read). None: there
                is none; then a rollout with truncations takes ``timeout_bootstrap`` in :meth:`compute_gae`.
            valid: as dones; zero marks the reset step of NEXT_STEP autoreset, which counts for nothing.
            **fields: every field the constructor was given.

        Floating inputs are converted to what is stored; other dtypes must be that. Inputs are read before the call
        returns (on a GPU: in stream order) and may have any strides.

        Raises:
            BufferFull: the ring holds a rollout there that has not been discarded; nothing was written.
            TypeError, ValueError: an argument is missing, unknown, or of the wrong shape, dtype or device.
        """
        self._idle("append")
        sources, values = self._collect(obs, actions, values, log_probs, fields)
        ends = self._ends(rewards, dones, truncated, final_obs, valid)
        self._write(sources, [self._memory["values"]], [values], ends, commit=True)

    def begin(
        self,
        *,
        obs: Tensor | Mapping[str, Tensor],
        actions: Tensor,
        values: Tensor,
        log_probs: Tensor,
        **fields: Tensor,
    ) -> None:
        """The first half of :meth:`append`, for environments that write over their observation in ``step()``."""
        self._idle("begin")
        sources, values = self._collect(obs, actions, values, log_probs, fields)
        self._write(sources, [self._memory["values"]], [values], None, commit=False)
        self._open = "begin"

    def slot(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """Views of the step being written, for those who can write straight into it; :meth:`end` commits.

        Keys: obs (a tensor, or a dict of groups), actions, values, log_probs and the constructor's fields; [N, ...], in
        the dtype they are stored in. All of them are to be written.

        Raises BufferFull as :meth:`append` does.
        """
        self._idle("slot")
        self._check_room()
        step = {name: self._views[name][self._appended % self.capacity] for name in self._views}
        groups = {name: step[f"obs.{name}"] for name in self._layout.obs}
        self._open = "slot"
        names = ("actions", "values", "log_probs", *self._layout.extra)
        return {"obs": groups if self._layout.obs_is_mapping else groups["obs"], **{name: step[name] for name in names}}

    def end(
        self,
        *,
        rewards: Tensor,
        dones: Tensor,
        truncated: Tensor | None = None,
        final_obs: Tensor | Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
    ) -> None:
        """The second half of a step begun by :meth:`begin` or :meth:`slot`; arguments as in :meth:`append`."""
        if self._open is None:
            raise RuntimeError("end: expected begin() or slot() before it")
        ends = self._ends(rewards, dones, truncated, final_obs, valid)
        planes, sources = [], []
        if self._open == "slot":
            planes, sources = [self._memory["values"]], [self._views["values"][self._appended % self.capacity]]
        self._write([], planes, sources, ends, commit=True)
        self._open = None

    def _idle(self, call: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"{call}: expected end() first, {self._open}() has begun a step")

    def _check_room(self) -> None:
        if len(self) >= self.capacity and not self._capturing():
            raise BufferFull(
                f"the ring of {self.capacity} steps holds {len(self)} that are not discarded: "
                "learn from the rollout and call clear() first"
            )

    def _collect(self, obs, actions, values, log_probs, fields: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """The sources of a row in the layout's order, checked."""
        self._check_room()
        given = self._groups("obs", obs)
        given["actions"], given["log_probs"], given["values"] = actions, log_probs, values
        if fields.keys() != set(self._layout.extra):
            for name in self._layout.extra:
                if name not in fields:
                    raise TypeError(f"{name}: expected a tensor for this field, got none")
            name = next(name for name in fields if name not in self._layout.extra)
            raise TypeError(f"{name}: not a field of this buffer; it has {', '.join(self._layout.extra) or 'none'}")
        given.update(fields)
        return [self._source(field, given[field.name], field.name) for field in self._sources], values

    def _groups(self, name: str, obs: object) -> dict[str, object]:
        """``obs`` by the names of the layout's fields."""
        if not self._layout.obs_is_mapping:
            return {"obs.obs": obs}
        # A TensorDict is a mapping in all but its class.
        if not hasattr(obs, "keys") or isinstance(obs, Tensor):
            raise TypeError(f"{name}: expected a mapping of {', '.join(self._layout.obs)}, got {type(obs).__name__}")
        if set(obs.keys()) != set(self._layout.obs):
            raise ValueError(f"{name}: expected the groups {sorted(self._layout.obs)}, got {sorted(obs.keys())}")
        return {f"obs.{group}": obs[group] for group in self._layout.obs}

    def _source(self, field: Field, x: object, name: str) -> Tensor:
        name = name.removesuffix(".obs") if not self._layout.obs_is_mapping else name
        self._check(name, x)
        if field.shape == ():
            fits = x.shape[:1] == (self.num_envs,) and x.numel() == self.num_envs
        else:
            fits = x.shape == (self.num_envs, *field.shape)
        if not fits:
            raise ValueError(f"{name}: expected shape {[self.num_envs, *field.shape]}, got {list(x.shape)}")
        if x.dtype != field.dtype and not (x.is_floating_point() and field.dtype.is_floating_point):
            raise TypeError(f"{name}: expected dtype {field.dtype}, got {x.dtype}")
        return x.detach() if x.requires_grad else x

    def _check(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device}, got {x.device}")
        if x.layout != torch.strided:
            raise TypeError(f"{name}: expected a strided tensor, got {x.layout}")

    def _scalar(self, name: str, x: object, floating: bool) -> Tensor:
        self._check(name, x)
        if x.shape[:1] != (self.num_envs,) or x.numel() != self.num_envs:
            raise ValueError(f"{name}: expected shape [{self.num_envs}] or [{self.num_envs}, 1], got {list(x.shape)}")
        if x.is_complex() or (floating and not x.is_floating_point()):
            raise TypeError(f"{name}: expected a {'floating' if floating else 'real'} dtype, got {x.dtype}")
        return x.detach() if x.requires_grad else x

    def _ends(self, rewards, dones, truncated, final_obs, valid) -> dict:
        self._check_room()
        ends = {
            "rewards": self._scalar("rewards", rewards, True),
            "dones": self._scalar("dones", dones, False),
            "truncated": None if truncated is None else self._scalar("truncated", truncated, False),
            "valid": None if valid is None else self._scalar("valid", valid, False),
            "final": [],
        }
        if final_obs is not None:
            if truncated is None:
                raise ValueError("final_obs: expected truncated with it, got None")
            if self._pool is None:
                raise ValueError("final_obs: this buffer has no pool for them; construct it with final_obs_rows > 0")
            groups = self._groups("final_obs", final_obs)
            for field in self._layout.pool_fields.values():
                name = "final_" + field.name
                ends["final"].append(self._source(field, groups[field.name], name))
        return ends

    def _write(self, sources: list[Tensor], planes: list[Tensor], plane_sources: list, ends: dict | None, commit: bool):
        captured = self._capturing()
        rollout = self._appended // self.num_steps % self._layout.num_rollouts
        memory = self._memory
        if ends is not None:
            planes, plane_sources = [*planes, memory["rewards"]], [*plane_sources, ends["rewards"]]
        pooled = ends is not None and ends["truncated"] is not None and self._pool is not None
        final = ends["final"] if pooled else []
        self._ops.append(
            self._rows,
            sources,
            self._offsets if sources else [],
            self._dtypes if sources else [],
            planes,
            plane_sources,
            None if ends is None else self._codes,
            None if ends is None else ends["dones"],
            None if ends is None else ends["truncated"],
            None if ends is None else ends["valid"],
            self._pool if pooled else None,
            final,
            self._pool_offsets if final else [],
            self._pool_dtypes if final else [],
            self._pool_count if pooled else None,
            self._final_rows if pooled else None,
            self._appended % self.capacity,
            rollout,
            self._cursor if captured else None,
            commit,
        )
        written(self._rows, *planes, None if ends is None else self._codes, self._pool if pooled else None)
        if ends is not None:
            self._truncations[rollout] |= ends["truncated"] is not None
            self._resets[rollout] |= ends["valid"] is not None
        if commit and not captured:
            self._appended += 1
            self._cursor_live = False

    # ------------------------------------------------------------------------------------------------ estimating

    def compute_gae(
        self,
        last_values: Tensor,
        gamma: float = 0.99,
        lam: float = 0.95,
        *,
        final_values: Tensor | None = None,
        value_fn: Callable[[Tensor | dict[str, Tensor]], Tensor] | None = None,
        timeout_bootstrap: str | None = None,
        check: bool = True,
    ) -> None:
        """Advantages, returns and the advantages' statistics of the oldest rollout, in one launch.

        The formula is that of :func:`pydrone.gae`. A rollout with ``truncated`` takes one of:

        Args:
            last_values: V of the observation after the rollout's last step, [N] or [N, 1].
            gamma, lam: in [0, 1].
            final_values: [N, T]: V of the true final observations, read where truncated.
            value_fn: called once, without gradients, with the pool of final observations ([P, ...], or a dict of
                groups), to return their values, [P] or [P, 1].
            timeout_bootstrap: "stored_value" or "next_value".
            check: read the pool's count from the device (one host sync on a GPU; nothing to read without final
                observations) and raise if it has overflowed. With False, call :meth:`check` later: until then a
                truncation whose final observation found no place has NaN advantages.

        Raises:
            RuntimeError: the rollout has fewer than T steps; the pool has overflowed; a truncation came without its
                final observation. TypeError, ValueError: as :func:`pydrone.gae`.
        """
        captured = self._capturing()
        if len(self) < self.num_steps and not captured:
            raise RuntimeError(f"compute_gae: expected a rollout of {self.num_steps} steps, {len(self)} are stored")
        gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
        last_values = env_scalars("last_values", last_values, self.num_envs, self.device)
        rollout = self._rollout % self._layout.num_rollouts
        truncations = self._truncations[rollout]
        bootstrap = pick_bootstrap(
            truncations, final_values=final_values, value_fn=value_fn, timeout_bootstrap=timeout_bootstrap
        )
        final_rows = None
        if not truncations:
            bootstrap, final_values = 0, None
        elif value_fn is not None:
            final_values, final_rows = self._evaluate(value_fn, rollout, check), self._final_rows
        elif final_values is not None:
            final_values = self._in_ring(final_values)
        memory = self._memory
        self._ops.gae(
            memory["rewards"],
            memory["values"],
            self._codes,
            None,
            None,
            last_values,
            final_values,
            final_rows,
            gamma,
            lam,
            self._start,
            True,
            bootstrap,
            self._cursor if captured else None,
            memory["advantages"],
            memory["returns"],
            memory["statistics"],
            memory["workspace"],
        )
        written(memory["advantages"], memory["returns"], memory["statistics"])
        self._computed, self._subset = True, None

    def _evaluate(self, value_fn: Callable, rollout: int, check: bool) -> Tensor:
        """The values of the rollout's pool of final observations: of the rows in use where their number is known."""
        if self._pool is None:
            raise ValueError("value_fn: this buffer has no pool of final observations; construct it with final_obs_rows")
        rows = self._pool[rollout]
        if self._capturing():
            if self._layout.num_rollouts > 1:
                raise RuntimeError("value_fn: in a captured graph it needs a ring of one rollout, capacity == num_steps")
        elif check or self.device.type == "cpu":
            self._check_pool(*self._pool_count[rollout].tolist())
            if self.device.type == "cpu":
                rows = rows[: int(self._pool_count[rollout, 0])]
        if rows.shape[0] == 0:
            return torch.empty(0, device=self.device)
        groups = {name: _field_view(rows, self._layout.pool_fields[f"obs.{name}"]) for name in self._layout.obs}
        with torch.no_grad():
            values = value_fn(groups if self._layout.obs_is_mapping else groups["obs"])
        return env_scalars("value_fn's result", values, rows.shape[0], self.device)

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

    def _in_ring(self, final_values: Tensor) -> Tensor:
        """Values [N, T] of the rollout as [N, C] at the ring's slots."""
        self._check("final_values", final_values)
        if final_values.shape != (self.num_envs, self.num_steps):
            expected = [self.num_envs, self.num_steps]
            raise ValueError(f"final_values: expected shape {expected}, got {list(final_values.shape)}")
        if self.capacity == self.num_steps:
            return final_values
        start = self._cursor[CURSOR_DISCARDED] if self._capturing() else self._discarded
        slots = (torch.arange(self.num_steps, device=self.device) + start) % self.capacity
        return final_values.new_zeros(self.num_envs, self.capacity).index_copy_(1, slots, final_values.detach())

    # ------------------------------------------------------------------------------------------------ learning

    def minibatches(
        self,
        num_minibatches: int = 4,
        num_epochs: int = 1,
        shuffle: str = "full",
        normalize_advantages: bool | str = True,
        drop_last: bool = False,
        reuse: bool = False,
    ) -> Iterator[Minibatch]:
        """The oldest rollout in ``num_epochs`` x ``num_minibatches`` parts, each gathered in one launch.

        Args:
            num_minibatches: parts of an epoch; their sizes differ by at most one.
            num_epochs: each with a permutation of its own, of all N * T samples.
            shuffle: "full", or "none" for the samples in order (n * T + t).
            normalize_advantages: True: (A - mean) / (std + 1e-8) over the rollout's valid samples, from the statistics
                of :meth:`compute_gae`, applied while gathering; "minibatch": over each minibatch (SB3, CleanRL), at the
                price of further launches; False: as they are.
            drop_last: equal sizes; the permutation's last N * T % num_minibatches samples are left out.
            reuse: hand out the same tensors each time (for CUDA graphs, and to spare a CPU its page faults): a
                minibatch is then overwritten by the next one.

        Yields:
            :class:`Minibatch`.

        Raises:
            RuntimeError: before :meth:`compute_gae`, or after :meth:`clear` while iterating. ValueError: a bad argument.
        """
        count = positive("num_minibatches", num_minibatches)
        epochs = positive("num_epochs", num_epochs)
        if shuffle not in ("full", "none"):
            raise ValueError(f"shuffle: expected 'full' or 'none', got {shuffle!r}")
        if normalize_advantages not in (True, False, "minibatch"):
            raise ValueError(f"normalize_advantages: expected a bool or 'minibatch', got {normalize_advantages!r}")
        self._need_gae("minibatches")
        subset = self._valid_samples()
        samples = self.num_envs * self.num_steps if subset is None else subset.shape[0]
        if count > samples:
            raise ValueError(f"num_minibatches: expected at most one a sample, {samples}, got {count}")
        plan = Plan(samples, count, shuffle == "full", normalize_advantages, drop_last, reuse, subset)
        return self._iterate(plan, epochs)

    def _iterate(self, plan: Plan, epochs: int) -> Iterator[Minibatch]:
        rollout = self._rollout
        for _ in range(epochs):
            epoch, self._epoch = self._epoch, self._epoch + 1
            for first, size in plan.parts():
                if rollout != self._rollout or not self._computed:
                    raise RuntimeError("minibatches: the rollout was discarded while they were being read")
                yield self._minibatch(plan, epoch, first, size)

    def _minibatch(self, plan: Plan, epoch: int, first: int, size: int) -> Minibatch:
        tensors = self._outputs(size, plan.largest, plan.reuse)
        position = (rollout, start) = (self._rollout, self._start)
        names = [field.name for field in self._sources]
        statistics = self._memory["statistics"] if plan.normalize is True else None
        self._gather(plan, epoch, first, position, tensors, names, statistics)
        written(*tensors.values())
        if plan.normalize == "minibatch":
            advantages = tensors["advantages"]
            mean, std = advantages.mean(), advantages.std() if size > 1 else 0.0
            advantages.sub_(mean).div_(std + 1e-8)

        def indices() -> Tensor:
            made = {"indices": torch.empty(size, dtype=torch.int64, device=self.device)}
            self._gather(plan, epoch, first, (rollout, start), made, [], None)
            return made["indices"]

        return Minibatch(tensors, tuple(self._layout.obs), self._layout.obs_is_mapping, indices)

    def _outputs(self, size: int, largest: int, reuse: bool) -> dict[str, Tensor]:
        def fresh(n: int) -> dict[str, Tensor]:
            return {x.name: pages.empty(x.shape, x.dtype, self.device) for x in self._layout.minibatch(n)}

        if not reuse:
            return fresh(size)
        if largest not in self._reused:
            with torch.inference_mode(False):
                self._reused[largest] = fresh(largest)
        kept = self._reused[largest]
        return kept if size == largest else {name: x[:size] for name, x in kept.items()}

    def _gather(
        self,
        plan: Plan,
        epoch: int,
        first: int,
        position: tuple[int, int],
        tensors: dict[str, Tensor],
        names: list[str],
        statistics: Tensor | None,
    ) -> None:
        self._ops.gather(
            self._rows,
            self._offsets if names else [],
            self._dtypes if names else [],
            [tensors[name] for name in names],
            self._layout.fields["values"].offset,
            self._memory["advantages"] if names else None,
            statistics,
            plan.subset,
            self.num_steps,
            position[1],
            plan.samples,
            self._key,
            position[0],
            epoch,
            plan.shuffle,
            first,
            self._cursor if self._capturing() else None,
            tensors.get("advantages"),
            tensors.get("returns"),
            tensors.get("indices"),
        )

    def _valid_samples(self) -> Tensor | None:
        """Numbers n * T + t of the samples that count, or None if all do. Known on the device: one sync a rollout."""
        if not self._resets[self._rollout % self._layout.num_rollouts]:
            return None
        if self._subset is None:
            self._subset = (self.dones != INVALID).flatten().nonzero().squeeze(1)
        return self._subset

    def clear(self) -> None:
        """Discards the oldest full rollout; in the middle of the only one, rewinds to its start."""
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
        if self._truncations[rollout] and self._pool_count is not None:
            self._pool_count[rollout].zero_()
        if not self._capturing():
            self._truncations[rollout] = self._resets[rollout] = False
        self._computed, self._subset, self._epoch = False, None, 0

    def advance(self, steps: int, rollouts: int = 0) -> None:
        """Tells the host what a captured graph is about to do: ``steps`` appends, ``rollouts`` calls of clear().

        Call it before each replay. Raises BufferFull, and changes nothing, if the appends would overwrite a rollout
        that has not been discarded.
        """
        self._idle("advance")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps: expected an int of at least 0, got {steps!r}")
        if len(self) + steps > self.capacity:
            raise BufferFull(f"the ring of {self.capacity} steps holds {len(self)}; {steps} more would overwrite them")
        if not self._cursor_live:
            state = torch.tensor([self._appended, self._discarded, 0, 0, self.num_steps])
            self._cursor.copy_(state)
            self._cursor_live = True
        self._appended += steps
        self._discarded += rollouts * self.num_steps

    def check(self) -> None:
        """Reads the device's flags, one host sync, and raises what they say.

        BufferFull: a captured append found the ring full and wrote nothing. RuntimeError: as :meth:`compute_gae`.
        """
        if int(self._cursor[CURSOR_FLAG]):
            raise BufferFull("a captured append found the ring full; nothing was written: call advance() before replays")
        rollout = self._rollout % self._layout.num_rollouts
        if self._pool_count is not None and self._truncations[rollout]:
            self._check_pool(*self._pool_count[rollout].tolist())

    # ------------------------------------------------------------------------------------------------ views

    @property
    def obs(self) -> Tensor | dict[str, Tensor]:
        """[N, T, ...], or a dict of groups; in the dtype it is stored in."""
        groups = {name: self[f"obs.{name}"] for name in self._layout.obs}
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
        if name not in self._views or name == "final_row":
            names = [name for name in self._views if name != "final_row"]
            raise KeyError(f"{name}: not a field of this buffer; it has {', '.join(names)}")
        return self._plane(self._views[name].transpose(0, 1))

    def _plane(self, plane: Tensor) -> Tensor:
        start, steps = self._start, min(len(self), self.num_steps)
        if start + steps <= self.capacity:
            return plane[:, start : start + steps]
        return torch.cat([plane[:, start:], plane[:, : start + steps - self.capacity]], dim=1)

    def _need_gae(self, name: str) -> None:
        if not self._computed:
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
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    # ------------------------------------------------------------------------------------------------ moving

    def to(self, device: torch.device | str) -> RolloutBuffer:
        """This buffer if it lies on ``device``, else a new one there with the same contents."""
        device = _indexed(torch.device(device))
        if device == self.device:
            return self
        backend = self._backend if self._backend == "reference" else None
        moved = RolloutBuffer(
            **self._arguments, device=device, seed=self._seed, rank=self._rank, backend=backend
        )
        moved.load_state_dict(self.state_dict())
        return moved

    def state_dict(self) -> dict[str, object]:
        """Everything that :meth:`load_state_dict` needs to go on as if nothing had happened; tensors are not copied."""
        if self._open is not None:
            raise RuntimeError(f"state_dict: expected end() first, {self._open}() has begun a step")
        state: dict[str, object] = {f"memory.{name}": x for name, x in self._memory.items() if name not in _TRANSIENT}
        state |= {name: getattr(self, f"_{name}") for name in _COUNTERS}
        return state | {"truncations": list(self._truncations), "resets": list(self._resets)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes over the state of a buffer constructed with the same sizes, from any device.

        Raises ValueError, and changes nothing, where a size or a key differs.
        """
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(f"state_dict: expected the keys {sorted(own)}, got {sorted(state)}")
        for name, x in own.items():
            if isinstance(x, Tensor) and (state[name].shape != x.shape or state[name].dtype != x.dtype):
                raise ValueError(
                    f"state_dict: {name}: expected {list(x.shape)} {x.dtype}, "
                    f"got {list(state[name].shape)} {state[name].dtype}"
                )
        for name, x in own.items():
            if isinstance(x, Tensor):
                x.copy_(state[name])
        for name in _COUNTERS:
            setattr(self, f"_{name}", state[name])
        self._truncations, self._resets = list(state["truncations"]), list(state["resets"])
        self._key = _mix_seed(self._seed, self._rank)
        self._open, self._subset, self._cursor_live = None, None, False


# Rebuilt by the next launch, or by advance().
_TRANSIENT = ("workspace", "cursor")
_COUNTERS = ("appended", "discarded", "computed", "epoch", "seed", "rank")


def _indexed(device: torch.device) -> torch.device:
    """With its index: tensors say cuda:0 where a user says cuda."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str) -> Tensor:
    """Zeros of this shape; planes, [N, T or C], lie as their device's scan wants them."""
    transposed = name in ("rewards", "values", "dones", "advantages", "returns") and device.type != "cuda"
    made = pages.empty(shape[::-1] if transposed else shape, dtype, device).zero_()
    return made.t() if transposed else made


def _field_view(rows: Tensor, field: Field) -> Tensor:
    """[..., *field.shape], typed, of rows [..., row_bytes]."""
    view = rows[..., field.offset : field.offset + field.nbytes].view(field.dtype)
    return view.unflatten(-1, field.shape) if field.shape else view[..., 0]


def _mix_seed(seed: int, rank: int) -> int:
    """A signed 64-bit key of (seed, rank): two rounds of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    x = seed & mask
    for word in (rank, 0):
        x = (x + 0x9E3779B97F4A7C15 * (2 * (word & mask) + 1)) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x
