"""GAE or V-trace of a buffer's oldest rollout, in one launch, and the state of its results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pydrone.estimators import pick_bootstrap
from pydrone.ops.arguments import at_least_0, boolean, check_real, env_scalars, overlap, unit_interval
from pydrone.ops.dispatch import bump
from pydrone.ops.schema import BOOTSTRAP, CURSOR_DISCARDED, CURSOR_FLAG
from pydrone.rollout.ring import Ring
from pydrone.rollout.sources import Sources
from pydrone.rollout.storage import Storage


class Scan:
    """Computes advantages, returns and statistics of the oldest rollout.

    Attributes:
        computed: whether the oldest rollout has advantages.
        method: which method computed them. After compute_vtrace the returns are no sums of advantages and values.
        runs: how often advantages were computed: minibatches drawn before the last time must not be gathered.
        pool_valued: whether they used values of the pool of final observations.
        captured_method: which method a captured call was of, None without one: every replay is of it.
        captured_pool_valued: whether a captured call used the pool's values: then every replay does.
    """

    def __init__(self, storage: Storage, ring: Ring, sources: Sources) -> None:
        self._storage, self._ring, self._sources = storage, ring, sources
        self.computed = self.pool_valued = self.captured_pool_valued = False
        self.method = "compute_gae"
        self.captured_method: str | None = None
        self.runs = 0
        self._strict = True  # whether a truncation that is not in the pool is an error

    def require(self, name: str) -> None:
        """Raises RuntimeError, naming the call ``name``, if the oldest rollout has no advantages."""
        if not self.computed and not (self.captured_method and len(self._ring) >= self._ring.num_steps):
            raise RuntimeError(f"{name}: expected compute_gae() before it")

    @property
    def targets(self) -> Tensor | None:
        """[N, T], what minibatches have as returns; None: advantages + values."""
        return None if self.method == "compute_gae" else self._storage.returns

    def run(
        self,
        check: bool,
        name: str,
        last_values: Tensor,
        gamma: float,
        lam: float,
        bootstrap: tuple,
        log_rhos: str | Tensor | None = None,
        clips: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """The method ``name`` of :class:`pydrone.buffer.RolloutBuffer`, without the check for NaN and infinite numbers:
        compute_gae, or compute_vtrace with ``log_rhos`` and ``clips``.

        bootstrap: their final_values, value_fn, timeout_bootstrap and without_final_obs.
        """
        final_values, value_fn, timeout_bootstrap, without_final_obs = bootstrap
        storage, ring, captured = self._storage, self._ring, self._ring.capturing()
        if len(ring) < ring.num_steps and not captured:
            raise RuntimeError(f"{name}: expected a rollout of {ring.num_steps} steps, {len(ring)} are stored")
        gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)
        operation, inputs, factors = storage.ops.gae, (), (gamma, lam)
        if name == "compute_vtrace":
            factors += tuple(at_least_0(x, clip) for x, clip in zip(("rho_clip", "c_clip"), clips, strict=True))
            log_rhos = self._ratios(log_rhos)
            operation, inputs = storage.ops.off_policy, (log_rhos, None)
        boolean("check", check)
        simple = name == "compute_gae" and final_values is value_fn is None and without_final_obs == "error"
        if simple and self._usual(last_values, factors, timeout_bootstrap, captured):
            return
        if isinstance(last_values, Tensor):
            last_values = last_values.detach()
        last_values = env_scalars("last_values", last_values, storage.layout.num_envs, storage.device)
        if value_fn is not None and not callable(value_fn):
            raise TypeError(f"value_fn: expected a function of observations, got {type(value_fn).__name__}")
        if without_final_obs not in ("error", "stored_value"):
            raise ValueError(f"without_final_obs: expected 'error' or 'stored_value', got {without_final_obs!r}")
        self._strict = without_final_obs == "error"
        truncations = ring.has_truncations
        bootstrap = pick_bootstrap(
            truncations, final_values=final_values, value_fn=value_fn, timeout_bootstrap=timeout_bootstrap
        )
        if final_values is not None:
            final_values = self._in_ring("final_values", final_values)
        final_rows, self.pool_valued = None, truncations and value_fn is not None
        self.captured_pool_valued |= captured and self.pool_valued
        if not truncations:
            bootstrap, final_values = 0, None
        elif value_fn is not None:
            final_values, final_rows = self._evaluate(value_fn, check), storage.final_rows
            if not self._strict:
                final_values, final_rows = self._or_stored(final_values), None
        for argument, x in (("last_values", last_values), ("final_values", final_values), ("log_rhos", log_rhos)):
            if x is not None and (overlap(x, storage.advantages) or overlap(x, storage.returns)):
                where = "this buffer's advantages or returns"
                raise ValueError(f"{argument}: expected memory of its own, got some of {where}")
        ends = last_values, final_values, final_rows
        self._launch(name, operation, ends, (*inputs, *factors), bootstrap, captured)

    def _usual(
        self, last_values: Tensor, factors: tuple[float, float], timeout_bootstrap: str | None, captured: bool
    ) -> bool:
        """The fast path of compute_gae: skips the checks that the operation makes itself. False, with nothing written,
        where anything is unusual: then Python's checks name the fault."""
        ops, truncations = self._storage.ops.unchecked, self._ring.has_truncations
        if ops is None or type(last_values) is not Tensor or last_values.requires_grad or last_values.is_neg():
            return False
        bootstraps = (None, "stored_value", "next_value")[truncations:]
        if forward_ad._current_level >= 0 or timeout_bootstrap not in bootstraps:
            return False
        try:
            bootstrap = BOOTSTRAP[timeout_bootstrap] if truncations else 0
            self._launch("compute_gae", ops.gae, (last_values, None, None), factors, bootstrap, captured)
        except (RuntimeError, TypeError):
            return False
        self._strict, self.pool_valued = True, False
        return True

    def _launch(
        self,
        name: str,
        operation: Callable[..., None],
        ends: tuple[Tensor, Tensor | None, Tensor | None],
        others: tuple,
        bootstrap: int,
        captured: bool,
    ) -> None:
        """``ends``: last_values, final_values, final_rows.  ``others``: the arguments between these and ``start``."""
        storage, ring = self._storage, self._ring
        outputs = storage.advantages, storage.returns, storage.statistics
        operation(
            storage.rewards,
            storage.values,
            storage.codes,
            None,
            None,
            *ends,
            *others,
            ring.start,
            True,
            bootstrap,
            ring.cursor if captured else None,
            *outputs,
            storage.tensors["workspace"],
        )
        bump([*outputs])
        if captured:
            self.captured_method = name
        self.computed, self.runs, self.method = True, self.runs + 1, name

    def replayed(self) -> None:
        """A captured graph is about to run: if it computes advantages, then as it was captured."""
        self.method = self.captured_method or self.method

    def _evaluate(self, value_fn: Callable, check: bool) -> Tensor:
        """The values of the rollout's pool of final observations: of the rows in use, or of all if not known."""
        storage, ring, used = self._storage, self._ring, None
        if not storage.pool:
            raise ValueError(
                "value_fn: this buffer has no pool of final observations; construct it with final_obs_rows"
            )
        if ring.capturing():
            if ring.num_rollouts > 1:
                raise RuntimeError(
                    "value_fn: in a captured graph it needs a ring of one rollout, capacity == num_steps"
                )
        elif check or storage.device.type == "cpu":
            used, missing = storage.pool_count[ring.place].tolist()
            self.check_pool(used, missing)
        room = storage.layout.final_obs_rows
        rows = room if used is None else min(used, room)
        if rows == 0:
            return torch.empty(0, device=storage.device)
        with torch.no_grad():
            values = value_fn(storage.final_observations(ring.place, rows))
        return env_scalars("value_fn's result", values, rows, storage.device)

    def _or_stored(self, values: Tensor) -> Tensor:
        """``values`` of the pool at their steps, [N, C], and the stored values at steps that are not in it."""
        rows, stored = self._storage.final_rows, self._storage.values
        if not len(values):
            return stored
        return torch.where((rows >= 0) & (rows < len(values)), values[rows.clamp(0, len(values) - 1)], stored)

    def _ratios(self, log_rhos: str | Tensor) -> Tensor:
        """Log-ratios at the ring's slots, [N, C]: a field, or a rollout's tensor."""
        if not isinstance(log_rhos, str):
            return self._in_ring("log_rhos", log_rhos)
        layout, fields = self._storage.layout, self._storage.views
        scalars = [x for x in layout.extra if fields[x].is_floating_point() and fields[x].shape[2:].numel() == 1]
        if log_rhos not in scalars:
            names = ", ".join(scalars) or "none"
            raise ValueError(f"log_rhos: expected a field of one float, one of {names}; got {log_rhos!r}")
        return fields[log_rhos].flatten(1).t()

    def _in_ring(self, name: str, x: Tensor) -> Tensor:
        """The rollout's argument [N, T], placed at the ring's slots: [N, C]."""
        storage, ring = self._storage, self._ring
        self._sources.check(name, x)
        check_real(name, x, floating=True)
        expected = [storage.layout.num_envs, ring.num_steps]
        if list(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")
        if ring.capacity == ring.num_steps:
            return x.detach()
        start = ring.cursor[CURSOR_DISCARDED] if ring.capturing() else ring.discarded
        slots = (torch.arange(ring.num_steps, device=storage.device) + start) % ring.capacity
        return x.new_zeros(expected[0], ring.capacity).index_copy_(1, slots, x.detach())

    def flags(self, look: bool) -> Tensor:
        """As :meth:`pydrone.buffer.RolloutBuffer.flags`; ``look``: whether to check for NaN and infinite numbers."""
        storage, place = self._storage, self._ring.place
        full = storage.cursor[CURSOR_FLAG : CURSOR_FLAG + 1].double()
        if not storage.pool or not (self.pool_valued or self.captured_pool_valued):
            pool = full.new_zeros(2)
        else:
            pool = storage.pool_count[place].double()
        if not look:
            return torch.cat((full, pool, full.new_zeros(2)))
        observed = storage.not_finite[place : place + 1].double()
        mean, m2 = storage.statistics[1:2], storage.statistics[2:]
        known = self.computed or self.captured_method
        return torch.cat((full, pool, observed, mean + m2 if known else full.new_zeros(1)))

    def check_pool(self, used: int, missing: int) -> None:
        """Raises RuntimeError if truncations came without a final observation, or the pool had no room for them.

        Not where the last run was asked to do without.
        """
        if not self._strict:
            return
        if missing:
            raise RuntimeError(
                f"final_obs: {missing} truncations of this rollout came without a final observation: "
                "pass final_obs with truncated, or timeout_bootstrap to compute_gae or compute_vtrace"
            )
        room = self._storage.layout.final_obs_rows
        if used > room:
            raise RuntimeError(
                f"final_obs: {used} truncations in this rollout, the pool has room for {room}: "
                "construct the buffer with a larger final_obs_rows, call grow_final_obs() before the rollout, or pass "
                "without_final_obs='stored_value'"
            )
