"""PyTorch's contracts that no other file tests: compilation, autocast, gradients, lazy views, DLPack, workers, threads.

Elsewhere: opcheck and full graphs in ops/test_ops.py; inference mode, saved tensors, state dicts, pickles and copies in
test_buffer_state.py; streams and bit-equal runs on a GPU in gpu/.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from rollout_model import fill, random_step
from torch import Tensor

import pydrone
from pydrone import RolloutBuffer

N, T = 6, 5


def arguments(num_envs: int = N, num_steps: int = T, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(num_envs, num_steps, generator=g) for _ in range(2))
    return [rewards, values, torch.rand(num_envs, num_steps, generator=g) < 0.2, torch.randn(num_envs, generator=g)]


def iteration(buf: RolloutBuffer, g: torch.Generator) -> list[Tensor]:
    """One rollout, from the first step to the last minibatch; returns all results."""
    while not buf.full:
        step = random_step(buf, g=g)
        buf.append(**step, truncated=step["dones"] & (step["rewards"] > 0), final_obs=random_step(buf, g=g)["obs"])
    buf.compute_gae(torch.randn(buf.num_envs, generator=g), value_fn=lambda obs: obs.sum(1))
    out = [buf.advantages.clone(), buf.returns.clone(), buf.statistics.clone()]
    for mb in buf.minibatches(3, 2):
        out += [x.clone() for x in (mb.obs, mb.actions, mb.values, mb.log_probs, mb.advantages, mb.returns, mb.indices)]
    buf.clear()
    return out


def run(num_envs: int = N, num_steps: int = T, iterations: int = 2, backend: str | None = None, seed: int = 0) -> list:
    sizes = {"num_envs": num_envs, "num_steps": num_steps, "final_obs_rows": num_envs * num_steps}
    buf = RolloutBuffer(**sizes, obs=3, actions=2, seed=seed, backend=backend)
    g = torch.Generator().manual_seed(seed)
    return [x for _ in range(iterations) for x in iteration(buf, g)]


def digest(tensors: list[Tensor]) -> str:
    total = hashlib.sha256()
    for x in tensors:
        total.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(x, y) for x, y in zip(ours, theirs))


# ---------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("time_dim", [0, 1])
def test_gae_compiles_into_one_graph(time_dim):
    def function(rewards: Tensor, values: Tensor, dones: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        how = {"time_dim": time_dim, "stats": time_dim == 1}
        advantages, returns, *moments = pydrone.gae(rewards * 2, values, dones, last, 0.9, 0.8, **how)
        return advantages + 1, returns - values, *moments

    given = arguments()
    given = given if time_dim else [*(x.t().contiguous() for x in given[:3]), given[3]]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert same(compiled(*given), function(*given))
        given[0] = given[0] + 1


@pytest.mark.parametrize("time_dim", [0, 1])
def test_vtrace_and_retrace_compile_into_one_graph(time_dim):
    def function(rewards: Tensor, values: Tensor, dones: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        how = {"time_dim": time_dim, "lam": 0.9}
        vs, advantages, moments = pydrone.vtrace(rewards * 2, values, dones, last, values, stats=True, **how)
        return vs + 1, advantages, moments, pydrone.retrace(rewards, values * 2, values, dones, last, rewards, **how)

    given = arguments()
    given = given if time_dim else [*(x.t().contiguous() for x in given[:3]), given[3]]
    assert same(torch.compile(function, fullgraph=True, backend="aot_eager")(*given), function(*given))


def test_a_gradient_of_the_ratios_would_be_dropped(backend):
    rewards, values, dones, last = arguments()

    def function(x: Tensor) -> Tensor:
        return pydrone.vtrace(rewards, values, dones, last, x, backend=backend)[0]

    for tangent in TANGENTS.values():
        with pytest.raises(RuntimeError, match=r"^log_rhos: (requires grad|has a tangent), .* pass log_rhos\.detach"):
            tangent(function, values)
    both = torch.stack([values, values + 1])
    with pytest.raises(RuntimeError, match=r"^vmap: inplace|Batching rule not implemented for pydrone::off_policy"):
        torch.vmap(function)(both)  # an error and not a wrong number


def test_gae_into_given_outputs_compiles_into_one_graph():
    rewards, *rest = arguments()

    def function(rewards: Tensor, advantages: Tensor, returns: Tensor) -> Tensor:
        pydrone.gae(rewards * 2, *rest, out=(advantages, returns))
        return advantages + returns

    ours, theirs = (list(torch.full((2, N, T), torch.nan)) for _ in range(2))
    total = torch.compile(function, fullgraph=True, backend="aot_eager")(rewards, *ours)
    assert torch.equal(total, function(rewards, *theirs)) and same(ours, theirs)


def test_gae_compiles_with_a_discount_that_changes():
    """PyTorch traces a number that differs from call to call as a symbol."""
    compiled = torch.compile(pydrone.gae, fullgraph=True, backend="aot_eager")
    for gamma, lam in ((0.9, 0.8), (0.5, 0.8), (0.25, 0.3)):
        assert same(compiled(*arguments(), gamma, lam), pydrone.gae(*arguments(), gamma, lam))


@pytest.mark.slow
def test_gae_compiles_with_the_inductor():
    def function(rewards: Tensor, values: Tensor, dones: Tensor, last: Tensor) -> Tensor:
        return pydrone.gae(rewards * 2, values, dones, last)[0].sin()

    given = arguments()
    ours = torch.compile(function, fullgraph=True)(*given)
    assert torch.allclose(ours, function(*given), atol=1e-6)


def test_a_buffer_in_a_compiled_step():
    """The ring's counters are on the host, so a compiled step has a graph break; the stored data are the same."""
    bufs = [RolloutBuffer(N, T, obs=3, actions=2) for _ in range(2)]

    def step(buf: RolloutBuffer, obs: Tensor, given: dict[str, Tensor]) -> Tensor:
        buf.append(obs=obs * 2, **given)
        return obs + 1

    compiled = torch.compile(step, backend="eager")
    for t in range(T):
        given = random_step(bufs[0])
        obs = given.pop("obs")
        assert torch.equal(compiled(bufs[0], obs, given), step(bufs[1], obs, given)), t
    assert len(bufs[0]) == T
    for name in ("obs", "actions", "rewards", "values", "dones"):
        assert torch.equal(bufs[0][name], bufs[1][name]), name


