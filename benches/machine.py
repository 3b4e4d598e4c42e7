"""The provenance of a measurement: processor or GPU, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from clock import Clock

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [
    "torch",
    "pydrone-rl",
    "rsl-rl-lib",
    "skrl",
    "torchrl",
    "tensordict",
    "stable-baselines3",
    "rl-games",
    "pufferlib",
    "rl-triton",
    "numpy",
    "triton",
]


def name(clock: Clock) -> str:
    """The processor's or the GPU's name, as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(clock).lower()).strip("-")


def device_name(clock: Clock) -> str:
    if torch.device(clock.device).type == "cuda":
        return torch.cuda.get_device_name(clock.device)
    return cpu_name() + (" in the place of a GPU" if clock.kind == "cuda" else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(clock: Clock) -> dict[str, Any]:
    """How a figure was measured: command, commit, machine, versions."""
    import pydrone

    found = {
        "command": " ".join([_program(), *sys.argv[1:]]).replace(f"{ROOT}/", ""),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "kind": clock.kind,
        "device": device_name(clock),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cache_bytes": clock.cache_bytes,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "pydrone_isa": os.environ.get("PYDRONE_ISA"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "backends": pydrone.backends(),
    }
    return found | ({"gpu": _gpu(clock.device)} if torch.device(clock.device).type == "cuda" else {})


def _gpu(device: str) -> dict[str, Any]:
    from pydrone.ops import native

    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "nvcc": native.build_info().get("nvcc"),
        "driver and clocks after the last measurement": _output_of(*query),
    }


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "pytest" if name in ("__main__.py", "pytest", "py.test") else f"python benches/{name}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The working tree's commit, with a + if there are changes; None without git."""
    commit, changed = _output_of("git", "rev-parse", "HEAD"), _output_of("git", "status", "--porcelain", "-uno")
    return commit and commit + ("+" if changed else "")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def kept(path: Path, now: dict[str, Any], sizes: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The document at ``path`` if it was written on this device at this commit, with these sizes; else None."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(name) == now[name] for name in ("device", "commit", "python"))
    return found if same and (sizes is None or found.get("sizes") == sizes) else None
