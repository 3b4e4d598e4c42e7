"""pydrone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from measurement import Graphed, Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_ACTIONS, NUM_EPOCHS, NUM_MINIBATCHES, NUM_OBS, Rollout

import pydrone
from pydrone.buffer import RolloutBuffer

from . import Lap, epoch_run, exhaust


def buffer(rollout: Rollout, policy: bool = True, **options: Any) -> RolloutBuffer:
    """A buffer with the policy's mean and std, as in rsl_rl and rl_games, or without. ``options``: the buffer's."""
    fields = {"mu": NUM_ACTIONS, "sigma": NUM_ACTIONS} if policy else None
    return RolloutBuffer(
        rollout.num_envs,
        rollout.num_steps,
        obs=NUM_OBS,
        actions=NUM_ACTIONS,
        device=rollout.device,
        fields=fields,
        final_obs_rows=0,
        **options,
    )


def fill(buf: RolloutBuffer, rollout: Rollout, policy: bool = True) -> None:
    for t in range(rollout.num_steps):
        buf.append(**rollout.step(t, policy))


def filled(rollout: Rollout, policy: bool = True, **options: Any) -> RolloutBuffer:
    buf = buffer(rollout, policy, **options)
    fill(buf, rollout, policy)
    buf.compute_gae(rollout.last_values, GAMMA, LAM)
    return buf


def moments(statistics: Tensor) -> dict[str, Tensor]:
    count, mean, m2 = statistics.unbind()
    return {"mean": mean, "std": (m2 / (count - 1)).sqrt()}


def gae_steps(rollout: Rollout, backend: str | None = None) -> Run:
    """``pydrone.gae(out=, stats=True)`` on the caller's [T, N] tensors: advantages, returns, statistics."""
    out = rollout.rewards.new_empty(2, *rollout.rewards.shape).unbind()
    results: list[Tensor] = []

    def call() -> None:
        results[:] = pydrone.gae(
            rollout.rewards,
            rollout.values,
            rollout.dones,
            rollout.last_values,
            GAMMA,
            LAM,
            time_dim=0,
            out=out,
            stats=True,
            backend=backend,
        )

    return Run(call, lambda: {"advantages": results[0], "returns": results[1], **moments(results[2])})


def vtrace_steps(rollout: Rollout, backend: str | None = None) -> Run:
    """``pydrone.vtrace(out=, stats=True)`` on the caller's [T, N] tensors, all ratios one: its targets."""
    out = rollout.rewards.new_empty(2, *rollout.rewards.shape).unbind()
    given = rollout.rewards, rollout.values, rollout.dones, rollout.last_values, torch.zeros_like(rollout.rewards)
    how = {"time_dim": 0, "out": out, "stats": True, "backend": backend}
    return Run(lambda: pydrone.vtrace(*given, GAMMA, LAM, **how), lambda: {"returns": out[0]})


def retrace_steps(rollout: Rollout, backend: str | None = None) -> Run:
    """``pydrone.retrace(out=)`` likewise, with V for Q: its targets."""
    out = torch.empty_like(rollout.rewards)
    q_values, ratios = rollout.values.clone(), torch.zeros_like(rollout.rewards)
    given = rollout.rewards, q_values, rollout.values, rollout.dones, rollout.last_values, ratios
    how = {"time_dim": 0, "out": out, "backend": backend}
    return Run(lambda: pydrone.retrace(*given, GAMMA, LAM, **how), lambda: {"returns": out})


def gae_rows(rollout: Rollout, backend: str | None = None) -> Run:
    """The same on contiguous [N, T] tensors."""
    rewards, values, dones = (x.t().contiguous() for x in (rollout.rewards, rollout.values, rollout.dones))
    out = rewards.new_empty(2, *rewards.shape).unbind()
    results: list[Tensor] = []

    def call() -> None:
        results[:] = pydrone.gae(
            rewards, values, dones, rollout.last_values, GAMMA, LAM, out=out, stats=True, backend=backend
        )

    return Run(call, lambda: {"advantages": results[0].t(), "returns": results[1].t(), **moments(results[2])})


def scan_buffer(rollout: Rollout, backend: str | None = None) -> RolloutBuffer:
    """A buffer filled with what GAE reads. Observations have one number: GAE does not read them."""
    sizes = {"num_envs": rollout.num_envs, "num_steps": rollout.num_steps, "obs": 1, "actions": 1}
    buf = RolloutBuffer(**sizes, device=rollout.device, final_obs_rows=0, backend=backend)
    for t in range(rollout.num_steps):
        x = rollout.values[t]
        buf.append(
            obs=x[:, None],
            actions=x[:, None],
            rewards=rollout.rewards[t],
            dones=rollout.dones[t],
            values=x,
            log_probs=x,
        )

    return buf


