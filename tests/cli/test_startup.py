"""How long a command takes before and after its work: what it imports, and the time of a short training."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pydrone.cli import common
from pydrone.cli import main as cli
from pydrone.ops import native

SHORT = ["train", "--env", "quadrotor", "--num-envs", "64", "--num-steps", "25", "--iterations", "1", "--device", "cpu"]

# Why a short training must not import it.
HEAVY = {
    "torch._dynamo": "the compiler: takes as long as torch; torch.optim.Adam imports it",
    "torch._inductor": "the compiler's back end",
    "torch.onnx": "for exports; torch._dynamo imports it",
    "torch.distributed.fsdp": "for many GPUs; torch._dynamo imports it",
    "sympy": "the compiler's shapes",
    "networkx": "the compiler's graphs",
    "triton": "the GPU's kernels",
    "matplotlib.pyplot": "looks for a display; a Figure needs none",
    "tensorflow": "tensorboard takes it where it is installed",
    "pandas": "nothing here has tables",
    "scipy": "nothing here calls it",
    "onnx": "for exports",
    "wandb": "only with --wandb",
    "rich": "only where the output is a terminal",
    "genesis": "another environment's simulator",
    "gymnasium": "other environments'",
}


def modules_after(code: str) -> set[str]:
    """The modules that a new process has imported once it has run ``code``."""
    code = f"import sys\n{code}\nprint('\\nmodules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {*done.stdout.rpartition("\nmodules ")[2].split()}


def among(modules: set[str], heavy: dict[str, str]) -> dict[str, str]:
    return {name: why for name, why in heavy.items() if name in modules}


@pytest.fixture
def short_run(tmp_path):
    """The arguments of a short training in a folder of its own."""
    for module in ("tyro", "matplotlib", "tensorboard"):
        pytest.importorskip(module)
    if native.CPU_MISSING is not None:
        pytest.skip(f"torch.optim.Adam takes the steps: {native.CPU_MISSING}")
    return [*SHORT, "--run-dir", str(tmp_path / "run")]


def test_a_short_training_imports_no_compiler(short_run):
    of_training = modules_after(
        "import gc\n"
        "from pydrone.cli.main import main\n"
        f"assert main({short_run}) == 0\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    assert (Path(short_run[-1]) / "learning_curve.png").stat().st_size > 10_000
    assert {"torch", "matplotlib.figure", "torch.utils.tensorboard"} <= of_training
    found = among(of_training, HEAVY)
    if found:
        # What a release of torch imports itself is its own affair.
        found = among(of_training - modules_after("import torch"), HEAVY)
    assert not found


def test_help_and_plots_do_without_torch(tmp_path):
    pytest.importorskip("tyro")
    pytest.importorskip("matplotlib")
    (tmp_path / "progress.jsonl").write_text(json.dumps({"iteration": 1, "kl": 0.01, "episode_length": 5.0}))
    found = modules_after(
        "from pydrone.cli.main import main\n"
        f"for command in {list(cli.COMMANDS)}:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as stopped: assert stopped.code == 0\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"assert main(['plot', {str(tmp_path)!r}]) == 0\n"
    )
    assert (tmp_path / "learning_curves.png").is_file()
    assert "matplotlib.figure" in found and not among(found, {"torch": "", **HEAVY})


@pytest.fixture
def frozen(monkeypatch):
    """The calls of gc.freeze, in a process that seems to have no torch."""
    calls: list[None] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(None))
    monkeypatch.delitem(sys.modules, "torch")
    return calls


def test_only_the_first_import_of_torch_is_without_garbage_collection(frozen, monkeypatch):
    with common.quick_imports():
        assert not gc.isenabled() and not frozen
    assert gc.isenabled() and len(frozen) == 1
    with pytest.raises(ImportError), common.quick_imports():
        raise ImportError("no torch")
    assert gc.isenabled() and len(frozen) == 1
    monkeypatch.setitem(sys.modules, "torch", "imported")
    with common.quick_imports():
        assert gc.isenabled()
    assert len(frozen) == 1


def test_garbage_collection_that_is_switched_off_stays_off(frozen):
    gc.disable()
    try:
        with common.quick_imports():
            pass
        assert not gc.isenabled() and not frozen
    finally:
        gc.enable()


def seconds(argv: list[str]) -> tuple[float, float]:
    """Seconds of a whole process: by the clock, and of processor time."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, capture_output=True, timeout=300)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.slow
def test_a_short_training_takes_at_most_twice_the_import_of_torch(short_run):
    torch, training = [], []
    for _ in range(9):
        torch.append(seconds(["-c", "import torch"]))
        training.append(seconds(["-m", "pydrone", *short_run]))
    wall, processor = (
        statistics.median(theirs) / statistics.median(ours) for theirs, ours in zip(zip(*training), zip(*torch))
    )
    print(f"a short training / import torch: {wall:.2f} by the clock, {processor:.2f} of processor time; medians of 9")
    assert wall <= 2 and processor <= 2
