"""The formats that other libraries read: TorchScript, ONNX and safetensors. Each is written, and read back."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydrone.ops.packages import needed
from pydrone.ppo.exporting.layers import Layers, Network, run

Runner = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


def _example(sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    num_obs, memory = sizes
    # Two rows: the exporter would take a size of one for a constant.
    return (torch.zeros(2, num_obs), torch.zeros(2, memory)) if memory else (torch.zeros(2, num_obs),)


def _write_torchscript(path: Path, layers: Layers, tensors: Any, sizes: tuple[int, int], metadata: dict) -> None:
    with warnings.catch_warnings():
        # TorchScript is deprecated, but C++ programs still load it.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Network(layers, tensors).eval(), _example(sizes))
        torch.jit.save(torch.jit.freeze(traced), str(path), _extra_files={"pydrone.json": json.dumps(metadata)})


def _read_torchscript(path: Path) -> tuple[Runner, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(str(path))
    return lambda obs, memory: _pair(loaded(obs) if memory is None else loaded(obs, memory)), "TorchScript"


def _write_onnx(path: Path, layers: Layers, tensors: Any, sizes: tuple[int, int], metadata: dict) -> None:
    with needed("onnx", "the export", '"pydrone-rl[export]"'):
        import onnx

    names = ["obs", "memory"] if sizes[1] else ["obs"]
    outputs = ["actions", "next_memory"] if sizes[1] else ["actions"]
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Network(layers, tensors).eval(),
            _example(sizes),
            dynamo=True,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=dict.fromkeys(names, batch),
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences the exporter's notes on packages that a policy does not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _read_onnx(path: Path) -> tuple[Runner, str]:
    """Runs it by onnxruntime where installed, else by onnx's own evaluator."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session, name = ReferenceEvaluator(str(path)), "onnx's reference evaluator"
    else:
        # From bytes: the file is to be renamed.
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        name = f"onnxruntime {onnxruntime.__version__}"

    def runner(obs: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        given = {"obs": obs.numpy()} | ({} if memory is None else {"memory": memory.numpy()})
        return _pair([torch.as_tensor(x) for x in session.run(None, given)])

    return runner, name


def _write_safetensors(path: Path, layers: Layers, tensors: Any, sizes: tuple[int, int], metadata: dict) -> None:
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), metadata))


def _read_safetensors(path: Path) -> tuple[Runner, str]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        layers = json.loads(file.metadata()["layers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return lambda obs, memory: run(layers, tensors, obs, memory), "safetensors"


WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "safetensors": _write_safetensors}
READERS = {"onnx": _read_onnx, "torchscript": _read_torchscript, "safetensors": _read_safetensors}


def _pair(outputs: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(outputs, Tensor):
        return outputs, None
    return (outputs[0], outputs[1]) if len(outputs) == 2 else (outputs[0], None)
