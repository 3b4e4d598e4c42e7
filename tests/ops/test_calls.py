"""Which backend a call goes to on CUDA, and what is kept for a stream, with CUDA's answers given by the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_ops import SCHEMAS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pydrone.ops import dispatch, native, reference, streams, triton
from pydrone.ops.dispatch import Backend
from pydrone.ops.schema import workspace_size

CUDA = torch.device("cuda", 0)


@pytest.fixture
def stream(monkeypatch) -> dict[str, int]:
    """The current stream, and how often CUDA was asked whether it is captured."""
    now = {"handle": 0, "captured": 0, "asked": 0}

    def asked() -> bool:
        now["asked"] += 1
        return bool(now["captured"])

    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: now["handle"], raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked)
    monkeypatch.setattr(streams, "_kept", {})
    return now


def test_the_default_stream_is_never_captured(stream):
    assert not streams.capturing(0) and stream["asked"] == 0
    stream["handle"] = 5
    assert not streams.capturing(0)
    stream["captured"] = 1
    assert streams.capturing(0) and stream["asked"] == 2


def test_a_workspace_is_kept_for_a_stream_and_a_size(stream, monkeypatch):
    made = []

    def zeros(num_envs: int, device: torch.device) -> torch.Tensor:
        made.append((num_envs, str(device)))
        return torch.zeros(num_envs)

    monkeypatch.setattr(streams, "_zeros", zeros)
    first = streams.workspace(4, 8, CUDA, "cuda")
    assert streams.workspace(4, 8, CUDA, "cuda") is first and made == [(4, "cuda:0")]
    others = [streams.workspace(*x) for x in ((5, 8, CUDA, "cuda"), (4, 9, CUDA, "cuda"), (4, 8, CUDA, "triton"))]
    stream["handle"] = 5
    others.append(streams.workspace(4, 8, CUDA, "cuda"))
    assert len({id(x) for x in (first, *others)}) == 5
    assert streams.workspace(4, 8, CUDA, "cuda") is others[-1]
    # A graph is replayed on any stream; on a CPU there is none.
    stream["captured"] = 1
    within = [streams.workspace(4, 8, CUDA, "cuda") for _ in range(2)]
    assert within[0] is not within[1] and not {id(x) for x in within} & {id(x) for x in others}
    assert streams.workspace(4, 8, torch.device("cpu"), "cpu") is not streams.workspace(
        4, 8, torch.device("cpu"), "cpu"
    )
    stream["captured"] = 0
    for n in range(streams.MOST + 5):
        streams.workspace(n, 1, CUDA, "cuda")
    assert len(streams._kept) == streams.MOST


def test_a_workspace_made_within_a_mode_is_not_kept(stream, monkeypatch):
    """A fake one would be handed to launches, and a real one to fake operations."""
    monkeypatch.setattr(streams, "_zeros", lambda num_envs, device: torch.zeros(num_envs))
    with FakeTensorMode():
        assert isinstance(streams.workspace(4, 8, CUDA, "cuda"), FakeTensor)
    torch.func.functionalize(lambda x: x + streams.workspace(4, 8, CUDA, "cuda"))(torch.ones(4))
    kept = streams.workspace(4, 8, CUDA, "cuda")
    assert type(kept) is torch.Tensor and not torch._is_functional_tensor(kept)
    with FakeTensorMode():
        assert isinstance(streams.workspace(4, 8, CUDA, "cuda"), FakeTensor)
    assert streams.workspace(4, 8, CUDA, "cuda") is kept


def test_a_workspace_is_zeroed_memory_of_the_size_wanted():
    found = streams.workspace(9, 3, torch.device("cpu"), "cpu")
    assert found.dtype == torch.float64 and found.tolist() == [0.0] * workspace_size(9)


def fake(name: str, said: list[tuple[str, str]], prepared: Backend | None = None) -> Backend:
    def operation(kind: str) -> Callable[..., None]:
        return lambda *args: said.append((name, kind))

    return Backend(name, True, *map(operation, SCHEMAS), prepared)


def refusing(*args) -> None:
    raise RuntimeError("not prepared")


def arguments(operation: str, cursor: torch.Tensor | None) -> list:
    names = [x.name for x in torch._C.parse_schema(operation + SCHEMAS[operation]).arguments]
    return [cursor if name == "cursor" else None for name in names]


@pytest.mark.parametrize("operation", SCHEMAS)
def test_with_a_cursor_it_is_triton(operation, monkeypatch):
    """Eager calls go to cuda; those of a graph to Triton, if it has prepared them: a capture may load no kernel."""
    said, captured = [], [False]
    monkeypatch.setattr(dispatch, "capturing", lambda device: captured[0])
    cursor, known = torch.zeros(5), fake("prepared", said)
    unknown = Backend("prepared", True, *[refusing] * len(SCHEMAS))
    for prepared, within in ((known, "prepared"), (unknown, "cuda")):
        ops = dispatch._by_cursor(fake("cuda", said), fake("triton", said, prepared))
        assert ops.name == "cuda" and ops.checks
        run, unchecked = getattr(ops, operation), getattr(ops.unchecked, operation)
        captured[0] = False
        run(*arguments(operation, None)), unchecked(*arguments(operation, None))
        run(*arguments(operation, cursor))
        captured[0] = True
        run(*arguments(operation, cursor))
        assert [x for x, _ in said] == ["cuda", "cuda", "triton", within]
        assert {kind for _, kind in said} == {operation}
        said.clear()
        if prepared is known:
            unchecked(*arguments(operation, cursor))
            assert said == [("prepared", operation)]
        else:
            with pytest.raises(RuntimeError):
                unchecked(*arguments(operation, cursor))
            assert not said
        said.clear()


def test_where_triton_fails_a_graph_gets_cuda(monkeypatch):
    """Before a capture: then nothing is prepared, and the capture launches CUDA's kernels too."""
    said: list[tuple[str, str]] = []
    monkeypatch.setattr(dispatch, "capturing", lambda device: False)
    broken = Backend("triton", False, *[refusing] * len(SCHEMAS), Backend("prepared", True, *[refusing] * len(SCHEMAS)))
    ops = dispatch._by_cursor(fake("cuda", said), broken)
    with pytest.warns(RuntimeWarning, match=r"^append: Triton failed, CUDA does it: not prepared$"):
        ops.append(*arguments("append", torch.zeros(5)))
    assert said == [("cuda", "append")]


def test_the_default_on_cuda(monkeypatch):
    def default() -> Backend:
        monkeypatch.setattr(dispatch, "_cache", {})
        monkeypatch.delenv("PYDRONE_BACKEND", raising=False)
        return dispatch.select(CUDA)

    monkeypatch.setattr(native, "CUDA_MISSING", None)
    monkeypatch.setattr(triton, "missing", lambda: None)
    both = default()
    assert both.name == "cuda" and both.prepared is not None
    monkeypatch.setattr(triton, "missing", lambda: "triton is not installed")
    assert default() == dispatch._operations("cuda") and default().unchecked.gae is torch.ops.pydrone.gae.default
    monkeypatch.setattr(native, "CUDA_MISSING", "no nvcc")
    alone = default()
    assert alone.name == "triton" and not alone.checks and alone.unchecked is alone.prepared


def test_operations_that_check_their_arguments_take_unchecked_ones():
    cpu = Backend("cpu", True, *[reference.gae] * len(SCHEMAS))
    assert cpu.unchecked is cpu and dispatch._operations("reference").unchecked is None
    assert cpu._replace(checks=False).unchecked is None
