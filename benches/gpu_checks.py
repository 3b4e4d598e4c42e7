"""The checks of `make gpu`: the tests on every GPU backend, and compute-sanitizer over the kernels, side by side.

`--machine` only reports what the machine has; it runs before the build. Without a GPU, or if anything is missing, the
exit status is 1 and the last lines say what was not done.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-logs"
PASSED = LOGS / "passed.txt"
SECONDS, TOTAL = 300, 480  # limits for one job, and for all of them
WORK = (
    "the native CUDA library: not built",
    "tests of the backends cuda and triton, CUDA graphs, launches, streams: not run",
    "compute-sanitizer memcheck and racecheck: not run",
    "benchmarks: not run, benches/results not written",
)
NEEDED = ("triton", "pytest", "hypothesis", "numpy", "setuptools", "ninja")
BENCHMARKS = {"pytest_benchmark": "pytest-benchmark", "cpuinfo": "py-cpuinfo2"}
PEERS = {
    "rsl_rl": "rsl-rl-lib",
    "tensordict": "tensordict",
    "skrl": "skrl",
    "stable_baselines3": "stable-baselines3",
    "torchrl": "torchrl",
    "rl_games": "rl-games",
    "rl_triton": "rl-triton",
    "pufferlib": "pufferlib",
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def without_benchmarks() -> str | None:
    """What `make gpu-bench` lacks, and how to install it; None if nothing."""
    missing = [name for module, name in BENCHMARKS.items() if not installed(module)]
    if not missing:
        return None
    return f"{sys.executable} has no {', '.join(missing)}: bring wheels, see CONTRIBUTING.md, On a GPU"


def cuda_tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(folders))


def machine() -> str | None:
    """Prints what the machine has. Returns why the checks cannot run, or None."""
    if sys.version_info < (3, 11):
        return f"{sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, expected 3.11 or later"
    if not installed("torch"):
        return f"{sys.executable} has no torch: make gpu GPU_PYTHON=/path/to/python3"
    import torch

    if not torch.cuda.is_available():
        built = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return f"no CUDA device: {sys.executable} has torch {torch.__version__}, {built}"
    missing = [name for name in NEEDED if not installed(name)]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}"
    import triton

    properties = torch.cuda.get_device_properties(0)
    print(
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 1e9:.0f} GB, L2 {properties.L2_cache_size / 1e6:.0f} MB; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, triton {triton.__version__}"
    )
    absent = [distribution for module, distribution in PEERS.items() if not installed(module)]
    if absent:
        print(f"absent peers, not timed: {', '.join(absent)}")
    if without_benchmarks():
        print(f"make gpu-bench cannot run: {without_benchmarks()}")
    return None


class Job(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str] = {}


def jobs() -> list[Job]:
    """The longest first: Triton compiles a kernel for nearly every case."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    made, shards = [], max(1, min(10, (os.cpu_count() or 1) - 5))
    for i in range(shards):
        made.append(Job(f"tests/gpu {i + 1} of {shards}", [*pytest, "tests/gpu"], {"PYDRONE_SHARD": f"{i}/{shards}"}))
    shards = max(1, shards // 2)
    for i in range(shards):
        names = [f"triton_{x}cases" for x in ("", "scan_", "gradients_", "adam_", "act_")] + ["step_cases"]
        command = [*pytest, *(f"tests/ops/{name}.py" for name in names), "-m", ""]
        made.append(Job(f"triton_cases {i + 1} of {shards}", command, {"PYDRONE_SHARD": f"{i}/{shards}"}))
    made.append(Job("quadrotor as a graph", [*pytest, "-m", "gpu", "tests/envs/test_quadrotor.py"]))
    tool = cuda_tool("compute-sanitizer") or "compute-sanitizer"
    for backend in ("cuda", "triton"):
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, "benches/gpu_sanitize.py"]
            quick = ["--quick"] if check == "racecheck" else []
            made.append(Job(f"{check}, {backend}", [*command, backend, *quick]))
    return made


class Outcome(NamedTuple):
    job: Job
    problem: str | None
    seconds: float
    log: str


def run(job: Job, until: float) -> Outcome:
    """Runs a job, and stops it at ``until`` on time.perf_counter()."""
    start = time.perf_counter()
    seconds = min(SECONDS, until - start)
    if seconds <= 0:
        return Outcome(job, f"not started within {TOTAL} s", 0.0, "")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | job.environment
    environment.pop("PYTHONOPTIMIZE", None)  # which would leave the asserts out
    path = LOGS / (re.sub(r"\W+", "-", job.name) + ".log")
    problem = None
    with path.open("w") as log:
        try:
            # A session of its own, so that a kill reaches the job's children too.
            process = subprocess.Popen(
                job.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(job, str(error), 0.0, "")
        try:
            status = process.wait(seconds)
            problem = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problem = f"stopped after {seconds:.0f} s"
    text = path.read_text(errors="replace")
    if problem is None and "pytest" in job.command and not re.search(r"\d+ passed", text):
        problem = "no test ran"
    return Outcome(job, problem, time.perf_counter() - start, text)


def passed_since_the_build() -> set[str]:
    """Names of the jobs that an earlier run has passed."""
    stamp = ROOT / "build" / "gpu" / ".stamp"
    if not PASSED.is_file() or not stamp.is_file() or PASSED.stat().st_mtime < stamp.stat().st_mtime:
        return set()
    return set(PASSED.read_text().splitlines())


def last_words(outcome: Outcome) -> str:
    """pytest's or the sanitizer's summary line, from the end of the log."""
    lines = [line for line in outcome.log.splitlines() if re.search(r"passed|failed|ERROR SUMMARY|RACECHECK", line)]
    return lines[-1].strip("= ") if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", action="store_true", help="only report what the machine has")
    parser.add_argument("--benchmarks", action="store_true", help="only check whether the benchmarks can run")
    parser.add_argument("--resume", action="store_true", help="leave out what has passed since the build")
    options = parser.parse_args()
    if options.benchmarks:
        problem = without_benchmarks()
        if problem is not None:
            print(f"make gpu-bench: {problem}; nothing was timed", file=sys.stderr)
        return int(problem is not None)
    problem = machine()
    if problem is None and not options.machine:
        import pydrone

        problems = [f"{name}: {pydrone.backends()[name]}" for name in ("cuda", "triton") if pydrone.backends()[name]]
        problem = "; ".join(problems) or None
    if problem is not None:
        print(f"make gpu: {problem}", *(f"  {line}" for line in WORK), sep="\n", file=sys.stderr)
        return 1
    if options.machine:
        return 0
    passed = passed_since_the_build() if options.resume else set()
    LOGS.mkdir(parents=True, exist_ok=True)
    for path in LOGS.glob("*.log"):
        path.unlink()
    until = time.perf_counter() + TOTAL
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(partial(run, until=until), [job for job in jobs() if job.name not in passed]))
    PASSED.write_text("\n".join(sorted(passed | {x.job.name for x in outcomes if not x.problem})))
    if passed:
        print(f"passed before: {', '.join(sorted(passed))}")
    failed = [outcome for outcome in outcomes if outcome.problem]
    for outcome in failed:
        print(f"--- {outcome.job.name}: {outcome.problem}", *outcome.log.splitlines()[-60:], sep="\n")
    for outcome in outcomes:
        verdict = f"FAILED, {outcome.problem}" if outcome.problem else "ok"
        print(f"{outcome.job.name:22}{outcome.seconds:6.0f} s  {verdict}  {last_words(outcome)}")
    print(f"logs: {LOGS.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
