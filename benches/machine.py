"""What was measured, on what: the GPU, versions, commit, command; a copy's bandwidth; the file that results go to."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from .clock import Clock

ROOT = Path(__file__).resolve().parents[2]


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command's options, sizes and repeats among them."""
    parser.add_argument("--num-envs", type=int, default=8192)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    refuse(parser, options)
    return options


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command where its options make no sense or there is no GPU."""
    for name in ("num_envs", "num_steps", "repeats", "variants"):
        x = getattr(options, name, None)
        if x is not None and x < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {x}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"{parser.prog}: no CUDA device is seen by torch {torch.__version__}: nothing was timed")
    if options.out is not None and options.device != "cuda":
        raise SystemExit(f"{parser.prog}: --out: a CPU's figures are no GPU's; leave --out out")


def cache_bytes(clock: Clock) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if clock.cuda else 0


def copy_bandwidth(clock: Clock) -> float:
    """GB/s of a large copy on the device, bytes read and written counted."""
    nbytes = (1 << 30) if clock.cuda else (1 << 20)
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.launches([lambda: target.copy_(source)], 4) / 1e9


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe() -> dict:
    """Of the GPU and what ran on it."""
    import pydrone
    from pydrone.ops import native

    commit, changed = output_of("git", "rev-parse", "HEAD"), output_of("git", "status", "--porcelain", "-uno")
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
    properties = torch.cuda.get_device_properties(0)
    return {
        "commit": commit and commit + (", with changes" if changed else ""),
        "command": " ".join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "pydrone": pydrone.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": getattr(sys.modules.get("triton"), "__version__", None),
            "cuda": torch.version.cuda,
            "nvcc": native.build_info().get("nvcc"),
        },
        "gpu": {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver and clocks after the last measurement": output_of(*query),
        },
    }


def write(folder: Path, suffix: str, found: dict) -> Path:
    """``<gpu><suffix>.json`` with ``found`` and what it was measured on."""
    found = describe() | found
    name = re.sub(r"[^a-z0-9]+", "-", found["gpu"]["name"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path