# ---------------------------------------------------------------------------------------------- autocast, gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(dtype, backend):
    given = arguments()
    expected = [*pydrone.gae(*given, stats=True, backend=backend), *run(backend=backend)]
    with torch.autocast("cpu", dtype=dtype):
        assert (given[0] @ given[0].t()).dtype == dtype
        actual = [*pydrone.gae(*given, stats=True, backend=backend), *run(backend=backend)]
    assert same(actual, expected)
    # A network under autocast returns half-precision values: they are converted, and GAE computes in float32.
    halves = [given[0], given[1].to(dtype), given[2], given[3].to(dtype)]
    converted = [x.float() if x.dtype == dtype else x for x in halves]
    assert same(pydrone.gae(*halves, backend=backend), pydrone.gae(*converted, backend=backend))


TANGENTS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "backward": lambda f, x: f(x.clone().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("which", range(3), ids=["rewards", "values", "last_values"])
@pytest.mark.parametrize("kind", TANGENTS)
def test_a_gradient_that_would_be_dropped_is_an_error(kind, which, backend):
    given, name = arguments(), ("rewards", "values", "last_values")[which]
    place = (0, 1, 3)[which]

    def function(x: Tensor) -> Tensor:
        return pydrone.gae(*given[:place], x, *given[place + 1 :], backend=backend)[0]

    with pytest.raises(RuntimeError, match=rf"^{name}: (requires grad|has a tangent), .* pass {name}\.detach\(\)$"):
        TANGENTS[kind](function, given[place])
    x = given[place].clone().requires_grad_()
    assert torch.equal(function(x.detach()), function(given[place]))


def test_vmap_is_an_error_and_not_a_wrong_number(backend):
    given = arguments()
    both = torch.stack([given[0], given[0] + 1])

    def function(x: Tensor) -> Tensor:
        return pydrone.gae(x, *given[1:], backend=backend)[0]

    if backend == "reference":  # plain PyTorch
        assert same(list(torch.vmap(function)(both)), [function(x) for x in both])
    else:
        with pytest.raises(RuntimeError, match="Batching rule not implemented for pydrone::gae"):
            torch.vmap(function)(both)


def test_overwriting_an_output_that_autograd_saved_is_an_error(backend):
    given, out = arguments(), (torch.zeros(N, T), torch.zeros(N, T))
    for saved in out:
        weight = torch.ones(N, T, requires_grad=True)
        loss = (saved * weight).sum()
        pydrone.gae(*given, out=out, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_gae_in_inference_mode(backend):
    given, out = arguments(), (torch.zeros(N, T), torch.zeros(N, T))
    expected = pydrone.gae(*given, stats=True, backend=backend)
    loss = (torch.ones(N, T, requires_grad=True) * out[0]).sum()
    with torch.inference_mode():
        assert same(pydrone.gae(*given, stats=True, backend=backend), expected)
        pydrone.gae(*given, out=out, backend=backend)
    assert same(out, expected[:2])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------------------------------- lazy views, DLPack


def negated(x: Tensor) -> Tensor:
    """``x`` as a view of memory that holds -x: PyTorch negates it on read."""
    made = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert made.is_neg() and torch.equal(made, x)
    return made


def test_views_that_are_negated_when_read(backend):
    rewards, values, dones, last = arguments()
    expected = pydrone.gae(rewards, values, dones, last, backend=backend)
    assert same(pydrone.gae(negated(rewards), negated(values), dones, negated(last), backend=backend), expected)
    with pytest.raises(ValueError, match=r"^out\[1\]: expected memory of its own, got a negated view$"):
        out = torch.zeros(N, T), negated(torch.zeros(N, T))
        pydrone.gae(rewards, values, dones, last, out=out, backend=backend)
    bufs = [RolloutBuffer(N, 1, obs=3, actions=2, fields={"mu": 2}, backend=backend) for _ in range(2)]
    step = random_step(bufs[0])
    bufs[0].append(**step)
    bufs[1].append(**{name: negated(x) if x.is_floating_point() else x for name, x in step.items()})
    for name in ("obs", "actions", "values", "log_probs", "rewards", "dones", "mu"):
        assert torch.equal(bufs[0][name], bufs[1][name]), name


def test_dlpack_views_show_the_rollout(backend):
    """In both directions, without a copy: another library's view shows this rollout, and then the next one."""
    buf = RolloutBuffer(N, T, obs=3, actions=((2,), torch.int64), backend=backend)
    first = fill(buf)
    buf.compute_gae(torch.zeros(N))
    names = ("obs", "actions", "values", "log_probs", "rewards", "dones", "advantages", "returns")
    views = {name: np.from_dlpack(buf[name]) for name in names}
    for name, view in views.items():
        assert view.ctypes.data == buf[name].data_ptr() and np.array_equal(view, buf[name].numpy()), name
    buf.clear()
    second = fill(buf)
    buf.compute_gae(torch.ones(N))
    for name, view in views.items():
        assert np.array_equal(view, buf[name].numpy()), name
    assert not torch.equal(first[0]["obs"], second[0]["obs"])
    assert np.array_equal(views["obs"][:, 0], second[0]["obs"].numpy())
    buf.clear()
    given = {name: torch.from_dlpack(np.asfortranarray(x.numpy())) for name, x in second[0].items()}
    buf.append(**given)
    assert torch.equal(buf.obs[:, 0], second[0]["obs"])


# ---------------------------------------------------------------------------------------------- processes, threads


def in_a_worker(given: list[Tensor], buf: RolloutBuffer) -> tuple[str, str, int]:
    """The results of a worker, which receives arguments and buffer as pickles."""
    torch.set_num_threads(1)
    length = len(buf)
    buf.clear()
    results = iteration(buf, torch.Generator().manual_seed(3))
    return digest(list(pydrone.gae(*given, stats=True))), digest(results), length


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_compute_the_same(method):
    buf = RolloutBuffer(N, T, obs=3, actions=2, seed=5, final_obs_rows=N * T)
    fill(buf, 2)
    ours = in_a_worker(arguments(), copy.deepcopy(buf))
    pydrone.gae(*arguments(4099, 129))  # starts threads, which a fork does not have
    with multiprocessing.get_context(method).Pool(1) as pool:
        theirs = pool.starmap_async(in_a_worker, [(arguments(), buf)] * 2).get(timeout=60)
    assert theirs == [ours] * 2 and ours[2] == 2
    assert len(buf) == 2  # this process's buffer is unchanged


def test_buffers_of_two_threads_do_not_interfere(backend):
    """Two threads at once: each gets the same results as alone."""
    expected = [digest(run(40, 9, 4, backend, seed)) for seed in range(2)]
    start, found = threading.Barrier(2), {}

    def work(seed: int) -> None:
        start.wait()
        found[seed] = [digest(run(40, 9, 4, backend, seed)) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: [expected[seed]] * 3 for seed in range(2)}


# ---------------------------------------------------------------------------------------------- bits


def with_threads(count: int, make: Callable[[], list[Tensor]]) -> list[Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return make()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [False, True])
def test_bit_equal_from_run_to_run_and_for_any_number_of_threads(columns):
    """Large enough to split every parallel loop. Includes the statistics, whose sums depend on their order."""
    given = arguments(4099, 129)
    given = [*(x.t().contiguous().t() if columns else x for x in given[:3]), given[3]]
    first = pydrone.gae(*given, stats=True)
    for count in (1, 2, 3, 8):
        assert same(with_threads(count, lambda: list(pydrone.gae(*given, stats=True))), first), count
    first = run(4099, 11, iterations=1)
    for count in (1, 2, 5):
        assert same(with_threads(count, lambda: run(4099, 11, iterations=1)), first), count


def test_deterministic_algorithms(backend):
    """Everything that pydrone calls has a deterministic version, with the same results."""
    given, expected = arguments(), run(backend=backend)
    advantages = pydrone.gae(*given, stats=True, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        assert same(pydrone.gae(*given, stats=True, backend=backend), advantages)
        assert same(run(backend=backend), expected)
        buf = RolloutBuffer(N, 2, obs=3, actions=2, capacity=3, backend=backend)
        for _ in range(3):  # wraps; with final_values, which are copied to the ring's slots
            for _ in range(2):
                buf.append(**random_step(buf), truncated=torch.ones(N), valid=torch.arange(N) > 0)
            buf.compute_gae(torch.zeros(N), final_values=torch.ones(N, 2))
            assert len(list(buf.minibatches(2, normalize_advantages="minibatch"))) == 2
            assert next(buf.sequences(burn_in=1)).mask.any()
            buf.clear()
    finally:
        torch.use_deterministic_algorithms(False)
