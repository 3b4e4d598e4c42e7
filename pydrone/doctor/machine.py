"""Facts about this machine and this installation as plain data, and advice as text."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTION = "pydrone-rl"

# Packages that pydrone uses, exports to, or integrates with.
PACKAGES = (
    "torch",
    "triton",
    "genesis-world",
    "numpy",
    "gymnasium",
    "rsl-rl-lib",
    "skrl",
    "stable-baselines3",
    "torchrl",
    "rl-games",
    "tyro",
    "tensorboard",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "safetensors",
)

# Environment variables that affect the report; docs/environment-variables.md explains them.
VARIABLES = (
    "PYDRONE_BACKEND",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "CUDA_VISIBLE_DEVICES",
)


def facts() -> dict[str, Any]:
    """All facts. Imports torch and loads the libraries of pydrone; ImportError without torch."""
    import torch

    import pydrone
    from pydrone.ops.dispatch import select
    from pydrone.ops.native import build_info

    backends = pydrone.backends()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    defaults = {}
    for device in devices:
        try:
            defaults[device] = select(torch.device(device)).name
        except (RuntimeError, ValueError) as error:  # PYDRONE_BACKEND asks for one that is not usable
            defaults[device] = f"none: {error}"
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "pydrone": {
            "version": pydrone.__version__,
            "folder": str(Path(pydrone.__file__).parent),
            "build": build_info(),
        },
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "packages": versions,
        "old": too_old(versions, _requirements()),
        "torch": {"cuda": torch.version.cuda, "hip": torch.version.hip, "cuda_available": torch.cuda.is_available()},
        "cpu": _cpu(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "gpus_of_the_driver": _gpus_of_the_driver(),
        "backends": backends,
        "default_backends": defaults,
        "variables": _variables(),
        "compiler": _compiler(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # not installed: run from a source tree
        return []


def too_old(versions: dict[str, str | None], requirements: list[str]) -> dict[str, str]:
    """Installed packages older than required, with the required version. ``requirements`` as in the metadata."""
    old = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*>=\s*([\d.]+)", requirement)
        if match and (installed := versions.get(match[1])) and _numbers(installed) < _numbers(match[2]):
            old[match[1]] = match[2]
    return old


def _numbers(version: str) -> list[int]:
    """2.10.0+cpu as [2, 10]: trailing zeros make no difference."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _cpu_model(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_of_the_quota": _quota(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_gb": _memory_gb(),
        "huge_pages": _huge_pages(),
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _quota() -> float | None:
    """The CPU quota of the container, in cores; None if there is no limit."""
    text = _read("/sys/fs/cgroup/cpu.max")  # cgroup v2
    if text is not None:
        quota, period = text.split()
    else:
        quota = (_read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1").strip()
        period = (_read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "1").strip()
    return None if quota in ("max", "-1") else round(int(quota) / int(period), 2)


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _huge_pages() -> str | None:
    """always, madvise or never; None if the kernel does not support huge pages."""
    match = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    return match[1] if match else None


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _gpus_of_the_driver() -> list[str]:
    """The NVIDIA GPUs that the driver reports, whether or not torch can use them."""
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            done = None
        if done is not None and done.returncode == 0:
            found = [line.split(", ") for line in done.stdout.splitlines() if line.strip()]
            return [f"{name} (driver {', '.join(driver)})" for name, *driver in found]
    folder = Path("/proc/driver/nvidia/gpus")
    texts = [_read(str(path)) or "" for path in sorted(folder.glob("*/information"))]
    return [match[1] if (match := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE)) else "NVIDIA" for text in texts]


def _variables() -> dict[str, str]:
    """The variables as set when the process started: the command line itself sets GOMP_SPINCOUNT later."""
    began = _read("/proc/self/environ")
    pairs = [pair.partition("=") for pair in began.split("\0")] if began is not None else None
    environ = dict(os.environ) if pairs is None else {name: value for name, _, value in pairs}
    return {name: environ[name] for name in VARIABLES if name in environ}


def _compiler() -> str | None:
    """The C++ compiler that a build of pydrone would use."""
    wanted = os.environ.get("CXX")
    candidates = [wanted.split()[0]] if wanted and wanted.strip() else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


# ------------------------------------------------------------------------------------------------------------ advice


def advice(facts: dict[str, Any]) -> list[str]:
    """What to change, most important first, in one or two sentences each."""
    torch, cpu, variables, backends = facts["torch"], facts["cpu"], facts["variables"], facts["backends"]
    said: list[str] = []
    for name, least in facts["old"].items():
        said.append(
            f"{name} {facts['packages'][name]} is older than {least}, which pydrone needs: "
            f"pip install --upgrade '{name}>={least}'."
        )
    driver = facts["gpus_of_the_driver"]
    if driver and not torch["cuda_available"]:
        if variables.get("CUDA_VISIBLE_DEVICES", None) in ("", "-1"):
            why = f"CUDA_VISIBLE_DEVICES={variables['CUDA_VISIBLE_DEVICES']} hides it. Unset it."
        elif torch["cuda"] is None:
            why = "this torch is a build for the CPU. Install one for CUDA: https://pytorch.org/get-started/locally"
        else:
            why = f"this torch, built for CUDA {torch['cuda']}, cannot use it: is the driver too old for that?"
        said.append(f"The machine has a GPU, {driver[0]}, but {why}")
    if torch["cuda_available"] and backends["cuda"] is not None:
        said.append(
            f"The CUDA kernels are not available ({backends['cuda']}). "
            + ("The Triton kernels run instead. " if backends["triton"] is None else "")
            + "To build them: nvcc of torch's CUDA version, then PYDRONE_CUDA=1 pip install --no-build-isolation."
        )
    if torch["cuda_available"] and backends["triton"] is not None and backends["cuda"] is not None:
        said.append(f"No kernels for the GPU: {backends['triton']}.")
    if backends["cpu"] is not None:
        do = (
            "Reinstall pydrone"
            if facts["compiler"]
            else "Install a C++ compiler (g++ or clang++), then reinstall pydrone"
        )
        said.append(
            f"The C++ kernels are not available ({backends['cpu']}), so slower plain PyTorch runs on the CPU. "
            f"{do}; with PYDRONE_NATIVE=1, a build that fails reports the reason as an error."
        )
    wanted = variables.get("PYDRONE_BACKEND")
    if wanted:
        reason = backends.get(wanted, f"there is none of that name, only {', '.join(backends)}")
        said.append(
            f"PYDRONE_BACKEND={wanted} is not usable: {reason}. Unset it."
            if reason is not None
            else f"PYDRONE_BACKEND={wanted} replaces the default backend"
            + (" by the slowest one. Unset it." if wanted == "reference" else ".")
        )
    if variables.get("TRITON_INTERPRET") == "1":
        said.append("TRITON_INTERPRET=1 interprets the Triton kernels, which is slow: use it for tests only.")
    return said + _advice_on_threads(cpu, variables) + _advice_on_memory(cpu) + _advice_on_packages(facts["packages"])


def _advice_on_threads(cpu: dict[str, Any], variables: dict[str, str]) -> list[str]:
    said, threads = [], cpu["threads"]
    allowed = min(x for x in (cpu["cores_allowed"], cpu["cores_of_the_quota"]) if x is not None)
    if threads > max(allowed, 1):
        said.append(
            f"torch runs {threads} threads on the {allowed:g} cores that it may use, so they wait for each other. "
            f"Set OMP_NUM_THREADS={max(int(allowed), 1)}."
        )
    if cpu["load"] is not None and cpu["load"] > allowed / 2:
        said.append(
            f"Other processes use the machine (load {cpu['load']:g} on {allowed:g} cores): timings are unreliable."
        )
    if threads > 1 and variables.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        said.append(
            "OMP_WAIT_POLICY=ACTIVE lets idle OpenMP threads spin, which costs a core if any other process runs."
        )
    elif threads > 1 and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & variables.keys():
        said.append(
            "Idle OpenMP threads spin for a millisecond after each piece of work. `pydrone` makes that shorter; "
            "start your own trainer with GOMP_SPINCOUNT=10000 unless nothing else runs on the machine."
        )
    return said


def _advice_on_memory(cpu: dict[str, Any]) -> list[str]:
    if cpu["huge_pages"] != "never":
        return []
    return [
        "Transparent huge pages are off, which slows shuffled reads on the CPU. Turn them on: "
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
    ]


def _advice_on_packages(packages: dict[str, str | None]) -> list[str]:
    missing = [name for name in ("genesis-world", "matplotlib", "tensorboard", "tyro") if packages[name] is None]
    if not missing:
        return []
    return [f"`pydrone train` needs {', '.join(missing)}: pip install '{DISTRIBUTION}[train]'."]
