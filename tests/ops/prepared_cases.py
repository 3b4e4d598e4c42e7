"""A repeated launch is the launch that Triton itself would make: same kernel, grid, stream and arguments, to the bit.

test_launches.py runs them, in a process whose Triton launches nothing (no_cuda.py).
"""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import no_cuda
import pytest
import torch
from torch import Tensor
from triton import jit, knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import pydrone
from pydrone._triton import append, gae, gather, prepared
from pydrone.buffer import RolloutBuffer
from pydrone.ops import dispatch, native, triton
from pydrone.ops.schema import SCALAR_TYPES, workspace_size
from pydrone.rollout import storage

STUB = no_cuda.install(Path(tempfile.mkdtemp(prefix="no-cuda-")))
MODULES = {"append": append, "gae": gae, "gather": gather}
N, T = 6, 8


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch) -> Iterator[None]:
    """The backend "stub": Triton's, on CPU tensors. Planes are env-major, as on a GPU."""
    monkeypatch.setattr(native, "CUDA_MISSING", None)
    monkeypatch.setitem(dispatch._cache, ("cpu", "stub", None), dispatch._operations("triton"))
    monkeypatch.setattr(
        storage, "allocate", lambda wanted, device: {x.name: torch.zeros(x.shape, dtype=x.dtype) for x in wanted}
    )
    STUB.expect([])
    for module in MODULES.values():
        module.LAUNCHES.cache_clear()
    yield
    driver.active.device = 0


