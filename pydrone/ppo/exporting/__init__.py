"""What :mod:`pydrone.ppo.export` stands on: the layers of a policy, and a file for each kind of format.

What a command line needs to know is here, where torch is not.
"""

from __future__ import annotations

from collections.abc import Sequence

#: file extensions
FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors", "c": ".h"}
#: the packages that write and check a format
NEEDS = {"onnx": ("onnx", "onnxscript"), "torchscript": (), "safetensors": ("safetensors",), "c": ()}


class ExportError(RuntimeError):
    """The policy could not be exported; nothing was written."""


def missing(format: str) -> Sequence[str]:
    """The packages that ``format`` needs and that are missing."""
    from importlib.util import find_spec

    return [name for name in NEEDS[format] if find_spec(name) is None]
