"""Code written without a package: torch loops, copies, ``index_select``; and a memcpy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from measurement import Absent, Kernels, Run
from torch import Tensor
from workload import GAMMA, LAM, NUM_EPOCHS, NUM_MINIBATCHES, Rollout, Size, Truth

from . import epoch_run


def _gae_outputs(out: tuple[Tensor, Tensor], moments: list[Tensor]) -> dict[str, Tensor]:
    return {"advantages": out[0], "returns": out[1], "std": moments[0], "mean": moments[1]}


def gae_loop(rollout: Rollout) -> Run:
    """A loop of tensor operations over T steps, on [T, N]; then returns, mean and standard deviation."""
    rewards, values, dones = rollout.rewards, rollout.values, rollout.dones
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    moments: list[Tensor] = []

    def call() -> None:
        running = 1.0 - dones.float()
        carry, next_values = torch.zeros_like(rollout.last_values), rollout.last_values
        for t in reversed(range(rewards.shape[0])):
            delta = rewards[t] + GAMMA * next_values * running[t] - values[t]
            carry = delta + GAMMA * LAM * running[t] * carry
            advantages[t] = carry
            next_values = values[t]
        torch.add(advantages, values, out=returns)
        moments[:] = torch.std_mean(advantages)

    return Run(call, lambda: _gae_outputs((advantages, returns), moments))


# Divides every T of the benchmarks. A loop over 100 steps takes half a minute to compile, and on a CPU the code
# recomputes every step from the end: 100 times slower.
UNROLLED = 4


def _steps(carry, rewards, values, dones, next_values, advantages, returns):  # type: ignore[no-untyped-def]
    for t in range(UNROLLED - 1, -1, -1):
        running = 1.0 - dones[t].float()
        carry = rewards[t] + GAMMA * next_values * running - values[t] + GAMMA * LAM * running * carry
        advantages[t].copy_(carry)
        returns[t].copy_(carry + values[t])
        next_values = values[t]
    return carry


_compiled = torch.compile(_steps)


def gae_compiled(rollout: Rollout) -> Run:
    """``torch.compile`` of 4 unrolled steps with the returns, called T / 4 times; then mean and standard deviation.

    Its input views are made beforehand, since the storage stays. Sizes after the first share a kernel of dynamic shape,
    torch.compile's default.
    """
    rewards, values, dones = rollout.rewards, rollout.values, rollout.dones
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    if rollout.num_steps % UNROLLED:
        raise Absent(f"is written for multiples of {UNROLLED} steps")
    slices = [slice(t, t + UNROLLED) for t in reversed(range(0, rollout.num_steps, UNROLLED))]
    following = [rollout.last_values, *(values[s.start] for s in slices)]
    blocks = [(rewards[s], values[s], dones[s], x, advantages[s], returns[s]) for s, x in zip(slices, following)]
    moments: list[Tensor] = []

    def call() -> None:
        carry = torch.zeros_like(rollout.last_values)
        for block in blocks:
            carry = _compiled(carry, *block)
        moments[:] = torch.std_mean(advantages)

    try:
        call()
    except Exception as error:
        raise Absent(f"torch.compile failed: {str(error).splitlines()[0]}") from None
    # One fused kernel for each block, and the two moments.
    return Run(call, lambda: _gae_outputs((advantages, returns), moments), launches=lambda: len(slices) + 2)


def append_copies(rollout: Rollout, policy: bool = True) -> Run:
    """A ``copy_`` for each field and step into preallocated [T, N, ...] tensors."""
    steps = [rollout.step(t, policy) for t in range(rollout.num_steps)]
    storage = {name: torch.zeros(len(steps), *x.shape, dtype=x.dtype, device=x.device) for name, x in steps[0].items()}

    def call() -> None:
        for t, step in enumerate(steps):
            for name, x in step.items():
                storage[name][t].copy_(x)

    return Run(call, lambda: storage)


def epoch_index_select(rollout: Rollout) -> Run:
    """One ``randperm``, and for each field and minibatch an ``index_select(out=)`` into reused tensors."""
    truth, total = Truth(rollout), rollout.size.samples
    names = ("obs", "actions", "values", "log_probs", "mu", "sigma")
    fields = {name: getattr(rollout, name).flatten(0, 1) for name in names}
    fields |= {name: getattr(truth, name).float().flatten() for name in ("normalized", "returns")}
    size = total // NUM_MINIBATCHES
    out = {name: x.new_empty(size, *x.shape[1:]) for name, x in fields.items()}

    def batches() -> Iterator[dict[str, Tensor]]:
        indices = torch.randperm(total, device=rollout.device)
        for i in range(NUM_MINIBATCHES):
            chosen = indices[i * size : (i + 1) * size]
            for name, x in fields.items():
                torch.index_select(x, 0, chosen, out=out[name])
            yield out

    return epoch_run(batches, dict)


def iteration(rollout: Rollout) -> Run:
    """``append_copies``, ``gae_loop`` on its storage, one ``randperm`` for all epochs, and indexing field by field."""
    stored, append = rollout.clone(), append_copies(rollout)
    storage = append.outputs()
    for name, x in storage.items():
        setattr(stored, name, x)
    gae = gae_loop(stored)
    fields = [x.flatten(0, 1) for name, x in storage.items() if name not in ("rewards", "dones")]

    def call() -> None:
        append.call()
        gae.call()
        found = gae.outputs()
        normalized = (found["advantages"] - found["mean"]) / (found["std"] + 1e-8)
        flat = [*fields, normalized.flatten(), found["returns"].flatten()]
        indices = torch.randperm(rollout.size.samples, device=rollout.device)
        for _ in range(NUM_EPOCHS):
            for part in indices.tensor_split(NUM_MINIBATCHES):
                for x in flat:
                    x[part]

    return Run(call, lambda: {**storage, **gae.outputs()})


def small_copies(rollout: Rollout) -> Run:
    """``copy_`` of a tensor [N], once for each step."""
    copied = torch.empty_like(rollout.last_values)

    def call() -> None:
        for _ in range(rollout.num_steps):
            copied.copy_(rollout.last_values)

    def outputs() -> dict[str, Tensor]:
        assert torch.equal(copied, rollout.last_values), "the copy differs"
        return {"rewards": rollout.rewards}

    return Run(call, outputs)


def memcpy(bytes_per_sample: int, times: int = 1, parts: Callable[[Size], int] | None = None) -> Callable:
    """``copy_`` that reads plus writes ``bytes_per_sample`` for each sample, in ``times`` passes over the same memory.

    ``parts``: the number of pieces. Each is one kernel: one piece is timed hot, all in turn cold.
    """

    def prepare(rollout: Rollout) -> Run:
        count = 1 if parts is None else parts(rollout.size)
        numbers = torch.arange(rollout.size.samples * bytes_per_sample // 16 // times, device=rollout.device)
        copied = torch.zeros_like(numbers)
        pairs = list(zip(copied.tensor_split(count), numbers.tensor_split(count)))
        each = [partial(target.copy_, source) for target, source in pairs]

        def call() -> None:
            for _ in range(times):
                for copy in each:
                    copy()

        def outputs() -> dict[str, Tensor]:
            assert torch.equal(numbers, copied), "the copy differs"
            return {"rewards": rollout.rewards} if hasattr(rollout, "rewards") else {"figures": {}}

        return Run(call, outputs, kernels=Kernels(each[:1], each, lambda truth: None) if count > 1 else None)

    return prepare
