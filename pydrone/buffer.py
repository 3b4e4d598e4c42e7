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

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pydrone.ops.arguments import boolean, positive
from pydrone.ops.dispatch import select
from pydrone.rollout import non_finite as finiteness
from pydrone.rollout import state as states
from pydrone.rollout.draws import Draws, mix_seed
from pydrone.rollout.layout import Layout
from pydrone.rollout.minibatch import Minibatch, Plan
from pydrone.rollout.non_finite import NonFinite
from pydrone.rollout.ring import BufferFull, Ring
from pydrone.rollout.scan import Scan
from pydrone.rollout.sequences import Sequences, draw, hidden_states
from pydrone.rollout.sources import Sources
from pydrone.rollout.steps import Steps
from pydrone.rollout.storage import Storage, device_of
from pydrone.rollout.views import Rollout

__all__ = ["BufferFull", "Minibatch", "NonFinite", "RolloutBuffer"]


class RolloutBuffer(Rollout):
    """Storage of N environments x T steps, with GAE and shuffled minibatches as kernels.

    All memory is allocated in the constructor and is constant over a training (docs/memory.md).

    Args:
        num_envs: N.
        num_steps: T, the steps of a rollout.
        obs: an int, a shape, or a mapping of group names to shapes or (shape, dtype).
        actions: an int, a shape or (shape, dtype): ``((), torch.int64)`` for discrete ones.
        device: of all tensors, those given too.
        capacity: steps in the ring; None: T. With 2 * T the next rollout can be collected while one is learnt from. At
            a multiple of T every rollout is contiguous. At another capacity rollouts wrap around the ring's end: GAE
            and minibatches follow the wrap, and a view of a wrapped rollout is a copy.
        obs_dtype: torch.float16 or torch.bfloat16 halve the memory of observations. Minibatches are float32 anyway,
            unless ``verbatim``.
        fields: further fields, name to shape or (shape, dtype): old means and stds, costs, masks.
        seed: of the minibatches' permutations. Each rollout and each epoch has its own.
        max_episode_length: in steps, if known: sizes the pool of final observations if ``final_obs_rows`` is None.
        final_obs_rows: rows of that pool for one rollout; None: N * (1 + T // max_episode_length); 0: no pool.
        rank: this process's number among several: each shuffles differently.
        backend: "reference", "cpu", "triton" or "cuda"; None: ``PYDRONE_BACKEND`` or the best for the device.
        verbatim: for code that replaces another storage. Minibatches and the pool have the dtypes of what is stored,
            half precision included, and sizes of 0 are accepted, such as a group of shape (0,).
        non_finite: what to do about NaN and infinite observations, rewards and values: "warn", "raise" or "ignore". The
            launches that store and scan them find them; :meth:`compute_gae` says when they are reported. Observations
            written through :meth:`slot` are not checked.
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
        verbatim: bool = False,
    ) -> None:
        report = finiteness.Report(non_finite)
        self.device = device_of(device)
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
            "verbatim": verbatim,
        }
        layout = Layout(**self._arguments)
        self.num_envs, self.num_steps, self.capacity = layout.num_envs, layout.num_steps, layout.capacity
        for name, x in (("seed", seed), ("rank", rank)):
            if isinstance(x, bool) or not isinstance(x, int):
                raise TypeError(f"{name}: expected an int, got {type(x).__name__}")
        self._seed, self._rank, self._backend = seed, rank, backend
        storage = Storage(layout, self.device, select(self.device, backend))
        ring = Ring(num_steps, self.capacity, layout.num_rollouts, storage.cursor)
        sources = Sources(layout, self.device)
        super().__init__(storage, ring, Scan(storage, ring, sources))
        self._steps = Steps(storage, ring, sources, look=non_finite != "ignore")
        self._draws = Draws(storage, ring, self._scan, mix_seed(seed, rank))
        self._report = report
        self._subset: Tensor | None = None  # the numbers of the oldest rollout's valid samples, once they are known

    @property
    def backend(self) -> str:
        """The name of the backend that its operations run on; by default on CUDA, that of its eager calls."""
        return self._storage.ops.name

    def __len__(self) -> int:
        """Steps stored and not discarded."""
        return len(self._ring)

    @property
    def full(self) -> bool:
        """Whether the rollout being collected has T steps."""
        return len(self) > 0 and len(self) % self.num_steps == 0

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the buffer holds; equals the plan of :mod:`pydrone.memory`."""
        reused = (x for tensors in self._draws.reused.values() for x in tensors.values())
        return sum(x.numel() * x.element_size() for x in (*self._storage.tensors.values(), *reused))

    def __repr__(self) -> str:
        obs = {name: list(shape) for name, (shape, _) in self.layout.obs.items()}
        obs = obs if self.layout.obs_is_mapping else next(iter(obs.values()))
        extra = f", fields={list(self.layout.extra)}" if self.layout.extra else ""
        ring = "" if self.capacity == self.num_steps else f", capacity={self.capacity}"
        return (
            f"RolloutBuffer(num_envs={self.num_envs}, num_steps={self.num_steps}, obs={obs}, "
            f"actions={list(self.layout.fields['actions'].shape)}{extra}{ring}, device={str(self.device)!r}, "
            f"backend={self.backend!r}, steps={len(self)}, {self.nbytes / 1e6:.1f} MB)"
        )

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
        self._steps.require_start("append")
        row, ends = (obs, actions, values, log_probs, fields), (rewards, dones, truncated, final_obs, valid)
        self._steps.store("append", row, ends)

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
        self._steps.require_start("begin")
        self._steps.store("begin", (obs, actions, values, log_probs, fields), None)
        self._steps.begun = "begin"

    def slot(self) -> dict[str, Tensor | dict[str, Tensor]]:
        """Views of the step being written, for those who can write straight into it; :meth:`end` commits.

        Keys: obs (a tensor, or a dict of groups), actions, values, log_probs and the constructor's fields; [N, ...], in
        the dtype they are stored in. All of them are to be written.

        Raises BufferFull as :meth:`append` does.
        """
        self._steps.require_start("slot")
        step = {name: view[self._ring.slot] for name, view in self._storage.views.items()}
        self._steps.begun = "slot"
        names = ("actions", "values", "log_probs", *self.layout.extra)
        return {"obs": self._storage.groups(step), **{name: step[name] for name in names}}

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
        begun = self._steps.begun
        if begun is None:
            raise RuntimeError("end: expected begin() or slot() before it")
        kind = "slot" if begun == "slot" else "end"
        self._steps.store(kind, None, (rewards, dones, truncated, final_obs, valid))
        self._steps.begun = None

    def turn(self, run: Callable[[tuple, tuple], None], row: dict[str, object], ends: Mapping | None) -> bool:
        """:meth:`end` and the next step's :meth:`begin` by one operation, for one that also acts in between.

        See :meth:`pydrone.rollout.steps.Steps.turn`. Returns False, with nothing stored, where the two methods must be
        called instead.
        """
        return self._steps.turn(run, row, ends)

    def compute_gae(
        self,
        last_values: Tensor,
        gamma: float = 0.99,
        lam: float = 0.95,
        *,
        final_values: Tensor | None = None,
        value_fn: Callable[[Tensor | dict[str, Tensor]], Tensor] | None = None,
        timeout_bootstrap: str | None = None,
        without_final_obs: str = "error",
        check: bool = True,
    ) -> None:
        """Advantages, returns and the advantages' statistics of the oldest rollout, in one launch.

        The formula is that of :func:`pydrone.gae`. A rollout with truncations needs exactly one of ``final_values``,
        ``value_fn`` and ``timeout_bootstrap``.

        Args:
            last_values: V of the observation after the rollout's last step, [N] or [N, 1].
            gamma, lam: in [0, 1].
            final_values: [N, T]: V of the true final observations, read where truncated.
            value_fn: called once, without gradients, with the pool of final observations ([P, ...], or a dict of
                groups), to return their values, [P] or [P, 1].
            timeout_bootstrap: "stored_value" or "next_value".
            without_final_obs: with ``value_fn``, what to do about truncations whose final observation is not in the
                pool, because it was not given or found no room: "error", or "stored_value" to bootstrap them with
                their stored values, as that ``timeout_bootstrap`` does.
            check: raise if the pool has overflowed (one host sync on a GPU; none without final observations), and
                report NaN and infinite numbers as ``non_finite`` says: on a CPU now; on a GPU now with "raise" (one
                host sync), and in :meth:`check` with "warn". With False, call :meth:`check` later, when other figures
                are read from the device. Until then a truncation whose final observation had no room has NaN
                advantages.

        Raises:
            RuntimeError: the rollout has fewer than T steps; the pool has overflowed; a truncation came without its
                final observation. TypeError, ValueError: as :func:`pydrone.gae`.
        """
        bootstrap = final_values, value_fn, timeout_bootstrap, without_final_obs
        self._compute(check, "compute_gae", last_values, gamma, lam, bootstrap)

    def compute_vtrace(
        self,
        last_values: Tensor,
        log_rhos: str | Tensor,
        gamma: float = 0.99,
        lam: float = 1.0,
        rho_clip: float = 1.0,
        c_clip: float = 1.0,
        *,
        final_values: Tensor | None = None,
        value_fn: Callable[[Tensor | dict[str, Tensor]], Tensor] | None = None,
        timeout_bootstrap: str | None = None,
        without_final_obs: str = "error",
        check: bool = True,
    ) -> None:
        """V-trace of the oldest rollout, in one launch, for a policy that has changed since it acted.

        The formula is that of :func:`pydrone.vtrace`. Afterwards ``advantages`` and ``statistics`` are of its
        pg_advantages, and ``returns``, those of minibatches too, its targets vs. Call it again as the policy changes;
        :meth:`compute_gae` goes back.

        Args:
            log_rhos: log-probabilities of the rollout's actions, new minus old: the name of one of the constructor's
                fields that holds one float, or [N, T], floating.
            rho_clip, c_clip: as in :func:`pydrone.vtrace`.
            others: as in :meth:`compute_gae`. They, and the stored values, are V of either policy: V-trace corrects
                for the actions.

        Raises:
            As :meth:`compute_gae`.
        """
        bootstrap = final_values, value_fn, timeout_bootstrap, without_final_obs
        self._compute(check, "compute_vtrace", last_values, gamma, lam, bootstrap, log_rhos, (rho_clip, c_clip))

    def _compute(self, check: bool, *arguments) -> None:
        self._scan.run(check, *arguments)
        self._subset = None
        if check and not self._ring.capturing():
            self._report_non_finite()

    @property
    def final_obs_used(self) -> int:
        """Final observations of the rollout being collected, those that found no room included. One host sync on a
        GPU."""
        return 0 if self._storage.final_obs is None else int(self._storage.pool_count[self._ring.collecting, 0])

    def grow_final_obs(self, rows: int) -> None:
        """Enlarges the pool of final observations to ``rows`` for one rollout; what it holds stays.

        It is new memory: capture CUDA graphs anew. No effect where it is as large. Raises ValueError where the buffer
        has no pool, or ``rows`` is no positive int.
        """
        positive("rows", rows)
        if self._storage.final_obs is None:
            raise ValueError("rows: this buffer has no pool of final observations; construct it with final_obs_rows")
        if rows > self.layout.final_obs_rows:
            self._arguments["final_obs_rows"] = rows
            self._storage.grow_pool(rows)
            self._steps.prepare()

    def _report_non_finite(self) -> None:
        """Reports NaN and infinite numbers for :meth:`compute_gae`; on a GPU, "warn" waits for :meth:`check`."""
        if self.device.type == "cuda":
            if self._report.policy == "raise":
                self._check_finite(*self.flags()[3:].tolist(), 5)
        elif self._report.policy != "ignore":  # on the host: nothing to wait for
            observed = self._storage.not_finite.tolist()[self._ring.place]
            self._check_finite(observed, sum(self._storage.statistics.tolist()[1:]), 5)

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

        Args:
            num_minibatches: per epoch; their sizes differ by at most one.
            num_epochs: passes over the rollout; each has a permutation of all N * T samples of its own.
            shuffle: "full", or "none" for the samples in order (n * T + t).
            normalize_advantages: True: (A - mean) / (std + 1e-8) over the rollout's valid samples, from the statistics
                of :meth:`compute_gae`, applied while gathering; "minibatch": over each minibatch (SB3, CleanRL), which
                takes further launches; False: not at all.
            drop_last: make all sizes equal: the permutation's last N * T % num_minibatches samples are left out.
            reuse: hand out the same tensors each time, for CUDA graphs: each minibatch overwrites the one before. With
                ``lazy``, only the last minibatch that this buffer handed out can be read; an older one of the same size
                raises RuntimeError.
            lazy: gather a minibatch when one of its tensors is first read. The fused learner reads the ring itself and
                never gathers. Raises RuntimeError at that read if the rollout or its advantages have changed. ``len``,
                ``repr`` and ``indices`` gather nothing. On the CPU and CUDA only; ignored with "minibatch". One
                drawn in a captured graph is read there.

        Yields:
            :class:`Minibatch`.

        Raises:
            RuntimeError: before :meth:`compute_gae` or :meth:`compute_vtrace`, or after :meth:`clear`,
                :meth:`load_state_dict` or an :meth:`advance` that discards, while iterating.
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
        self._scan.require("minibatches")
        subset = self._valid_samples()
        samples = self.num_envs * self.num_steps if subset is None else subset.shape[0]
        if samples == 0:
            raise ValueError("minibatches: expected valid samples in the rollout, none is")
        if count > samples:
            raise ValueError(f"num_minibatches: expected at most one per sample, {samples}, got {count}")
        plan = Plan(samples, count, shuffle == "full", normalize, drop_last, reuse, subset)
        lazy = lazy and self.device.type in ("cpu", "cuda") and normalize != "minibatch"
        return self._draws.iterate(plan, epochs, lazy, self._ring.discards)

    def sequences(
        self,
        hidden: Mapping[str, str | Tensor] | None = None,
        burn_in: int | Tensor = 0,
        num_minibatches: int = 1,
        num_epochs: int = 1,
        normalize_advantages: bool = True,
    ) -> Iterator[Sequences]:
        """The oldest rollout as padded trajectories, for recurrent policies: minibatches of whole environments.

        Args:
            hidden: the recurrent states *before* each step, by name: the name of one of the constructor's fields, or a
                tensor [N, T, ...]. Each trajectory gets the state of its first step.
            burn_in: where a trajectory begins with the rollout, its first ``burn_in`` steps renew the hidden state and
                are left out of ``learn``; one number, or [N]: 0 where an episode begins there.
            num_minibatches: per epoch; their numbers of environments differ by at most one.
            num_epochs: passes over the rollout; each has its own order of environments.
            normalize_advantages: as in :meth:`minibatches`.

        Yields:
            :class:`~pydrone.rollout.sequences.Sequences`; its ``fields`` hold actions, values, log_probs, advantages,
            returns and the constructor's. Plain PyTorch, one host sync a minibatch.
        """
        count, epochs = positive("num_minibatches", num_minibatches), positive("num_epochs", num_epochs)
        if isinstance(burn_in, Tensor):
            burn_in = self._steps.sources.scalar("burn_in", burn_in, False).flatten()
        elif isinstance(burn_in, bool) or not isinstance(burn_in, int) or burn_in < 0:
            raise ValueError(f"burn_in: expected an int of at least 0, got {burn_in!r}")
        if count > self.num_envs:
            raise ValueError(f"num_minibatches: expected at most one per environment, {self.num_envs}, got {count}")
        boolean("normalize_advantages", normalize_advantages)
        self._scan.require("sequences")
        states = hidden_states(self, self._steps.sources, hidden)
        return draw(self, self._draws, states, burn_in, count, epochs, normalize_advantages)

    def _valid_samples(self) -> Tensor | None:
        """The valid samples, by number n * T + t; None if all are. One host sync a rollout."""
        if self._subset is None and (valid := self.valid) is not None:
            self._subset = valid.flatten().nonzero().squeeze(1)
        return self._subset

    def clear(self) -> None:
        """Discards the oldest full rollout; if none is full, rewinds to the start of the one being collected.

        A step that was begun is dropped.
        """
        storage, ring = self._storage, self._ring
        place, truncations = ring.place, ring.has_truncations
        self._steps.begun = None
        ring.discard()
        if storage.pool and truncations:
            storage.pool_count[place].zero_()
        if self._report.policy != "ignore":  # of the next rollout there
            storage.not_finite[place].zero_()
        self._scan.pool_valued = False
        self._forget()

    def advance(self, steps: int, rollouts: int = 0) -> None:
        """Tells the host what a captured graph is about to do: ``steps`` appends, ``rollouts`` calls of clear().

        Call it before each replay. Raises BufferFull, and changes nothing, if the appends would overwrite a rollout
        that has not been discarded.
        """
        self._steps.require_idle("advance")
        self._ring.advance(steps, rollouts)
        self._scan.replayed()
        if rollouts:
            self._forget()

    def _forget(self) -> None:
        """The oldest rollout is another one."""
        self._scan.computed, self._subset, self._draws.epoch = False, None, 0

    def flags(self) -> Tensor:
        """float64 [5] on the device, for :meth:`check`: read it together with other figures, in one host sync.

        In turn: whether a captured append found the ring full; of the oldest rollout, if :meth:`compute_gae` used its
        pool, the number of final observations and of truncations without one; whether an observation is NaN or
        infinite; a number that is NaN or infinite if an advantage is.
        """
        return self._scan.flags(look=self._report.policy != "ignore")

    def check(self, flags: Sequence[float] | None = None) -> None:
        """Raises or warns where :meth:`flags` show a fault; None reads them, one host sync. Comes before :meth:`clear`.

        Raises:
            BufferFull: a captured append found the ring full and wrote nothing.
            RuntimeError: as :meth:`compute_gae`.
            FloatingPointError: :meth:`non_finite` finds something; with ``non_finite="warn"`` a RuntimeWarning, once a
                rollout.
        """
        full, used, missing, observed, advantages = self.flags().tolist() if flags is None else flags
        if full:
            raise BufferFull(
                "a captured append found the ring full; nothing was written: call advance() before replays"
            )
        self._scan.check_pool(int(used), int(missing))
        self._check_finite(observed, advantages, 3)

    def non_finite(self) -> list[NonFinite]:
        """The NaN and infinite numbers of the oldest rollout: observations by group, actions, values, rewards; earliest
        step first.

        If all of these are finite, the advantages: then ``last_values``, a final value, a log-ratio or an overflow is
        the cause.
        Invalid steps (``valid`` 0) do not count, except where their value is the next one of a step that has not
        terminated.
        Plain PyTorch over the whole rollout, with host syncs: :meth:`compute_gae` and :meth:`check` call it only where
        a launch has found something.
        """
        return finiteness.of_rollout(self)

    def _check_finite(self, observed: float, advantages: float, level: int) -> None:
        """Acts on two of :meth:`flags`; ``level`` of a warning's caller."""
        flag = self._storage.not_finite[self._ring.place]
        self._report(self._ring.rollout, observed, advantages, self.non_finite, flag, level)

    @contextlib.contextmanager
    def as_captured(self) -> Iterator[None]:
        """Calls within it follow the device's counters, as those in a captured graph do, but run at once.

        Use it before a capture, to load the kernels that the capture needs. Call :meth:`advance` first, as before a
        replay.
        """
        with self._ring.as_captured():
            yield

    def to(self, device: torch.device | str) -> RolloutBuffer:
        """This buffer if it lies on ``device``, else a new one there with the same contents."""
        device = device_of(device)
        if device == self.device:
            return self
        backend = self._backend if self._backend == "reference" else None
        options = {"seed": self._seed, "rank": self._rank, "backend": backend, "non_finite": self._report.policy}
        moved = type(self)(**self._arguments, device=device, **options)
        moved.load_state_dict(self.state_dict())
        return moved

    def __reduce__(self) -> tuple:
        arguments = (self._arguments, str(self.device), self._seed, self._rank, self._backend, self._report.policy)
        return _rebuild, (type(self), arguments, self.state_dict())

    def state_dict(self) -> dict[str, object]:
        """All that :meth:`load_state_dict` needs to continue from here, to the bit; tensors are not copied."""
        self._steps.require_idle("state_dict")
        ring, tensors = self._ring, self._storage.tensors
        state: dict[str, object] = {f"memory.{name}": x for name, x in tensors.items() if name not in states.TRANSIENT}
        state |= {"appended": ring.appended, "discarded": ring.discarded, "computed": self._scan.computed}
        state |= {"epoch": self._draws.epoch, "seed": self._seed, "method": self._scan.method}
        layout = [(x.name, tuple(x.shape), str(x.dtype), x.offset) for x in self.layout.fields.values()]
        flags = {"truncations": list(ring.truncations), "resets": list(ring.resets)}
        return state | flags | {"layout": [self.num_steps, *layout]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Loads the state of a buffer constructed with the same sizes, on any device.

        Raises ValueError, and changes nothing, where a size or a key differs.
        """
        own = self.state_dict()
        states.check(state, own, self.num_steps, self.capacity)
        self._ring.restore(state["appended"], state["discarded"], state["truncations"], state["resets"])
        for name, x in own.items():
            if isinstance(x, Tensor):
                x.copy_(state[name])
        self._scan.computed, self._subset = state["computed"], None
        self._scan.method = state.get("method", "compute_gae")
        self._seed, self._draws.epoch = state["seed"], state["epoch"]
        self._draws.key = mix_seed(self._seed, self._rank)
        self._steps.begun = None
        self._report.forget()
        self._storage.not_finite.fill_(1)  # the launches' findings are not saved: look once


def _rebuild(kind: type[RolloutBuffer], arguments: tuple, state: dict[str, object]) -> RolloutBuffer:
    """A pickled or copied buffer."""
    sizes, device, seed, rank, backend, non_finite = arguments
    made = kind(**sizes, device=device, seed=seed, rank=rank, backend=backend, non_finite=non_finite)
    made.load_state_dict(state)
    return made