def gae(rollout: Rollout, backend: str | None = None) -> Run:
    """``RolloutBuffer.compute_gae`` in the buffer's own memory."""
    buf = scan_buffer(rollout, backend)
    return Run(lambda: buf.compute_gae(rollout.last_values, GAMMA, LAM), lambda: scanned(buf))


def scanned(buf: RolloutBuffer) -> dict[str, Tensor]:
    """The results of ``compute_gae``, for ``Truth.check``."""
    return {"advantages": buf.advantages.t(), "returns": buf.returns.t(), **moments(buf.statistics)}


def append(rollout: Rollout, policy: bool = True, **options: Any) -> Run:
    """``clear`` and T times ``append``."""
    buf = buffer(rollout, policy, **options)
    steps = [rollout.step(t, policy) for t in range(rollout.num_steps)]

    def call() -> None:
        buf.clear()
        for step in steps:
            buf.append(**step)

    return Run(call, lambda: stored(buf, steps[0]))


def stored(buf: RolloutBuffer, names: Iterable[str]) -> dict[str, Tensor]:
    found = {name: getattr(buf, name) for name in ("obs", "rewards", "dones")}
    found |= {name: buf[name] for name in names if name not in found}
    return {name: x.transpose(0, 1) for name, x in found.items()}


def append_split(rollout: Rollout, **options: Any) -> Run:
    """``clear`` and T times ``begin`` and ``end``, as for an environment that overwrites its observations."""
    buf = buffer(rollout, **options)
    ends = ("rewards", "dones")
    steps = [rollout.step(t) for t in range(rollout.num_steps)]
    halves = [[{k: x for k, x in step.items() if (k in ends) == end} for end in (False, True)] for step in steps]

    def call() -> None:
        buf.clear()
        for first, second in halves:
            buf.begin(**first)
            buf.end(**second)

    return Run(call, lambda: stored(buf, steps[0]))


def _each_step(run: Run, rollout: Rollout) -> Run:
    """``run``'s call once for each step."""

    def call() -> None:
        for _ in range(rollout.num_steps):
            run.call()

    return Run(call, run.outputs)


def gae_calls(rollout: Rollout, backend: str | None = None) -> Run:
    """``compute_gae``, once for each step."""
    return _each_step(gae(rollout, backend), rollout)


def gae_out_calls(rollout: Rollout, backend: str | None = None) -> Run:
    """``pydrone.gae(out=, stats=True)``, once for each step."""
    return _each_step(gae_rows(rollout, backend), rollout)


def minibatch_calls(rollout: Rollout, backend: str | None = None) -> Run:
    """One epoch with a minibatch for each step, in the same tensors."""
    buf = filled(rollout, backend=backend)
    return epoch_run(lambda: buf.minibatches(rollout.num_steps, reuse=True), policy_fields)


def _fields(mb) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    names = ("actions", "values", "log_probs", "returns")
    return {"obs": mb.obs, "normalized": mb.advantages, **{name: getattr(mb, name) for name in names}}


def policy_fields(mb) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    return {**_fields(mb), "mu": mb["mu"], "sigma": mb["sigma"]}


def epoch(rollout: Rollout, policy: bool = True, reuse: bool = False, **options: Any) -> Run:
    """One epoch of ``minibatches``, with a permutation of its own; the gather normalises advantages.

    ``reuse=False``: new tensors for every minibatch, as from all peers. ``reuse=True``: the same ones each time.
    """
    buf = filled(rollout, policy, **options)
    return epoch_run(lambda: buf.minibatches(NUM_MINIBATCHES, reuse=reuse), policy_fields if policy else _fields)


def iteration(rollout: Rollout, policy: bool = True, **options: Any) -> Run:
    """T times ``append``, ``compute_gae``, all epochs of ``minibatches(reuse=True)``, as in ``pydrone train``."""
    buf = buffer(rollout, policy, **options)
    steps, lap = [rollout.step(t, policy) for t in range(rollout.num_steps)], Lap(rollout.device)
    fields = policy_fields if policy else _fields

    def learn() -> None:
        for step in steps:
            buf.append(**step)
        with lap:
            buf.compute_gae(rollout.last_values, GAMMA, LAM)
        exhaust(buf.minibatches(NUM_MINIBATCHES, NUM_EPOCHS, reuse=True))

    def call() -> None:
        buf.clear()
        learn()

    def advance() -> None:
        if len(buf):
            buf.clear()
        buf.advance(rollout.num_steps, rollouts=1)

    def captured() -> None:
        with buf.as_captured():
            learn()
            buf.clear()

    last = epoch_run(lambda: buf.minibatches(NUM_MINIBATCHES), fields)
    return Run(call, last.outputs, lap.seconds, graph=Graphed(captured, advance, buf.check))
