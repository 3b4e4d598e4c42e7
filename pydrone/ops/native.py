"""Loads the compiled libraries; registers the operations' schemas, fakes and fallbacks with PyTorch.

``torch.ops.pydrone.<op>`` runs the native CPU or CUDA library where built. Otherwise it runs Triton on CUDA tensors
and the plain PyTorch reference on all others; those of PPO_SCHEMAS have no reference, those of CPU_SCHEMAS no Triton
either. The libraries hold implementations only; the schemas are defined here, so that the operations exist without a
compiler too.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from pydrone.ops import reference, triton
from pydrone.ops.schema import CPU_QUERIES, CPU_SCHEMAS, LEARNER_SCHEMAS, PPO_SCHEMAS, SCHEMAS

PACKAGE = Path(__file__).resolve().parent.parent

_library = torch.library.Library("pydrone", "DEF")


def _fake(signature: str):
    """A fake kernel. The operations write into given outputs, so a trace has nothing to compute.

    A call that mixes "meta" tensors with real ones is dispatched here too; it is refused, not silently skipped.
    """
    names = [x.name for x in torch._C.parse_schema(signature).arguments]
    layouts = {i: name for i, name in enumerate(names) if name.endswith("layout")}  # always on the CPU

    def fake(*args) -> None:
        for i, layout in layouts.items():
            if args[i] is not None and args[i].device.type != "cpu":
                raise RuntimeError(f"{layout}: expected a tensor on the CPU, got one on {args[i].device}")
        given = [x for i, x in enumerate(args) if i not in layouts]
        tensors = [x for arg in given for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        devices = {x.device for x in tensors if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"expected all tensors on one device, got {', '.join(sorted(map(str, devices)))}")

    return fake


def _plain(name: str):
    """The reference, for every device. Tensors that are not plain strided memory are refused before any write."""
    run = getattr(reference, name)
    names = list(inspect.signature(run).parameters)

    def checked(*args) -> None:
        for argument, value in zip(names, args, strict=True):
            for x in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(x, Tensor) and (x.layout != torch.strided or x.is_nested or x.is_quantized):
                    kind = "nested" if x.is_nested else x.dtype if x.is_quantized else x.layout
                    raise RuntimeError(f"{argument}: expected a strided tensor, got {kind}")
        run(*args)

    return checked


def _triton(name: str):
    def launch(*args) -> None:
        getattr(triton, name)(*args)

    return launch


def define(library: torch.library.Library, name: str, schema: str) -> None:
    """Defines an operation and its fake kernel."""
    library.define(name + schema)
    torch.library.register_fake(f"{library.ns}::{name}", _fake(name + schema), lib=library)


def fall_back(library: torch.library.Library, name: str) -> None:
    """Registers the reference for every device without a kernel."""
    for key in ("CompositeExplicitAutograd", "MkldnnCPU", "AutogradNestedTensor"):
        library.impl(name, _plain(name), key)


def build_info() -> dict:
    """What the build recorded: ``native_cpu`` and ``native_cuda`` (None, or why it is missing), and what built them."""
    path = PACKAGE / "_build_info.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _libraries(package: Path, stem: str) -> list[Path]:
    return [path for path in sorted(package.glob(f"{stem}*")) if path.suffix in {".so", ".dylib", ".pyd"}]


def _not_built(stem: str) -> str:
    """Why there is no library in this package, and what to do."""
    tree, recorded = PACKAGE.parent, build_info().get(stem.removeprefix("_"))
    if recorded or not (tree / "csrc").is_dir():
        return recorded or "not built: reinstall where a C++ compiler is found"
    for other in (Path(entry, "pydrone").resolve() for entry in sys.path):
        if other != PACKAGE and _libraries(other, stem):
            return f"not built: the source tree {tree} hides the installed package {other}; start Python elsewhere"
    return f"not built: {tree} is a source tree; pip install -e {tree} builds it"


def _load(stem: str) -> str | None:
    """Loads ``pydrone/<stem>*.so`` (or .dylib, .pyd). Returns None, or why it is missing."""
    found = _libraries(PACKAGE, stem)
    if not found:
        return _not_built(stem)
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load: {error}"
    return None


for _name, _schema in (SCHEMAS | PPO_SCHEMAS | CPU_SCHEMAS | LEARNER_SCHEMAS).items():
    define(_library, _name, _schema)
for _name, _schema in CPU_QUERIES.items():
    _library.define(_name + _schema)

CPU_MISSING = _load("_native_cpu")
# What the library exports itself: pydrone_append (csrc/cpu/append.cpp). A call releases the GIL.
CPU_LIBRARY = None
if CPU_MISSING is None:
    CPU_LIBRARY = ctypes.CDLL(str(_libraries(PACKAGE, "_native_cpu")[0]))
    CPU_LIBRARY.pydrone_append.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    CPU_LIBRARY.pydrone_append.restype = ctypes.c_int
CUDA_MISSING = _load("_native_cuda") if torch.version.cuda else "this PyTorch is built without CUDA"

for _name in (*SCHEMAS, *LEARNER_SCHEMAS):
    fall_back(_library, _name)
    if CUDA_MISSING is not None or _name in LEARNER_SCHEMAS:
        _library.impl(_name, _triton(_name), "CUDA")
for _name in PPO_SCHEMAS:
    _library.impl(_name, _triton(_name), "CUDA")
