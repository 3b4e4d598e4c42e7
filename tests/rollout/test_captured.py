"""The device's counters as captured CUDA graphs use them, emulated: launches are recorded and replayed."""

from __future__ import annotations

import pytest
import torch
from rollout_model import assert_close, gae_loop, memory_bytes, random_step, stacked

from pydrone import BufferFull, RolloutBuffer
from pydrone.ops.schema import SCHEMAS

N, T = 7, 3


class Graph:
    """Emulates torch.cuda.graph on a CPU: ``with`` records launches without running them; ``replay`` runs them."""

    def __init__(self, buf: RolloutBuffer, monkeypatch) -> None:
        self.buf, self.monkeypatch, self.launches = buf, monkeypatch, []

    def __enter__(self) -> Graph:
        buf, ops = self.buf, self.buf._storage.ops
        self.ops = ops

        def recorded(name: str):
            return lambda *args: self.launches.append((getattr(ops, name), args))

        buf._storage.ops = ops._replace(**{name: recorded(name) for name in SCHEMAS})
        self.monkeypatch.setattr(buf._ring, "capturing", lambda: True)
        return self

    def __exit__(self, *_) -> None:
        self.buf._storage.ops = self.ops
        self.monkeypatch.undo()

    def replay(self) -> None:
        for launch, args in self.launches:
            launch(*args)


def make(backend: str, **options) -> RolloutBuffer:
    return RolloutBuffer(N, T, **{"obs": 2, "actions": 1, "backend": backend, "final_obs_rows": N * T} | options)


def static(buf: RolloutBuffer, late: bool = False) -> dict:
    step = random_step(buf)
    return step | {"truncated": step["dones"], "final_obs": torch.zeros(N, 2)} if late else step


def refill(inputs: dict, step: dict) -> dict:
    """Writes new numbers into a graph's input tensors and returns a copy of them."""
    for name, x in inputs.items():
        x.copy_(step[name])
    return {name: x.clone() for name, x in inputs.items()}


def cursor(buf: RolloutBuffer) -> tuple[int, int, int]:
    appended, discarded, flag, _, steps = buf._storage.cursor.tolist()
    assert steps == T
    return appended, discarded, flag


