"""CUDA graphs: append, GAE and minibatches, captured once and replayed for many rollouts, equal an eager buffer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rollout_model import assert_close, memory_bytes, random_step
from torch.profiler import ProfilerActivity, profile

import pydrone
from pydrone import BufferFull, RolloutBuffer

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

N, T, ROLLOUTS = 300, 12, 5
GAMMA, LAM = 0.97, 0.9


def make(backend: str | None, device: str, **options) -> RolloutBuffer:
    options = {"obs": {"state": 17, "camera": ((2, 5), torch.uint8)}, "actions": 4, "fields": {"mu": 4}} | options
    return RolloutBuffer(N, T, device=device, backend=backend, seed=3, **options)


def captured(buf: RolloutBuffer, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Captures twice: a kernel's first launch loads modules, which a capture in the default mode does not allow."""
    for mode in ("relaxed", "global"):
        buf.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode=mode):
            run()
    return graph


def refill(inputs: dict, step: dict) -> None:
    """Copies new numbers into a graph's input tensors."""
    for name, x in inputs.items():
        if isinstance(x, dict):
            refill(x, step[name])
        else:
            x.copy_(step[name])


def on_cpu(step: dict) -> dict:
    return {name: on_cpu(x) if isinstance(x, dict) else x.cpu() for name, x in step.items()}


def epochs(buf: RolloutBuffer) -> list[dict[str, torch.Tensor]]:
    """Copies of all minibatches of two epochs."""
    copies = []
    for mb in buf.minibatches(3, num_epochs=2, reuse=True):
        names = ("actions", "values", "log_probs", "advantages", "returns", "mu")
        copies.append({name: mb[name].clone() for name in names} | {k: x.clone() for k, x in mb.obs.items()})
        copies[-1]["indices"] = mb.indices
    return copies


def late_step(buf: RolloutBuffer) -> dict:
    step = random_step(buf)
    return step | {"truncated": step["dones"] & (torch.rand(N) < 0.5), "final_obs": random_step(buf)["obs"]}


def value_fn(obs: dict[str, torch.Tensor]) -> torch.Tensor:
    return obs["state"].sum(1) + obs["camera"].float().sum((1, 2))


# Final observations and clear() in a graph need a ring of one rollout.
@pytest.mark.parametrize(
    ("capacity", "late", "clears"),
    [*((T, late, clears) for late in (False, True) for clears in (False, True))]
    + [(capacity, False, False) for capacity in (T + 5, 2 * T, 3 * T - 4)],
)
def test_a_rollout_replayed_is_a_rollout_run(capacity, late, clears, backend):
    """Bit-equal to an eager buffer of the same backend; equal to the CPU's up to rounding."""
    sizes = {"capacity": capacity, "final_obs_rows": N * T if late else 0}
    buf, eager = make(backend, "cuda", **sizes), make(backend, "cuda", **sizes)
    on_host = make(None, "cpu", **sizes)
    new, how = (late_step, {"value_fn": value_fn}) if late else (random_step, {})
    inputs, last, seen = [new(buf) for _ in range(T)], torch.zeros(N), []

    def run() -> None:
        for step in inputs:
            buf.append(**step)
        buf.compute_gae(last, GAMMA, LAM, check=False, **how)
        seen[:] = epochs(buf)
        if clears:
            buf.clear()

    graph = captured(buf, run)
    buf.clear()
    assert len(buf) == 0
    orders = set()
    for _ in range(ROLLOUTS):
        steps = [new(buf) for _ in range(T)]
        for step, static in zip(steps, inputs, strict=True):
            refill(static, step)
            eager.append(**step)
            on_host.append(**on_cpu(step))
        last.copy_(torch.randn(N))
        buf.advance(T, rollouts=int(clears))
        graph.replay()
        eager.compute_gae(last, GAMMA, LAM, **how)
        on_host.compute_gae(last.cpu(), GAMMA, LAM, **how)
        for name in ("advantages", "returns", "statistics"):
            assert torch.equal(buf._storage.tensors[name], eager._storage.tensors[name]), name
        assert_close(buf._storage.tensors["advantages"], on_host.advantages)
        for ours, theirs in zip(seen, epochs(eager), strict=True):
            for name in ours:
                assert torch.equal(ours[name], theirs[name]), name
        for ours, theirs in zip(seen, epochs(on_host), strict=True):
            assert torch.equal(ours["indices"].cpu(), theirs["indices"])
            assert torch.equal(ours["state"].cpu(), theirs["state"])
            assert_close(ours["advantages"], theirs["advantages"])
        orders |= {tuple(copies["indices"].tolist()) for copies in seen}
        buf.check()
        for each in (eager, on_host) if clears else (buf, eager, on_host):
            each.clear()
        assert (buf._ring.appended, buf._ring.discarded) == (eager._ring.appended, eager._ring.discarded)
        assert buf._storage.cursor.tolist() == [buf._ring.appended, buf._ring.discarded, 0, 0, T]
    assert len(orders) == 6 * ROLLOUTS  # no permutation occurs twice


