"""Tests that need a GPU: launches, synchronisation, streams, bit-equal runs at full size, agreement with the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rollout_model import assert_close, random_step
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import pydrone
from pydrone import RolloutBuffer

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

NUM_ENVS, NUM_STEPS = 8192, 100


def make(backend: str | None, device: str, num_envs: int = 70, num_steps: int = 6, **options) -> RolloutBuffer:
    options = {"obs": 17, "actions": 4, "fields": {"mu": 4, "sigma": 4}} | options
    return RolloutBuffer(num_envs, num_steps, device=device, backend=backend, **options)


def filled(backend: str | None, device: str = "cuda", **options) -> RolloutBuffer:
    """A buffer with a rollout and its advantages, the same for every backend."""
    torch.manual_seed(1)
    buf = make(backend, device, **options)
    for _ in range(buf.num_steps):
        buf.append(**{name: x.to(device) for name, x in random_step(buf).items()})
    buf.compute_gae(torch.randn(buf.num_envs).to(device))
    return buf


def launches(run: Callable[[], object]) -> list[str]:
    """Names of everything that ``run`` runs on the GPU, copies and fills included, after a warm-up."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    return [event.name for event in recorded.events() if event.device_type == DeviceType.CUDA]


def test_launches(backend):
    """One launch per step, advantage computation and minibatch; no other work on the GPU, and nothing read back."""
    buf = make(backend, "cuda", capacity=24)
    step = random_step(buf)
    late = step | {"truncated": step["dones"], "final_obs": step["obs"]}
    early = {name: x for name, x in step.items() if name not in ("rewards", "dones")}

    def halves() -> None:
        buf.begin(**early)
        buf.end(rewards=step["rewards"], dones=step["dones"])

    assert len(launches(lambda: buf.append(**step))) == 1
    assert len(launches(lambda: buf.append(**late))) == 1
    assert len(launches(halves)) == 2
    last = torch.randn(70)
    how = {"timeout_bootstrap": "stored_value", "check": False}
    assert len(launches(lambda: buf.compute_gae(last, **how))) == 1
    assert len(launches(lambda: next(buf.minibatches(4)))) == 1
    assert len(launches(lambda: list(buf.minibatches(4, num_epochs=2, reuse=True)))) == 8
    out = torch.empty(70, 6), torch.empty(70, 6)
    arguments = [torch.randn(70, 6), torch.randn(70, 6), torch.zeros(70, 6), last]
    assert len(launches(lambda: pydrone.gae(*arguments, out=out, backend=backend))) == 1


def test_nothing_waits_for_the_gpu(backend):
    """Steps, advantages and minibatches never synchronise."""
    buf = filled(backend)
    step, last = random_step(buf), torch.randn(70)
    torch.cuda.set_sync_debug_mode("error")
    try:
        buf.clear()
        for _ in range(6):
            buf.append(**step)
        buf.compute_gae(last)
        for mb in buf.minibatches(3, num_epochs=2):
            assert len(mb)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("time_dim", [0, 1])
def test_bit_equal_from_run_to_run(time_dim, backend):
    shape = (NUM_ENVS, NUM_STEPS) if time_dim else (NUM_STEPS, NUM_ENVS)
    rewards, values, dones = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.02
    arguments = [rewards, values, dones, torch.randn(NUM_ENVS)]
    runs = [pydrone.gae(*arguments, time_dim=time_dim, stats=True, backend=backend) for _ in range(20)]
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], run, strict=True))
    expected = pydrone.gae(*(x.cpu() for x in arguments), time_dim=time_dim, stats=True)
    assert_close(runs[0][0], expected[0])
    assert runs[0][2].cpu().tolist() == pytest.approx(expected[2].tolist(), rel=1e-5, abs=1e-5)


def test_the_full_size_against_the_cpu(backend):
    sizes = {"num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "final_obs_rows": 0}
    ours, theirs = filled(backend, **sizes), filled(None, "cpu", **sizes)
    assert_close(ours.advantages, theirs.advantages)
    for a, b in zip(ours.minibatches(4, num_epochs=2), theirs.minibatches(4, num_epochs=2), strict=True):
        assert torch.equal(a.indices.cpu(), b.indices)
        for name in ("obs", "actions", "mu", "sigma", "values", "log_probs"):
            assert torch.equal(a[name].cpu(), b[name]), name
        assert_close(a.advantages, b.advantages)
        assert_close(a.returns, b.returns)


@pytest.mark.parametrize("obs", [17, {"state": 5, "camera": ((3, 4, 4), torch.uint8)}], ids=["plain", "groups"])
@pytest.mark.parametrize("capacity", [6, 9, 12])
def test_final_observations(capacity, obs, backend):
    """value_fn receives the whole pool; only its values for rows in use count."""
    ours = make(backend, "cuda", capacity=capacity, obs=obs, final_obs_rows=70 * 6)
    theirs = make(None, "cpu", capacity=capacity, obs=obs, final_obs_rows=70 * 6)

    def value_fn(pool) -> torch.Tensor:
        groups = pool.values() if isinstance(pool, dict) else [pool]
        return sum(x.float().flatten(1).mean(1) for x in groups)

    def copied(x, device: str):
        return {name: copied(y, device) for name, y in x.items()} if isinstance(x, dict) else x.to(device)

    for _ in range(5):
        while len(ours) < capacity:
            step = random_step(ours)
            step |= {"truncated": step["dones"] & (torch.rand(70) < 0.7), "final_obs": random_step(ours)["obs"]}
            ours.append(**step)
            theirs.append(**copied(step, "cpu"))
        last = torch.randn(70)
        ours.compute_gae(last, value_fn=value_fn)
        theirs.compute_gae(last.cpu(), value_fn=value_fn)
        assert_close(ours.advantages, theirs.advantages)
        ours.clear()
        theirs.clear()


def test_the_current_stream_is_used(backend):
    """The inputs are still being written on a side stream; on any other stream the kernels would read zeros."""
    expected, stream = filled(backend), torch.cuda.Stream()
    buf = make(backend, "cuda")
    torch.manual_seed(1)
    steps = [random_step(buf) for _ in range(6)]
    last = torch.randn(70)
    pending = [{name: torch.zeros_like(x) for name, x in step.items()} for step in steps]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        for step, late in zip(steps, pending, strict=True):
            for name, x in late.items():
                x.copy_(step[name])
            buf.append(**late)
        buf.compute_gae(last)
        mb = next(buf.minibatches(2))
    stream.synchronize()
    assert torch.equal(buf.advantages, expected.advantages) and torch.equal(buf.statistics, expected.statistics)
    assert torch.equal(mb.advantages, next(expected.minibatches(2)).advantages)


def test_overwriting_what_autograd_saved_is_an_error(backend):
    buf = filled(backend)
    weight = torch.ones(17, requires_grad=True)
    loss = (buf.obs * weight).sum()
    buf.clear()
    buf.append(**random_step(buf))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_moved_to_the_gpu_and_back(backend):
    ours = filled("cpu" if pydrone.backends()["cpu"] is None else "reference", "cpu")
    moved = ours.to("cuda")
    moved.compute_gae(torch.zeros(70))
    ours.compute_gae(torch.zeros(70, device="cpu"))
    assert_close(moved.advantages, ours.advantages)
    back = moved.to("cpu")
    assert torch.equal(back.obs, ours.obs) and torch.equal(back.dones, ours.dones)