@pytest.fixture
def bound(monkeypatch) -> list[str]:
    """The kernels that Triton binds arguments for, one name a launch of the ordinary kind."""
    seen, run = [], JITFunction.run

    def ordinary(self, *args, **options):
        seen.append(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", ordinary)
    return seen


def flat(types: object) -> list[str]:
    if isinstance(types, (tuple, list)):
        return [y for x in types for y in flat(x)]
    return [] if types == "constexpr" else [types]


@pytest.fixture
def many(monkeypatch) -> None:
    """All launches of a test are kept: each call meets those of all others."""
    monkeypatch.setattr(prepared, "MOST", 64)


def launched(operation: str, arguments: tuple, what: str = "", repeated: bool = True) -> None:
    """The launch of an operation as it comes, then repeated, compared with Triton's own."""
    module = MODULES[operation]
    launches, call = module.LAUNCHES, getattr(module, operation)
    kept = launches._kept
    STUB.expect([])
    launches._kept = {}
    call(*arguments)
    # the kernel that this launch was of, by its handle
    handle = STUB.last().function
    ((cache, *_),) = (x for x in launches.kernel.device_caches.values())
    compiled = next(x for x in cache.values() if x.function == handle)
    STUB.expect(flat(tuple(compiled.src.signature.values())))
    launches._kept = {}
    call(*arguments)
    expected = STUB.last()
    launches._kept = kept
    call(*arguments)
    assert STUB.last() == expected, what
    checked = STUB.pointers_checked
    call(*arguments)
    assert STUB.last() == expected, what
    assert (STUB.pointers_checked == checked) == repeated, what


class Step:
    """Arguments of append: two fields, two planes, flags, a pool, finite values looked for."""

    def __init__(self) -> None:
        self.memory = [
            torch.zeros(T, N, 64, dtype=torch.uint8),
            torch.zeros(N, T, dtype=torch.uint8),
            torch.zeros(N, T),
            torch.zeros(N, T),
            torch.zeros(2, 5, 32, dtype=torch.uint8),
            torch.zeros(2, 2, dtype=torch.int32),
            torch.zeros(N, T, dtype=torch.int32),
            torch.zeros(2, dtype=torch.int32),
        ]
        f32 = SCALAR_TYPES[torch.float32]
        self.layout = torch.tensor([[2, 2, 1, 1], [0, f32, 5, 1], [32, f32, 1, 0], [0, f32, 5, 1]])

    def arguments(self, **change) -> tuple:
        given = {"obs": torch.randn(N, 5), "value": torch.randn(N), "reward": torch.randn(N)}
        given |= {"final": torch.randn(N, 5), "dones": torch.rand(N) < 0.5, "truncated": torch.rand(N) < 0.5}
        given |= {"valid": None, "slot": 3, "pool_slot": 1}
        given |= {"cursor": None, "commit": True, "layout": self.layout} | change
        x = given
        sources = [x["obs"], x["value"], x["value"], x["reward"], x["final"]]
        return (self.memory, sources, x["layout"], x["dones"], x["truncated"], x["valid"], x["slot"], x["pool_slot"],
                x["cursor"], x["commit"])  # fmt: skip


def off_by_one(x: Tensor) -> Tensor:
    """The same numbers where no address is a multiple of 16."""
    return x.new_empty(x.numel() + 1)[1:].copy_(x.flatten()).view(x.shape)


STEPS: dict[str, Callable[[], dict]] = {
    "other tensors": lambda: {},
    "another slot": lambda: {"slot": 7, "pool_slot": 0},
    "slot 1": lambda: {"slot": 1},
    "slot 0": lambda: {"slot": 0, "pool_slot": 0},
    "strides": lambda: {"obs": torch.randn(N, 10)[:, ::2]},
    "time-major": lambda: {"obs": torch.randn(5, N).t()},
    "dtype": lambda: {"obs": torch.randn(N, 5).double()},
    "int flags": lambda: {"dones": torch.ones(N, dtype=torch.int64)},
    "[N, 1]": lambda: {"reward": torch.randn(N, 1)},
    "unaligned": lambda: {"obs": off_by_one(torch.randn(N, 5))},
    "unaligned scalar": lambda: {"value": off_by_one(torch.randn(N))},
    "one tensor twice": lambda: dict.fromkeys(("value", "reward"), torch.ones(N)),
    "valid": lambda: {"valid": torch.ones(N, dtype=torch.bool)},
    "valid for truncated": lambda: {"valid": torch.ones(N, dtype=torch.bool), "truncated": None},
    "cursor": lambda: {"cursor": torch.zeros(5, dtype=torch.int64)},
    "no commit": lambda: {"commit": False, "cursor": torch.zeros(5, dtype=torch.int64)},
    "no truncations": lambda: {"truncated": None},
    "requires grad": lambda: {"value": torch.randn(N, requires_grad=True)},
    "beyond 32 bits": lambda: {"slot": 1 << 31},
}  # fmt: skip


@pytest.mark.parametrize("before", ["other tensors", "unaligned", "one tensor twice", "beyond 32 bits"])
def test_append(before, many):
    step = Step()
    append.append(*step.arguments(**STEPS[before]()))
    for name in [*STEPS, *STEPS]:
        launched("append", step.arguments(**STEPS[name]()), name, repeated=name != "beyond 32 bits")
    other = step.layout.clone()
    other[2, 0] = 40
    launched("append", step.arguments(layout=other))
    step.layout[2, 0] = 48  # the same tensor, with other numbers
    launched("append", step.arguments())


def scan(n: int = N, stats: bool = True, **change) -> tuple:
    given = {"rewards": torch.randn(n, T), "values": torch.randn(n, T), "dones": torch.zeros(n, T, dtype=torch.uint8)}
    given |= {"truncated": None, "valid": None, "last_values": torch.randn(n), "final_values": None}
    given |= {"final_rows": None, "gamma": 0.99, "lam": 0.95, "start": 0, "coded": True, "bootstrap": 0, "cursor": None}
    given |= {"advantages": torch.empty(n, T), "returns": torch.empty(n, T)}
    given["stats"] = torch.empty(3, dtype=torch.float64) if stats else None
    given["workspace"] = torch.zeros(workspace_size(n), dtype=torch.float64) if stats else None
    return tuple((given | change).values())


ROWS = torch.zeros(N, T, dtype=torch.int32)
SCANS: dict[str, Callable[[], dict]] = {
    "other tensors": lambda: {},
    "gamma": lambda: {"gamma": 0.5},
    "gamma 1": lambda: {"gamma": 1.0, "lam": 1.0},
    "gamma 0, an int": lambda: {"gamma": 0, "lam": 1},
    "starts": lambda: {"start": 4, "advantages": torch.empty(N, 4), "returns": torch.empty(N, 4)},
    "starts odd": lambda: {"start": 5, "advantages": torch.empty(N, 4), "returns": torch.empty(N, 4)},
    "no returns": lambda: {"returns": None},
    "no statistics": lambda: {"stats": None, "workspace": None},
    "columns": lambda: {"rewards": torch.randn(T, N).t()},
    "unaligned": lambda: {"values": off_by_one(torch.randn(N, T))},
    "float64": lambda: {"advantages": torch.empty(N, T).double(), "returns": torch.empty(N, T).double()},
    "flags": lambda: {"coded": False, "truncated": torch.ones(N, T, dtype=torch.bool), "bootstrap": 2},
    "cursor": lambda: {"cursor": torch.zeros(5, dtype=torch.int64)},
    "pool": lambda: {"final_values": torch.randn(4), "final_rows": ROWS, "bootstrap": 1},
    "a larger pool": lambda: {"final_values": torch.randn(5), "final_rows": ROWS, "bootstrap": 1},
}  # fmt: skip


@pytest.mark.parametrize("before", ["other tensors", "unaligned", "gamma 1"])
def test_gae(before, many):
    gae.gae(*scan(**SCANS[before]()))
    for name in [*SCANS, *SCANS]:
        launched("gae", scan(**SCANS[name]()), name)
    launched("gae", scan(n=N + 1))


def minibatch(batch: int = 12, **change) -> tuple:
    f32 = SCALAR_TYPES[torch.float32]
    given = {"rows": torch.zeros(T, N, 64, dtype=torch.uint8), "offsets": [0, 32], "dtypes": [f32, f32]}
    given |= {"outputs": [torch.empty(batch, 5), torch.empty(batch)], "value_offset": 32}
    given |= {"advantages": torch.randn(N, T), "returns": None, "stats": torch.ones(3).double(), "subset": None}
    given |= {"num_steps": T, "start": 0, "num_samples": N * T, "key": 7, "rollout": 3, "epoch": 2, "shuffle": True}
    given |= {"first": 12, "cursor": None, "advantages_out": torch.empty(batch), "returns_out": torch.empty(batch)}
    given["indices_out"] = None
    return tuple((given | change).values())


MINIBATCHES: dict[str, dict] = {
    "other tensors": {},
    "key": {"key": -(2**63), "rollout": 2**40, "epoch": 2**31},
    "ones": {"key": 1, "rollout": 1, "epoch": 1, "first": 1},
    "first": {"first": 36, "epoch": 0},
    "starts": {"start": 3},
    "in order": {"shuffle": False},
    "one fewer": {"batch": 11},
    "no statistics": {"stats": None},
    "subset": {"subset": torch.arange(20), "num_samples": 20, "first": 0},
    "bytes": {"offsets": [4, 32]},
    "indices": {"indices_out": torch.empty(12, dtype=torch.int64)},
    "cursor": {"cursor": torch.zeros(5, dtype=torch.int64)},
}


def test_gather(many):
    gather.gather(*minibatch())
    for name in [*MINIBATCHES, *MINIBATCHES]:
        launched("gather", minibatch(**MINIBATCHES[name]), name)


def buffer(**options) -> RolloutBuffer:
    return RolloutBuffer(N, T, obs=5, actions=2, fields={"mu": 2}, backend="stub", **options)


def row() -> dict[str, Tensor]:
    pairs = {name: torch.randn(N, 2) for name in ("actions", "mu")}
    return {"obs": torch.randn(N, 5), "values": torch.randn(N), "log_probs": torch.randn(N)} | pairs


def ends() -> dict[str, Tensor]:
    return {"rewards": torch.randn(N), "dones": torch.rand(N) < 0.5}


def rollouts(buf: RolloutBuffer, count: int) -> None:
    for _ in range(count):
        for t in range(T):
            if t % 2:
                buf.append(**row(), **ends())
            else:
                buf.begin(**row())
                buf.end(**ends())
        buf.compute_gae(torch.randn(N), check=False)
        for _ in buf.minibatches(3, num_epochs=2):
            pass
        buf.clear()


def test_a_buffer_binds_arguments_once(bound):
    """Each kind of launch goes through Triton's own path once, then never again; each is one launch."""
    buf = buffer()
    rollouts(buf, 1)
    assert sorted(bound) == ["append_kernel"] * 3 + ["gae_kernel", "gather_kernel"]
    bound.clear()
    launches, checked = STUB.launches, STUB.pointers_checked
    rollouts(buf, 3)
    rollouts(buffer(), 1)  # another of the same sizes
    assert not bound and STUB.pointers_checked == checked
    assert STUB.launches - launches == 4 * (T + T // 2 + 1 + 6)


def test_python_calls_of_a_launch():
    """The functions that a call of a buffer enters, a number that does not depend on the machine's load."""
    buf, last = buffer(), torch.randn(N)
    step = row() | ends()
    buf.append(**step)

    def entered(call: Callable[[], object]) -> int:
        call()
        seen = 0

        def count(frame, event, argument) -> None:
            nonlocal seen
            seen += event == "call"

        sys.setprofile(count)
        call()
        sys.setprofile(None)
        return seen

    assert entered(lambda: buf.append(**step)) <= 36
    while not buf.full:
        buf.append(**step)
    assert entered(lambda: buf.compute_gae(last, check=False)) <= 36
    out, x = (torch.empty(N, T), torch.empty(N, T)), torch.randn(3, N, T)
    assert entered(lambda: pydrone.gae(*x, last, out=out, backend="stub")) <= 48
    mbs = buf.minibatches(2, num_epochs=3, reuse=True)
    next(mbs)
    assert entered(lambda: next(mbs)) <= 47


def test_what_was_not_checked_is_launched_only_as_what_was():
    arguments = scan(stats=False)
    unchecked = dispatch._operations("triton").unchecked
    with pytest.raises(prepared.NotPrepared, match=r"^gae_kernel: no launch is prepared for these arguments$"):
        unchecked.gae(*arguments)
    triton.gae(*arguments)  # nobody knows whether these are right
    before = STUB.launches
    with pytest.raises(prepared.NotPrepared):
        unchecked.gae(*arguments)
    assert STUB.launches == before
    dispatch._operations("triton").gae(*arguments)
    unchecked.gae(*scan(stats=False))
    assert STUB.launches == before + 2
    with pytest.raises(prepared.NotPrepared):
        unchecked.gae(*scan(stats=False, advantages=torch.empty(N, T - 1)))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_mistakes_are_named_after_the_same_launch_was_prepared():
    buf, step, x = buffer(), row() | ends(), torch.randn(3, N, T)
    for _ in range(2):
        buf.append(**step)
        pydrone.gae(*x, torch.ones(N), backend="stub")
    before = STUB.launches
    with pytest.raises(ValueError, match=r"^obs: expected shape \[6, 5\], got \[6, 4\]$"):
        buf.append(**step | {"obs": torch.randn(N, 4)})
    with pytest.raises(TypeError, match=r"^rewards: expected a floating dtype, got torch.int64$"):
        buf.append(**step | {"rewards": torch.zeros(N, dtype=torch.int64)})
    for wrong in (torch.nested.nested_tensor([*step["obs"]]), step["obs"].tolist(), step["obs"].numpy()):
        with pytest.raises(TypeError, match=r"^obs: expected a "):
            buf.append(**step | {"obs": wrong})
    with pytest.raises(TypeError, match=r"^rewards: expected a strided tensor, got a nested one$"):
        pydrone.gae(torch.nested.nested_tensor([*x[0]]), *x[1:], torch.ones(N), backend="stub")
    assert STUB.launches == before and len(buf) == 2


def test_outputs_of_gae_have_memory_of_their_own():
    """As where nothing was prepared: the repeated launch looks at addresses."""
    x, last, out = torch.randn(3, N, T), torch.randn(N), (torch.empty(N, T), torch.empty(N, T))
    for _ in range(2):
        pydrone.gae(*x, last, out=out, backend="stub")
    before = STUB.launches
    for wrong in ((x[0], out[1]), (out[0], x[2]), (out[0], out[0])):
        with pytest.raises(ValueError, match=r"^out\[[01]\]: expected memory of its own"):
            pydrone.gae(*x, last, out=wrong, backend="stub")
    assert STUB.launches == before


def test_hooks_hear_of_every_launch(bound):
    heard = []
    arguments = scan()
    gae.gae(*arguments)

    def hook(metadata) -> None:
        heard.append(metadata.get()["name"])

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        bound.clear()
        gae.gae(*arguments)
        assert not bound
        chain.add(hook)
        try:
            gae.gae(*arguments)
        finally:
            chain.remove(hook)
        assert heard.pop() == "gae_kernel" and not heard


def test_another_current_device_is_no_repetition(bound):
    arguments = scan()
    for _ in range(2):
        gae.gae(*arguments)
    assert len(bound) == 1
    driver.active.device = 1
    gae.gae(*arguments)
    assert len(bound) == 2


def test_no_tensor_is_kept():
    arguments = [scan(), minibatch(), Step().arguments()]
    for call, given in zip((gae.gae, gather.gather, append.append), arguments, strict=True):
        call(*given), call(*given)
    lists = [x for given in arguments for y in given for x in (y if isinstance(y, list) else [y])]
    gone = [weakref.ref(x) for x in lists if isinstance(x, Tensor)]
    del arguments, given, lists
    gc.collect()
    assert gone and not any(x() is not None for x in gone)
    assert not prepared._contents


def test_launches_kept_are_few():
    for n in range(1, 12):
        gae.gae(*scan(n=n))
    for start in range(prepared.MOST_KEYS + 9):
        gae.gae(*scan(start=start, rewards=torch.randn(N, 512), values=torch.randn(N, 512), stats=False,
                      dones=torch.zeros(N, 512, dtype=torch.uint8)))  # fmt: skip
    kept = gae.LAUNCHES._kept
    assert len(kept) == prepared.MOST_KEYS and all(len(x) <= prepared.MOST for x in kept.values())


@pytest.fixture
def made(monkeypatch) -> list[None]:
    """As many as launches were prepared, each of which takes as long as ten launches."""
    seen, again = [], prepared.Launches._again

    def counted(*args):
        seen.append(None)
        return again(*args)

    monkeypatch.setattr(prepared.Launches, "_again", counted)
    return seen


def test_what_is_never_repeated_is_seldom_prepared(made):
    """Outputs whose memory is interleaved, and launches of ever more kinds."""
    both = torch.empty(N, T, 2)
    arguments = scan(advantages=both[..., 0], returns=both[..., 1])
    for _ in range(prepared.MOST + 3 * prepared.SELDOM):
        gae.gae(*arguments)
    assert len(made) == prepared.MOST + 3
    made.clear()
    gae.LAUNCHES.cache_clear()
    for n in range(prepared.MOST_KEYS + 2 * prepared.SELDOM):
        gae.LAUNCHES(n, *arguments_of(scan(stats=False)))
    assert len(made) == prepared.MOST_KEYS + 2


def arguments_of(given: tuple) -> list:
    """What gae hands to Launches."""
    seen: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gae, "LAUNCHES", lambda key, *args: seen.extend(args))
        gae.gae(*given)
    return seen


def test_unusual_launches_are_prepared_once(made, monkeypatch):
    """With a profiler, or on a device that is not current, none is repeated."""
    arguments = scan()
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(4):
            gae.gae(*arguments)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(made) == 1
    made.clear()
    gae.LAUNCHES.cache_clear()

    class Device(contextlib.nullcontext):
        pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(prepared, "on_device_of", lambda x: Device())
    for _ in range(4):
        gae.gae(*arguments)
        driver.active.device = 1
    assert len(made) == 1


def hook(metadata) -> None:
    pass


@pytest.mark.parametrize("gone", ["TensorGuards", "source", "run"])
def test_where_internals_are_not_as_known_launches_are_ordinary(gone, bound, monkeypatch):
    def without(self, compiled, *rest):
        class Other:
            src = compiled.src if gone == "run" else object()

        return again(self, Other(), *rest)

    again = prepared.Launches._again
    if gone == "TensorGuards":
        monkeypatch.setattr(prepared, "TensorGuards", None)
    else:
        monkeypatch.setattr(prepared.Launches, "_again", without)
    arguments = scan()
    before = STUB.launches
    for _ in range(3):
        gae.gae(*arguments)
    assert bound == ["gae_kernel"] * 3 and STUB.launches == before + 3


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AssertionError])
def test_a_launch_whose_preparation_fails_is_launched_once(error, monkeypatch):
    """dispatch would have CUDA do what Triton has done: a step would be stored twice."""

    def fail(*args) -> None:
        raise error("not as known")

    monkeypatch.setattr(prepared, "_text", fail)
    monkeypatch.setattr(dispatch, "capturing", lambda device: False)
    eager = dispatch.Backend("cuda", True, *[fail] * 4)
    operations = dispatch._by_cursor(eager, dispatch._operations("triton"))
    before = STUB.launches
    operations.append(*Step().arguments(cursor=torch.zeros(5, dtype=torch.int64)))
    assert STUB.launches == before + 1


def test_a_specialised_number_is_not_repeated(bound, monkeypatch):
    """A kernel that specialised on a number that may change would compute with the old one."""
    kernel, seen = jit(gae.gae_kernel.fn, do_not_specialize=["num_envs", "capacity", "pool_size"]), []

    def keep(key, tensors, numbers, arrange, checked) -> None:
        seen[:] = arrange(tensors, numbers)

    monkeypatch.setattr(gae, "LAUNCHES", keep)
    gae.gae(*scan(stats=False))
    (grid, arguments, constants), at = seen, kernel.arg_names.index("start")

    def arrange(tensors, numbers) -> tuple:
        return grid, (*arguments[:at], *numbers, *arguments[at + 1 :]), constants

    launches = prepared.Launches(kernel)
    for start in (16, 16, 1):
        launches((), [arguments[4]], (start,), arrange)
    assert len(bound) == 3


def test_the_stub_sees_what_is_given():
    """The comparison above is of something."""
    STUB.expect(["*fp32"] * 2)
    arguments = scan()
    gae.gae(*arguments)
    assert STUB.last().arguments == (arguments[0].data_ptr(), arguments[1].data_ptr())
    assert STUB.last().grid == (1, 1, 1) and STUB.last().stream == 7