@pytest.mark.parametrize("halves", [False, True], ids=["append", "begin and end"])
def test_eager_steps_between_replays(halves, backend):
    buf, eager = make(backend, "cuda", capacity=T + 2), make(backend, "cuda", capacity=T + 2)
    inputs = random_step(buf)

    def run() -> None:
        early = {name: x for name, x in inputs.items() if name not in ("rewards", "dones")}
        if not halves:
            return buf.append(**inputs)
        buf.begin(**early)
        return buf.end(rewards=inputs["rewards"], dones=inputs["dones"])

    graph = captured(buf, run)
    for rollout in range(4):
        for t in range(T):
            step = random_step(buf)
            eager.append(**step)
            if (rollout + t) % 3 == 0:
                buf.append(**step)
            else:
                refill(inputs, step)
                buf.advance(1)
                graph.replay()
        assert memory_bytes(buf)["rows"] == memory_bytes(eager)["rows"]
        assert torch.equal(buf.rewards, eager.rewards) and torch.equal(buf.dones, eager.dones)
        buf.clear()
        eager.clear()
    buf.check()


def test_a_full_ring_is_left_alone_and_flagged(backend):
    buf = make(backend, "cuda")
    inputs = random_step(buf)
    graph = captured(buf, lambda: buf.append(**inputs))
    buf.clear()
    for _ in range(T):
        buf.advance(1)
        refill(inputs, random_step(buf))
        graph.replay()
    with pytest.raises(BufferFull, match=rf"^the ring of {T} steps holds {T}"):
        buf.advance(1)
    before = memory_bytes(buf)
    refill(inputs, random_step(buf))
    graph.replay()  # without advance()
    after = memory_bytes(buf)
    assert {name for name in before if before[name] != after[name]} == {"cursor"}
    for _ in range(2):  # sticky
        with pytest.raises(BufferFull, match=r"^a captured append found the ring full"):
            buf.check()
    assert buf._storage.cursor.tolist() == [T, 0, 1, 0, T]


def test_a_graph_outlives_many_rollouts(backend):
    """The tickets of the statistics and of the ring are 0 again after each of hundreds of replays."""
    buf = make(backend, "cuda")
    inputs, last = random_step(buf), torch.randn(N)

    def run() -> None:
        for _ in range(T):
            buf.append(**inputs)
        buf.compute_gae(last, GAMMA, LAM)
        buf.clear()

    graph, results = captured(buf, run), set()
    buf.clear()
    for _ in range(200):
        buf.advance(T, rollouts=1)
        graph.replay()
        results.add(tuple(buf._storage.tensors["statistics"].tolist()))
    assert len(results) == 1
    assert (
        buf._storage.cursor.tolist() == [200 * T, 200 * T, 0, 0, T] and buf._storage.tensors["workspace"][0].item() == 0
    )


def rollout_of(buf: RolloutBuffer, inputs: dict, last: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    for _ in range(T):
        buf.append(**inputs)
    buf.compute_gae(last, GAMMA, LAM, check=False)
    found = epochs(buf)
    buf.clear()
    return found


def kernels(run: Callable[[], object]) -> set[str]:
    """The names of the kernels that ``run`` launches."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return {event.name for event in recorded.events()}


OURS = {"append_kernel", "gae_kernel", "gather_kernel"}


@pytest.mark.skipif(any(pydrone.backends()[x] for x in ("cuda", "triton")), reason="not both GPU backends")
@pytest.mark.parametrize("warm", [True, False])
def test_by_default_a_graph_launches_tritons_kernels(warm):
    """If they were loaded before; the eager calls are CUDA's."""
    forget()
    buf = make(None, "cuda")
    inputs, last = on_gpu(random_step(buf)), torch.randn(N, device="cuda")
    assert not OURS & kernels(lambda: rollout_of(buf, inputs, last))
    buf.advance(T, rollouts=1)
    if warm:
        with buf.as_captured():
            rollout_of(buf, inputs, last)
        buf.advance(T, rollouts=1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global" if warm else "relaxed"):
        seen = rollout_of(buf, inputs, last)
    assert OURS & kernels(graph.replay) == (OURS if warm else set())
    eager = make("cuda", "cuda")
    eager._ring.restore(T * (1 + warm), T * (1 + warm), eager._ring.truncations, eager._ring.resets)
    for ours, theirs in zip(seen, rollout_of(eager, inputs, last), strict=True):
        assert torch.equal(ours["indices"], theirs["indices"]) and torch.equal(ours["state"], theirs["state"])
        assert_close(ours["advantages"], theirs["advantages"])


def on_gpu(step: dict) -> dict:
    return {name: on_gpu(x) if isinstance(x, dict) else x.cuda() for name, x in step.items()}


def forget() -> None:
    from pydrone._triton import append, gae, gather

    for module in (append, gae, gather):
        module.LAUNCHES.cache_clear()


@pytest.mark.skipif(pydrone.backends()["triton"] is not None, reason="no Triton")
def test_triton_binds_a_buffers_arguments_once(monkeypatch):
    """Later launches are repeated (triton_kernels/prepared.py). If not, Triton or torch is not as it is known there."""
    from triton.runtime.jit import JITFunction

    forget()
    seen, run = [], JITFunction.run

    def counted(self, *args, **options):
        seen.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    buf, other = make("triton", "cuda"), make("cuda" if pydrone.backends()["cuda"] is None else "triton", "cuda")
    inputs, last = on_gpu(random_step(buf)), torch.randn(N, device="cuda")
    for rollout in range(3):
        seen.clear()
        found, wanted = (rollout_of(x, inputs, last) for x in (buf, other))
        assert (len(seen) > 0) == (rollout == 0), seen
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.equal(ours["indices"], theirs["indices"]) and torch.equal(ours["state"], theirs["state"])
            assert_close(ours["advantages"], theirs["advantages"])
