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

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pydrone.estimators import env_scalars, overlap, pick_bootstrap, unit_interval
from pydrone.ops.dispatch import bump, written
from pydrone.ops.pages import Recycler
from pydrone.ops.reference import normalization, permute
from pydrone.ops.schema import CURSOR_DISCARDED, INVALID
from pydrone.rollout.layout import boolean, of_append, positive
from pydrone.rollout.minibatch import Drawn, InRing, Minibatch, Plan
from pydrone.rollout.ring import BufferFull, NonFinite, Ring, field_view
from pydrone.rollout.sequences import Sequences, pad
from pydrone.rollout.sources import Sources

__all__ = ["BufferFull", "Minibatch", "NonFinite", "RolloutBuffer"]

_ENDS = {"rewards", "dones", "truncated", "final_obs", "valid"}  # what end() takes


class RolloutBuffer(Ring):
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
        non_finite: what happens where an observation, a reward or a value is NaN or infinite: "warn", "raise" or
            "ignore". The launches that store and scan them find it; see :meth:`compute_gae` for when it is said.
            Observations written by way of :meth:`slot` are not looked at.
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
        non_finite: str = "warn",
    ) -> None:
        super().__init__(
            {
                "num_envs": num_envs,
                "num_steps": num_steps,
                "obs": obs,
                "actions": actions,
                "capacity": capacity,
                "obs_dtype": obs_dtype,
                "fields": fields,
                "max_episode_length": max_episode_length,
                "final_obs_rows": final_obs_rows,
            },
            device,
            seed,
            rank,
            backend,
            non_finite,
        )
        self._checked = Sources(self._layout, self.device)
        self._recycler = Recycler()
        self._num_rollouts = self._layout.num_rollouts
        self._values_at = self._sources.index(self._layout.fields["values"])
        rows, values, rewards = self._rows, self._memory["values"], self._memory["rewards"]
        self._step_memory = [rows, values, rewards, self._codes, *self._pool[:2]]
        # The operation's ``memory`` and ``layout`` for a whole step and for its halves; without truncations, with
        # them, and with their final observations too.
        self._constants = {}
        pool_fields = self._layout.pool_fields.values()
        for call, fields, planes in (
            ("append", self._sources, [values, rewards]),
            ("begin", self._sources, [values]),
            ("end", [], [rewards]),
            ("slot", [], [values, rewards]),
        ):
            memory = [rows, self._codes, *planes]
            # Observations are the first fields; the scan sees what rewards and values are.
            looked_at = len(self._layout.obs) if fields and non_finite != "ignore" else 0
            flag = [self._not_finite] if looked_at else []
            with torch.inference_mode(False):
                layout, with_final = (of_append(fields, len(planes), final, looked_at) for final in ([], pool_fields))
            pooled = [*memory, *self._pool, *flag]
            self._constants[call] = ([*memory, *flag], layout), (pooled, layout), (pooled, with_final)

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
        self._ready("append")
        given = self._checked.given(obs, actions, values, log_probs, fields)
        # Without dones the operation would store half a step.
        final = None if dones is None else self._usual_final(truncated, final_obs)
        sources = None if final is None else self._checked.usual(given, final)
        if sources is not None:
            try:
                self._write("append", [*sources, values, rewards, *final], dones, truncated, valid, final)
                return
            except (RuntimeError, TypeError):
                pass  # the operation has written nothing; the checks below say what is wrong in the caller's words
        sources = self._checked.row(given)
        rewards, *ends = self._ends(rewards, dones, truncated, final_obs, valid)
        self._write("append", [*sources, sources[self._values_at], rewards, *ends[-1]], *ends)

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
        self._ready("begin")
        given = self._checked.given(obs, actions, values, log_probs, fields)
        usual = self._checked.usual(given, ()) if self._ops.checks else None
        for sources in (usual, None):
            if sources is None:
                sources = self._checked.row(given)
            try:
                self._write("begin", [*sources, sources[self._values_at]], None, None, None, ())
                break
            except (RuntimeError, TypeError):
                if sources is not usual:
                    raise  # else as in append
        self._open = "begin"

    def slot(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """Views of the step being written, for those who can write straight into it; :meth:`end` commits.

        Keys: obs (a tensor, or a dict of groups), actions, values, log_probs and the constructor's fields; [N, ...], in
        the dtype they are stored in. All of them are to be written.

        Raises BufferFull as :meth:`append` does.
        """
        self._ready("slot")
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
        rewards, *ends = self._ends(rewards, dones, truncated, final_obs, valid)
        if self._open == "slot":
            values = self._views["values"][self._appended % self.capacity]
            self._write("slot", [values, rewards, *ends[-1]], *ends)
        else:
            self._write("end", [rewards, *ends[-1]], *ends)
        self._open = None

    def _ready(self, call: str) -> None:
        """Raises where a step cannot be begun."""
        if self._open is not None:
            self._idle(call)
        if self._appended - self._discarded >= self.capacity and not self._capturing():
            raise BufferFull(
                f"the ring of {self.capacity} steps holds {len(self)} that are not discarded: "
                "learn from the rollout and call clear() first"
            )

    def _idle(self, call: str) -> None:
        if self._open is not None:
            raise RuntimeError(f"{call}: expected end() first, {self._open}() has begun a step")

    def _usual_final(self, truncated: Tensor | None, final_obs: object) -> list[object] | None:
        """The final observations, unchecked; None where all is to be checked in Python."""
        if not self._ops.checks:
            return None
        if final_obs is None:
            return []
        if truncated is None or not self._pool:
            return None
        return list(self._checked.groups("final_obs", final_obs).values())

    def _ends(self, rewards, dones, truncated, final_obs, valid) -> tuple:
        """How a step ended, checked: rewards, dones, truncated, valid, and the final observations' groups."""
        scalar, final = self._checked.scalar, []
        rewards, dones = scalar("rewards", rewards, True), scalar("dones", dones, False)
        truncated = None if truncated is None else scalar("truncated", truncated, False)
        valid = None if valid is None else scalar("valid", valid, False)
        if final_obs is not None:
            if truncated is None:
                raise ValueError("final_obs: expected truncated with it, got None")
            if not self._pool:
                raise ValueError("final_obs: this buffer has no pool for them; construct it with final_obs_rows > 0")
            groups = self._checked.groups("final_obs", final_obs)
            for field in self._layout.pool_fields.values():
                final.append(self._checked.field(field, groups[field.name], "final_" + field.name))
        return rewards, dones, truncated, valid, final

    def _write(
        self,
        call: str,
        sources: list[Tensor],
        dones: Tensor | None,
        truncated: Tensor | None,
        valid: Tensor | None,
        final: Sequence[Tensor],
    ) -> None:
        """A step or its half: ``sources`` of a row, of planes and of the pool (``final``), and how it ended."""
        captured, commit = self._capturing(), call != "begin"
        memory, layout = self._constants[call][0 if truncated is None else 2 if final else 1]
        cursor = self._cursor if captured else None
        place = self._place(self._appended)
        self._ops.append(memory, sources, layout, dones, truncated, valid, *place, cursor, commit)
        bump(self._step_memory)
        if captured:
            self._captured_truncations |= truncated is not None
            self._captured_resets |= valid is not None
        elif commit:
            self._committed(truncated, valid)

    def _place(self, step: int) -> tuple[int, int]:
        """The slot of a step, counted from the first ever, and the place of its rollout in the pool."""
        return step % self.capacity, step // self.num_steps % self._num_rollouts

    def _committed(self, truncated: Tensor | None, valid: Tensor | None) -> None:
        """Counts a step that has been stored whole."""
        rollout = self._appended // self.num_steps % self._num_rollouts
        if truncated is not None:
            self._truncations[rollout] = True
        if valid is not None:
            self._resets[rollout] = True
        self._appended += 1
        self._cursor_live = False

    def _turn(self, run: Callable[[tuple, tuple], None], row: dict[str, object], ends: Mapping | None) -> bool:
        """:meth:`end` with ``ends``, None before the first step, and :meth:`begin` of the next by one operation.

        ``run`` is called with the operation's arguments of either; it may write the sources of ``row`` that are no
        observations before it stores them. Returns False, and nothing has been stored, where anything is out of the
        ordinary: the two methods do it then, or say what is wrong.
        """
        step = self._appended + (ends is not None)
        if self._open != (None if ends is None else "begin") or step - self._discarded >= self.capacity:
            return False
        if self._capturing():  # the operation takes the host's counters alone
            return False
        end, final, truncated, valid = ((), (), None, None, None, None, 0, 0), (), None, None
        if ends is not None:
            dones, truncated, valid = ends.get("dones"), ends.get("truncated"), ends.get("valid")
            final = None if dones is None else self._usual_final(truncated, ends.get("final_obs"))
            if final is None or not ends.keys() <= _ENDS:
                return False
            memory, layout = self._constants["end"][0 if truncated is None else 2 if final else 1]
            end = memory, [ends.get("rewards"), *final], layout, dones, truncated, valid, *self._place(self._appended)
        fields = dict(row)
        given = self._checked.given(*(fields.pop(x) for x in ("obs", "actions", "values", "log_probs")), fields)
        sources = self._checked.usual(given, final)
        if sources is None:
            return False
        memory, layout = self._constants["begin"][0]
        try:
            run(end, (memory, sources[: len(self._layout.obs)], layout, *self._place(step)))
        except (RuntimeError, TypeError):
            return False
        bump(self._step_memory)
        if ends is not None:
            self._committed(truncated, valid)
        self._open = "begin"
        return True

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
                truncation whose final observation found no place has NaN advantages. It also says what is not finite,
                by ``non_finite``: on a CPU here; on a GPU here (one host sync) with "raise", with "warn" in
                :meth:`check`, which goes with whatever else is read from the device once a rollout.

        Raises:
            RuntimeError: the rollout has fewer than T steps; the pool has overflowed; a truncation came without its
                final observation. TypeError, ValueError: as :func:`pydrone.gae`.
        """
        captured = self._capturing()
        if len(self) < self.num_steps and not captured:
            raise RuntimeError(f"compute_gae: expected a rollout of {self.num_steps} steps, {len(self)} are stored")
        gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
        boolean("check", check)
        if isinstance(last_values, Tensor):
            last_values = last_values.detach()
        last_values = env_scalars("last_values", last_values, self.num_envs, self.device)
        if value_fn is not None and not callable(value_fn):
            raise TypeError(f"value_fn: expected a function of observations, got {type(value_fn).__name__}")
        rollout = self._rollout % self._layout.num_rollouts
        truncations = self._truncations[rollout] or self._captured_truncations
        bootstrap = pick_bootstrap(
            truncations, final_values=final_values, value_fn=value_fn, timeout_bootstrap=timeout_bootstrap
        )
        if final_values is not None:
            final_values = self._in_ring(final_values)
        final_rows, self._pool_valued = None, truncations and value_fn is not None
        self._captured_pool_valued |= captured and self._pool_valued
        if not truncations:
            bootstrap, final_values = 0, None
        elif value_fn is not None:
            final_values, final_rows = self._evaluate(value_fn, rollout, check), self._final_rows
        memory = self._memory
        for name, x in (("last_values", last_values), ("final_values", final_values)):
            if x is not None and (overlap(x, memory["advantages"]) or overlap(x, memory["returns"])):
                raise ValueError(f"{name}: expected memory of its own, got some of this buffer's advantages or returns")
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
        self._captured_gae |= captured
        self._computed, self._subset, self._scans = True, None, self._scans + 1
        if check and not captured and (self._policy == "raise" or (self._policy == "warn" and not self._on_cuda)):
            if self._on_cuda:
                observed, advantages = self.flags()[3:].tolist()
            else:  # nothing to wait for: the two are read where they lie
                observed = self._not_finite.tolist()[rollout]
                advantages = sum(memory["statistics"].tolist()[1:])
            self._check_finite(observed, advantages, 3)

    def _evaluate(self, value_fn: Callable, rollout: int, check: bool) -> Tensor:
        """The values of the rollout's pool of final observations: of the rows in use where their number is known."""
        if not self._pool:
            raise ValueError(
                "value_fn: this buffer has no pool of final observations; construct it with final_obs_rows"
            )
        rows = self._final_obs[rollout]
        if self._capturing():
            if self._layout.num_rollouts > 1:
                raise RuntimeError(
                    "value_fn: in a captured graph it needs a ring of one rollout, capacity == num_steps"
                )
        elif check or self.device.type == "cpu":
            used, missing = self._pool_count[rollout].tolist()
            self._check_pool(used, missing)
            rows = rows[:used]
        if rows.shape[0] == 0:
            return torch.empty(0, device=self.device)
        groups = {name: field_view(rows, self._layout.pool_fields[f"obs.{name}"]) for name in self._layout.obs}
        with torch.no_grad():
            values = value_fn(groups if self._layout.obs_is_mapping else groups["obs"])
        return env_scalars("value_fn's result", values, rows.shape[0], self.device)

    def _in_ring(self, final_values: Tensor) -> Tensor:
        """Values [N, T] of the rollout as [N, C] at the ring's slots."""
        self._checked.check("final_values", final_values)
        if not final_values.is_floating_point():
            raise TypeError(f"final_values: expected a floating dtype, got {final_values.dtype}")
        if final_values.shape != (self.num_envs, self.num_steps):
            expected = [self.num_envs, self.num_steps]
            raise ValueError(f"final_values: expected shape {expected}, got {list(final_values.shape)}")
        if self.capacity == self.num_steps:
            return final_values.detach()
        start = self._cursor[CURSOR_DISCARDED] if self._capturing() else self._discarded
        slots = (torch.arange(self.num_steps, device=self.device) + start) % self.capacity
        return final_values.new_zeros(self.num_envs, self.capacity).index_copy_(1, slots, final_values.detach())

    def minibatches(
        self,
        num_minibatches: int = 4,
        num_epochs: int = 1,
        shuffle: str = "full",
        normalize_advantages: bool | str = True,
        drop_last: bool = False,
        reuse: bool = False,
        lazy: bool = False,
    ) -> Iterator[Minibatch]:
        """The oldest rollout in ``num_epochs`` x ``num_minibatches`` parts, each gathered in one launch.

        That is when it is handed out or, with ``lazy``, when a tensor of it is first asked for.

        Args:
            num_minibatches: parts of an epoch; their sizes differ by at most one.
            num_epochs: each with a permutation of its own, of all N * T samples.
            shuffle: "full", or "none" for the samples in order (n * T + t).
            normalize_advantages: True: (A - mean) / (std + 1e-8) over the rollout's valid samples, from the statistics
                of :meth:`compute_gae`, applied while gathering; "minibatch": over each minibatch (SB3, CleanRL), at the
                price of further launches; False: as they are.
            drop_last: equal sizes; the permutation's last N * T % num_minibatches samples are left out.
            reuse: hand out the same tensors each time, for CUDA graphs: each minibatch overwrites the one before. With
                ``lazy``, one that is not the last that was handed out (by any iterator of this buffer with minibatches
                as large) raises RuntimeError where its tensors are asked for.
            lazy: gather a minibatch when a tensor of it is first asked for, as the fused learner, which reads the ring
                itself, never does. The rollout and its advantages have to be there still: else RuntimeError. ``len``,
                ``repr`` and ``indices`` gather nothing. On the CPU alone; elsewhere, in what is captured, and with
                "minibatch", as if it were False.

        Yields:
            :class:`Minibatch`.

        Raises:
            RuntimeError: before :meth:`compute_gae`, or after :meth:`clear`, :meth:`load_state_dict` or an
                :meth:`advance` that discards, while iterating.
            ValueError: a bad argument.
        """
        count = positive("num_minibatches", num_minibatches)
        epochs = positive("num_epochs", num_epochs)
        if shuffle not in ("full", "none"):
            raise ValueError(f"shuffle: expected 'full' or 'none', got {shuffle!r}")
        normalize = normalize_advantages if normalize_advantages == "minibatch" else bool(normalize_advantages)
        if normalize_advantages not in (True, False, "minibatch"):
            raise ValueError(f"normalize_advantages: expected a bool or 'minibatch', got {normalize_advantages!r}")
        boolean("drop_last", drop_last), boolean("reuse", reuse), boolean("lazy", lazy)
        self._need_gae("minibatches")
        subset = self._valid_samples()
        samples = self.num_envs * self.num_steps if subset is None else subset.shape[0]
        if samples == 0:
            raise ValueError("minibatches: expected valid samples in the rollout, none is")
        if count > samples:
            raise ValueError(f"num_minibatches: expected at most one a sample, {samples}, got {count}")
        plan = Plan(samples, count, shuffle == "full", normalize, drop_last, reuse, subset)
        # What is captured follows the device's counters, which a minibatch that is read in the ring does not.
        lazy = lazy and self.device.type == "cpu" and normalize != "minibatch" and not self._capturing()
        return self._iterate(plan, epochs, lazy, self._discards)

    def sequences(
        self,
        hidden: Mapping[str, str | Tensor] | None = None,
        burn_in: int = 0,
        num_minibatches: int = 1,
        num_epochs: int = 1,
        normalize_advantages: bool = True,
    ) -> Iterator[Sequences]:
        """The oldest rollout as padded trajectories, for recurrent policies: minibatches of whole environments.

        Args:
            hidden: names to the recurrent state *before* each step: the name of one of the constructor's fields, or a
                tensor [N, T, ...] of one's own. Each trajectory gets the one of its first step.
            burn_in: steps at the beginning of a trajectory that goes on from the rollout before, which renew its hidden
                state and are left out of ``learn``.
            num_minibatches: parts of an epoch; the numbers of their environments differ by at most one.
            num_epochs: each with environments in another order.
            normalize_advantages: as in :meth:`minibatches`.

        Yields:
            :class:`~pydrone.rollout.sequences.Sequences`; its ``fields`` hold actions, values, log_probs, advantages,
            returns and the constructor's. Plain PyTorch, one host sync a minibatch.
        """
        count, epochs = positive("num_minibatches", num_minibatches), positive("num_epochs", num_epochs)
        if isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
            raise ValueError(f"burn_in: expected an int of at least 0, got {burn_in!r}")
        if count > self.num_envs:
            raise ValueError(f"num_minibatches: expected at most one an environment, {self.num_envs}, got {count}")
        boolean("normalize_advantages", normalize_advantages)
        self._need_gae("sequences")
        states = {}
        if hidden is not None and not isinstance(hidden, Mapping):
            raise TypeError(f"hidden: expected a mapping of names to fields or tensors, got {type(hidden).__name__}")
        for name, state in (hidden or {}).items():
            if isinstance(state, Tensor):
                self._checked.check(f"hidden[{name!r}]", state)
            elif not isinstance(state, str):
                raise TypeError(f"hidden[{name!r}]: expected a field's name or a tensor, got {type(state).__name__}")
            elif state not in self._layout.extra:
                names = ", ".join(self._layout.extra) or "none"
                raise ValueError(f"hidden[{name!r}]: expected the name of a field, one of {names}, got {state!r}")
            states[name] = self[state] if isinstance(state, str) else state
            if states[name].shape[:2] != (self.num_envs, self.num_steps):
                expected = f"[{self.num_envs}, {self.num_steps}, ...]"
                raise ValueError(f"hidden[{name!r}]: expected shape {expected}, got {list(states[name].shape)}")
        return self._trajectories(states, burn_in, count, epochs, normalize_advantages)

    def _trajectories(
        self, states: dict[str, Tensor], burn_in: int, count: int, epochs: int, normalize: bool
    ) -> Iterator[Sequences]:
        views = {field.name: self._field(field.name) for field in self._sources}
        views["advantages"], views["returns"] = self.advantages, self.returns
        if normalize:
            mean, scale = normalization(self.statistics)
            views["advantages"] = (views["advantages"] - mean) * scale
        position, discards = torch.arange(self.num_envs, device=self.device), self._discards
        for _ in range(epochs):
            epoch, self._epoch = self._epoch, self._epoch + 1
            order = permute(position, self.num_envs, self._key, self._rollout, epoch)
            for i in range(count):
                if discards != self._discards or not self._computed:
                    raise RuntimeError("sequences: the rollout was discarded while they were being read")
                envs = order[i * self.num_envs // count : (i + 1) * self.num_envs // count]
                yield pad(
                    views, tuple(self._layout.obs), self._layout.obs_is_mapping, self.dones, states, envs, burn_in
                )

    def _iterate(self, plan: Plan, epochs: int, lazy: bool, discards: int) -> Iterator[Minibatch]:
        for _ in range(epochs):
            epoch, self._epoch = self._epoch, self._epoch + 1
            for first, size in plan.parts():
                self._still(discards)
                yield (self._drawn if lazy else self._minibatch)(plan, epoch, first, size)

    def _still(self, discards: int) -> None:
        if discards != self._discards:
            raise RuntimeError("minibatches: the rollout was discarded while they were being read")

    def _drawn(self, plan: Plan, epoch: int, first: int, size: int) -> Drawn:
        position = (key, rollout, start) = self._position()
        discards, scans, turn = self._discards, self._scans, self._hand_out(plan)

        def there() -> None:
            self._still(discards)
            if scans != self._scans:
                raise RuntimeError("minibatches: compute_gae() has renewed the advantages while they were being read")

        def gather() -> dict[str, Tensor]:
            there()
            return self._filled(plan, epoch, first, size, position)

        def overwritten() -> bool:
            return plan.reuse and turn != self._turns[plan.largest]

        def place() -> InRing:
            there()
            numbers = [self.num_steps, start, plan.samples, key, rollout, epoch, int(plan.shuffle), first, size]
            statistics = self._memory["statistics"] if plan.normalize else None
            groups = {name: self._views[f"obs.{name}"] for name in self._layout.obs}
            obs = groups if self._layout.obs_is_mapping else groups["obs"]
            return InRing(obs, self._views, self._memory["advantages"], numbers, statistics, plan.subset)

        names = (*(field.name for field in self._sources), "advantages", "returns")
        groups, grouped = tuple(self._layout.obs), self._layout.obs_is_mapping
        indices = self._numbers(plan, epoch, first, size, position)
        return Drawn(names, size, groups, grouped, indices, gather, overwritten, place)

    def _minibatch(self, plan: Plan, epoch: int, first: int, size: int) -> Minibatch:
        self._hand_out(plan)
        position = self._position()
        tensors = self._filled(plan, epoch, first, size, position)
        if plan.normalize == "minibatch":
            advantages = tensors["advantages"]
            mean, std = advantages.mean(), advantages.std() if size > 1 else 0.0
            advantages.sub_(mean).div_(std + 1e-8)
        indices = self._numbers(plan, epoch, first, size, position)
        return Minibatch(tensors, tuple(self._layout.obs), self._layout.obs_is_mapping, indices)

    def _position(self) -> tuple[int, int, int]:
        """Which permutations are the oldest rollout's, and where it begins: the key, its number, its slot."""
        return self._key, self._rollout, self._start

    def _hand_out(self, plan: Plan) -> int:
        """The turn of a minibatch at the tensors that are reused: the last that was handed out has them."""
        if not plan.reuse:
            return 0
        turn = self._turns[plan.largest] = self._turns.get(plan.largest, 0) + 1
        return turn

    def _filled(
        self, plan: Plan, epoch: int, first: int, size: int, position: tuple[int, int, int]
    ) -> dict[str, Tensor]:
        tensors = self._outputs(size, plan.largest, plan.reuse)
        names = [field.name for field in self._sources]
        statistics = self._memory["statistics"] if plan.normalize is True else None
        self._gather(plan, epoch, first, position, tensors, names, statistics)
        written(*tensors.values())
        return tensors

    def _numbers(
        self, plan: Plan, epoch: int, first: int, size: int, position: tuple[int, int, int]
    ) -> Callable[[], Tensor]:
        """What a minibatch's ``indices`` are made by, whatever has become of the rollout."""

        def indices() -> Tensor:
            made = {"indices": torch.empty(size, dtype=torch.int64, device=self.device)}
            self._gather(plan, epoch, first, position, made, [], None)
            return made["indices"]

        return indices

    def _outputs(self, size: int, largest: int, reuse: bool) -> dict[str, Tensor]:
        @torch.inference_mode(False)
        def fresh(n: int) -> dict[str, Tensor]:
            wanted = self._layout.minibatch(n)
            made = self._recycler.empty([(x.shape, x.dtype) for x in wanted], self.device)
            return {x.name: tensor for x, tensor in zip(wanted, made, strict=True)}

        if not reuse:
            return fresh(size)
        if largest not in self._reused:
            self._reused[largest] = fresh(largest)
        kept = self._reused[largest]
        return kept if size == largest else {name: x[:size] for name, x in kept.items()}

    def _gather(
        self,
        plan: Plan,
        epoch: int,
        first: int,
        position: tuple[int, int, int],
        tensors: dict[str, Tensor],
        names: list[str],
        statistics: Tensor | None,
    ) -> None:
        key, rollout, start = position
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
            start,
            plan.samples,
            key,
            rollout,
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
        if not (self._resets[self._rollout % self._layout.num_rollouts] or self._captured_resets):
            return None
        if self._subset is None:
            self._subset = (self.dones != INVALID).flatten().nonzero().squeeze(1)
        return self._subset
