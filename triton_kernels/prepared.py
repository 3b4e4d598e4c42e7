"""Repeats a launch without Triton's work on its arguments, which takes many times as long as the launch.

A launch like an earlier one differs from it in addresses and a few numbers. So the first keeps the compiled kernel and
a function that arranges its arguments, and the next ones hand addresses to the kernel's launcher. What the kernel was
specialised on is checked: dtypes, shapes, strides and devices by the guards of torch.compile, the alignment of
addresses and the range of numbers here. Whatever is unusual goes the ordinary way: a profiler's hook, another current
device, another Triton's internals.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .launch import on_device_of

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # they are private
    TensorGuards = None

# Launches kept for a key, which differ in shapes or in which addresses are aligned, and keys for a kernel. The oldest
# goes.
MOST, MOST_KEYS = 8, 256
# Once so many are kept, one in SELDOM of the launches that are not repeated is prepared, which takes as long as ten.
SELDOM = 32
LIMIT = 1 << 31
# The guards ask a nested tensor for strides, which ends the process.
NESTED = attrgetter("is_nested")

Arrange = Callable[[Sequence, Sequence], tuple[tuple[int, ...], tuple, dict[str, object]]]
"""From an operation's tensors and numbers: a launch's grid, arguments and constants. Numbers are only passed on."""
Again = Callable[[Sequence, Sequence], bool]
"""Repeats a launch with other tensors and numbers if it fits them, and returns whether it did."""


class NotPrepared(RuntimeError):
    """No launch was prepared for these arguments; nothing was launched."""


class Launches:
    """The launches of one kernel. No tensor is kept.

    ``written``: numbers of the tensors that must not overlap those numbered ``apart``, nor each other; where they do,
    a launch is not repeated.
    """

    def __init__(self, kernel: JITFunction, written: Sequence[int] = (), apart: Sequence[int] = ()) -> None:
        self.kernel, self._written, self._apart = kernel, written, apart
        self._kept: dict[Hashable, list[Again]] = {}
        self._passed = 0

    def __call__(
        self,
        key: Hashable,
        tensors: Sequence[Tensor | None],
        numbers: Sequence,
        arrange: Arrange,
        checked: bool | None = None,
    ) -> None:
        """Launches on the device of the first tensor.

        ``key``: what ``arrange`` depends on besides its arguments. ``numbers``: 32-bit integers that the kernel does
        not specialise on, and floats. ``checked``: whether somebody has checked the arguments; None: it is not known.
        With False, NotPrepared is raised unless the launch repeats one of checked arguments with the same shapes,
        dtypes, strides and devices.
        """
        key = key, checked is None
        for again in self._kept.get(key, ()):
            if again(tensors, numbers):
                return
        if checked is False:
            raise NotPrepared(f"{self.kernel.fn.__name__}: no launch is prepared for these arguments")
        if any(x is not None and x.is_neg() for x in tensors):  # only inputs: the kernel reads memory as it is
            tensors = [x if x is None else x.resolve_neg() for x in tensors]
        grid, arguments, constants = arrange(tensors, numbers)
        context = on_device_of(tensors[0])
        with context:
            compiled = self.kernel[grid](*arguments, **constants)
            if TensorGuards is None or not isinstance(self.kernel, JITFunction):
                return
            if not self._worthwhile(key, isinstance(context, torch.cuda.device)):
                return
            try:
                again = self._again(compiled, tensors, numbers, arrange)
            except Exception:  # this Triton or torch is not as those known; a caller would launch again what raised
                return
        if again is not None:
            if key not in self._kept and len(self._kept) >= MOST_KEYS:
                oldest, *_ = self._kept  # in one go: another thread may do the same
                self._kept.pop(oldest, None)
            self._kept[key] = [again, *self._kept.get(key, ())][:MOST]

    def _worthwhile(self, key: Hashable, switched: bool) -> bool:
        """Whether to prepare a launch; ``switched``: its device was not current."""
        kept = self._kept.get(key, ())
        if switched or _hooked():  # what is kept may fit
            return not kept
        if len(kept) < MOST and (kept or len(self._kept) < MOST_KEYS):
            return True
        self._passed += 1
        return self._passed % SELDOM == 0

    def cache_clear(self) -> None:
        """Forgets all launches: constants that launchers use have changed."""
        self._kept.clear()

    def _again(self, compiled: object, tensors: Sequence, numbers: Sequence, arrange: Arrange) -> Again | None:
        """A function that repeats a launch; None if the kernel was specialised on a number."""
        # Tensors of their own, as one may be several arguments.
        own, holes = [x if x is None else x.detach() for x in tensors], [Hole() for _ in numbers]
        given = [i for i, x in enumerate(tensors) if x is not None]
        places = {id(own[i]): f"p[{at}]" for at, i in enumerate(given)}
        places |= {id(x): f"n[{i}]" for i, x in enumerate(holes)}
        grid, arguments, constants = arrange(own, holes)
        bound = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
        source, names = compiled.src, {}
        values, types = (tuple(x[name] for name in self.kernel.arg_names) for x in (bound, source.signature))
        packed = _text(values, types, (), places, source.attrs, names)
        if packed is None:
            return None

        # The guards want each tensor once.
        conditions = [f"t[{i}] is None" for i, x in enumerate(tensors) if x is None]
        left = given
        while left:
            group = list({id(tensors[i]): i for i in reversed(left)}.values())
            left = [i for i in left if i not in group]
            of_group = [tensors[i] for i in group]
            shapes, strides = ([[*f(x)] for x in of_group] for f in (Tensor.size, Tensor.stride))
            guards = TensorGuards(*of_group, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides)
            names[f"match{len(names)}"] = guards.check
            conditions.append(f"match{len(names) - 1}({', '.join(f't[{i}]' for i in group)})")
        matches = eval(f"lambda t: {' and '.join(conditions)}", names)
        present = eval(f"lambda t: ({''.join(f't[{i}], ' for i in given)})")

        conditions = [f"-{LIMIT} <= n[{i}] < {LIMIT}" for i, x in enumerate(numbers) if isinstance(x, int)]
        aligned = {at: tensors[i].data_ptr() % 16 == 0 for at, i in enumerate(given)}
        conditions.append(f"not ({' | '.join(['0', *(f'p[{at}]' for at in aligned if aligned[at])])}) & 15")
        conditions += [f"p[{at}] & 15" for at in aligned if not aligned[at]]
        conditions += self._separate(tensors, given)
        pack = eval(f"lambda p, n: {packed} if {' and '.join(conditions)} else None", names)

        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        active, address, (x, y, z) = driver.active, Tensor.data_ptr, (*grid, 1, 1)[:3]
        device, stream, current = active.get_current_device(), active.get_current_stream, active.get_current_device
        if torch.cuda.device_count() == 1:  # asking CUDA is much of what a launch costs
            current = int

        def again(tensors: Sequence[Tensor | None], numbers: Sequence) -> bool:
            if current() != device or _hooked():
                return False
            there = present(tensors)
            try:
                if any(map(NESTED, there)):
                    return False
            except AttributeError:  # not all are tensors
                return False
            if not matches(tensors):
                return False
            arguments = pack([*map(address, there)], numbers)
            if arguments is None:
                return False
            run(x, y, z, stream(device), function, metadata, None, None, None, *arguments)
            return True

        return again

    def _separate(self, tensors: Sequence[Tensor | None], given: list[int]) -> list[str]:
        """Conditions for outputs to have memory of their own."""
        at = {i: f"p[{n}]" for n, i in enumerate(given)}
        found = []
        for i, out in enumerate(self._written):
            for other in (*self._apart, *self._written[:i]):
                if out in at and other in at:
                    ends = [f"{at[x]} + {_span(tensors[x])} <= {at[y]}" for x, y in ((out, other), (other, out))]
                    found.append(f"({' or '.join(ends)})")
        return found


class Hole:
    """In place of a number, to see where it goes."""


def _text(
    x: object, type_: object, path: tuple, places: dict[int, str], attributes: dict, names: dict[str, object]
) -> str | None:
    """The expression that makes an argument from the addresses p and the numbers n; None if the kernel's type of it
    may not fit others. ``names``: receives the constants."""
    if isinstance(x, tuple) and isinstance(type_, tuple):
        inner = [
            _text(y, z, (*path, i), places, attributes, names) for i, (y, z) in enumerate(zip(x, type_, strict=True))
        ]
        return None if None in inner else "(" + "".join(f"{y}, " for y in inner) + ")"
    place = places.get(id(x))
    if place is None:
        names[f"c{len(names)}"] = x
        return f"c{len(names) - 1}"
    if isinstance(x, Hole):
        return place if type_ in ("i32", "fp64") and path not in attributes else None
    return place if str(type_).startswith("*") else None


def _span(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    return 0 if x.numel() == 0 else (sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1) * x.element_size()


def _hooked() -> bool:
    """Whether a profiler wants to know of launches."""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
    )


_contents: dict[int, tuple[weakref.ref, int, Hashable]] = {}


def contents(x: Tensor) -> Hashable:
    """The numbers of a small tensor on the CPU, read once."""
    at = id(x)
    kept = _contents.get(at)
    if kept is not None and kept[0]() is x and kept[1] == x._version:
        return kept[2]
    found = tuple(x.flatten().tolist())
    if not x.is_inference():  # else it has no version
        _contents[at] = weakref.ref(x, lambda gone: _contents.pop(at, None)), x._version, found
    return found