@pytest.mark.parametrize("capacity", [T, T + 1, 2 * T, 3 * T - 1])
def test_replayed_appends_follow_the_cursor(capacity, backend, monkeypatch):
    buf = make(backend, capacity=capacity)
    inputs = static(buf)
    with Graph(buf, monkeypatch) as graph:
        buf.append(**inputs)
    assert len(buf) == 0 and len(graph.launches) == 1  # capturing runs nothing
    steps = []
    for _ in range(4 * capacity):
        while len(buf) < capacity:
            buf.advance(1)
            steps.append(refill(inputs, random_step(buf)))
            graph.replay()
            assert cursor(buf) == (buf._ring.appended, buf._ring.discarded, 0)
        with pytest.raises(BufferFull, match=rf"^the ring of {capacity} steps holds {capacity}; 1 more"):
            buf.advance(1)
        for name in ("rewards", "values", "actions", "obs"):
            assert torch.equal(getattr(buf, name), stacked(steps[:T], name))
        buf.check()
        last = torch.randn(N)
        buf.compute_gae(last)
        arguments = [stacked(steps[:T], name) for name in ("rewards", "values", "dones")]
        assert_close(buf.advantages, gae_loop(*arguments, last, 0.99, 0.95)[0])
        for mb in buf.minibatches(2):
            assert torch.equal(mb.obs, buf.obs[mb.indices // T, mb.indices % T])
        buf.clear()
        assert cursor(buf) == (buf._ring.appended, buf._ring.discarded, 0)
        del steps[:T]


def test_begin_does_not_move_the_cursor_end_does(backend, monkeypatch):
    buf = make(backend)
    inputs = static(buf)
    late = {name: inputs.pop(name) for name in ("rewards", "dones")}
    with Graph(buf, monkeypatch) as graph:
        buf.begin(**inputs)
        buf.end(**late)
    begin, end = graph.launches
    buf.advance(1)
    begin[0](*begin[1])
    assert cursor(buf) == (0, 0, 0)
    end[0](*end[1])
    assert cursor(buf) == (1, 0, 0)
    assert torch.equal(buf.obs[:, 0], inputs["obs"]) and torch.equal(buf.rewards[:, 0], late["rewards"])


@pytest.mark.parametrize("late", [False, True])
def test_a_captured_append_onto_a_full_ring_writes_nothing(late, backend, monkeypatch):
    buf = make(backend, capacity=4)
    inputs = static(buf, late)
    with Graph(buf, monkeypatch) as graph:
        buf.append(**inputs)
    buf.advance(4)
    for _ in range(4):
        refill(inputs, static(buf, late))
        graph.replay()
    before = memory_bytes(buf)
    refill(inputs, static(buf, late))
    graph.replay()  # without advance()
    after = memory_bytes(buf)
    assert {name for name in before if before[name] != after[name]} == {"cursor"}
    assert cursor(buf) == (4, 0, 1)
    with pytest.raises(BufferFull, match=r"^a captured append found the ring full; nothing was written"):
        buf.check()
    graph.replay()
    assert cursor(buf) == (4, 0, 1)
    with pytest.raises(BufferFull):  # sticky
        buf.check()


def test_eager_steps_between_replays(backend, monkeypatch):
    """advance() updates the device's counters whenever the host has moved on its own."""
    buf = make(backend, capacity=5)
    inputs = static(buf)
    with Graph(buf, monkeypatch) as graph:
        buf.append(**inputs)
    steps = []
    for round_ in range(12):
        for k in range(T):
            if (round_ + k) % 2:
                steps.append(random_step(buf))
                buf.append(**steps[-1])
            else:
                buf.advance(1)
                steps.append(refill(inputs, random_step(buf)))
                graph.replay()
        assert torch.equal(buf.rewards, stacked(steps[-T:], "rewards"))
        assert torch.equal(buf.obs, stacked(steps[-T:], "obs"))
        buf.clear()


def test_an_eager_append_does_not_clear_the_overflow_flag(backend, monkeypatch):
    buf = make(backend)
    inputs = static(buf)
    with Graph(buf, monkeypatch) as graph:
        buf.append(**inputs)
    buf.advance(T)
    for _ in range(T + 1):
        graph.replay()
    buf.clear()
    buf.append(**random_step(buf))
    buf.advance(1)
    with pytest.raises(BufferFull, match=r"^a captured append found the ring full"):
        buf.check()


def test_gae_and_gather_follow_the_cursor(backend, monkeypatch):
    """A graph of a whole rollout, compute_gae and minibatches, replayed from every start position in the ring."""
    buf, eager = make(backend, capacity=5), make(backend)
    inputs, last = [static(buf) for _ in range(T)], torch.zeros(N)
    out = {}
    with Graph(buf, monkeypatch) as graph:
        for step in inputs:
            buf.append(**step)
        buf.compute_gae(last)
        out["mb"] = next(buf.minibatches(1, normalize_advantages=False))
        out["indices"] = torch.zeros(N * T, dtype=torch.int64)
        mb_launch = graph.launches[-1]
    assert len(graph.launches) == T + 2
    orders = set()
    for _ in range(6):
        buf.advance(T)
        steps = [refill(x, random_step(buf)) for x in inputs]
        last.copy_(torch.randn(N))
        graph.replay()
        arguments = [stacked(steps, name) for name in ("rewards", "values", "dones")]
        assert_close(buf._storage.tensors["advantages"], gae_loop(*arguments, last, 0.99, 0.95)[0])
        gather, args = mb_launch
        gather(*args[:-1], out["indices"])
        env, step = out["indices"] // T, out["indices"] % T
        assert sorted(out["indices"].tolist()) == list(range(N * T))
        assert torch.equal(out["mb"].obs, stacked(steps, "obs")[env, step])
        assert torch.equal(out["mb"].advantages, buf._storage.tensors["advantages"][env, step])
        orders.add(tuple(out["indices"].tolist()))
        buf.clear()
        for step in steps:
            eager.append(**step)
        eager.compute_gae(last)
        assert torch.equal(out["indices"], next(eager.minibatches(1)).indices)  # as without a graph
        eager.clear()
    assert len(orders) == 6  # the rollout's number is read on the device, so each replay has its own permutation


@pytest.mark.parametrize("capacity", [T, 2 * T])
@pytest.mark.parametrize("flag", ["truncated", "valid"])
def test_flags_given_to_a_captured_append_count_in_every_replay(capacity, flag, backend, monkeypatch):
    """The host saw the flag once, at capture; the buffer must remember it after clear() and for other rollouts."""
    buf = make(backend, capacity=capacity)
    inputs = static(buf, late=flag == "truncated") | ({"valid": torch.ones(N)} if flag == "valid" else {})
    with Graph(buf, monkeypatch) as graph:
        buf.append(**inputs)
    for round_ in range(4):
        steps = []
        for k in range(T):
            buf.advance(1)
            new = static(buf, late=flag == "truncated")
            new["dones"] = torch.arange(N) == k
            if flag == "truncated":
                new |= {"truncated": torch.arange(N) == k, "final_obs": torch.full((N, 2), 50.0 + round_ + k)}
            else:
                new["valid"] = torch.arange(N) != k
            steps.append(refill(inputs, new))
            graph.replay()
        how = {"value_fn": lambda obs: obs.sum(1)} if flag == "truncated" else {}
        if flag == "truncated":
            with pytest.raises(ValueError, match=r"^truncated: expected a bootstrap"):
                buf.compute_gae(torch.zeros(N))
        buf.compute_gae(torch.zeros(N), **how)
        expected = gae_loop(
            *(stacked(steps, name) for name in ("rewards", "values", "dones")),
            torch.zeros(N),
            0.99,
            0.95,
            truncated=stacked(steps, "truncated") if flag == "truncated" else None,
            final_values=stacked(steps, "final_obs").sum(2) if flag == "truncated" else None,
            valid=stacked(steps, "valid") if flag == "valid" else None,
        )
        assert_close(buf.advantages, expected[0])
        drawn = torch.cat([mb.indices for mb in buf.minibatches(2)])
        valid = stacked(steps, "valid") if flag == "valid" else torch.ones(N, T)
        assert sorted(drawn.tolist()) == valid.flatten().nonzero().squeeze(1).tolist()
        buf.clear()


def test_advance_refuses_nonsense(backend):
    buf = make(backend)
    for steps in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match=r"^steps: expected an int of at least 0, got"):
            buf.advance(steps)
    with pytest.raises(BufferFull):
        buf.advance(T + 1)
    for rollouts in (-1, 1, 0.5):  # there is none to clear
        with pytest.raises(ValueError, match=r"^rollouts: "):
            buf.advance(0, rollouts=rollouts)
    assert len(buf) == 0
