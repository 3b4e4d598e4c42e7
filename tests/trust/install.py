"""Builds sdist and wheel and installs them into clean environments outside the source tree: ``make install-check``.

    python tests/trust/install.py [--quick] [--python PYTHON ...] [--torch VERSION ...]

The sdist is built from the tree, and the wheel from the sdist. Each environment has torch and nothing else (no triton,
no numpy, no extras), installs the same wheel, and runs smoke.py in a folder of its own. Then it installs the sdist
without a C++ compiler.

--quick uses a single environment with the torch of the running Python, and downloads nothing. Otherwise pip installs
torch; where there is no CPU build, a CUDA build without NVIDIA's packages, see stand_ins.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib import metadata
from pathlib import Path

import stand_ins

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
PYTHONS = ["python3.10", "python3.11", "python3.12", "python3.13"]
TORCHES = ["2.10.0", "2.13.0"]  # the oldest that pydrone allows, the newest that it has been tested with
WITHOUT = ["triton", "numpy", "tyro", "rich", "tensorboard", "matplotlib", "genesis", "safetensors", "onnx", "wandb"]
NOT_IN_SDIST = {".gitignore", ".ci/run"}
# Requirements of a CUDA build of torch that its CPU half does not need.
NVIDIAS = re.compile(r"nvidia|cuda|triton")
LIMIT = 1200  # seconds per command


class Failed(Exception):
    """A command that failed, with its output; or a result that is not as promised."""


def run(*command: str | Path, cwd: Path | None = None, **environ: str | None) -> str:
    """Runs a command and returns its output. The environment hides this tree; a variable given as None is removed."""
    hidden = (
        "PYTHONPATH",
        "PYTHONHOME",
        "CXX",
        "CC",
        "PYDRONE_NATIVE",
        "PYDRONE_CUDA",
        "PYDRONE_BACKEND",
        "VIRTUAL_ENV",
    )
    env = {name: value for name, value in os.environ.items() if name not in hidden} | environ
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run(command, cwd=cwd or "/", env=env, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def pip(*arguments: str | Path, python: str | Path = sys.executable, **environ: str) -> str:
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments, **environ)


# -------------------------------------------------------------------------------------------------------------- build


def build_sdist(folder: Path) -> Path:
    """Builds it from a copy of the tree without products of earlier builds."""
    junk = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build", "dist", "runs", "logs", ".*")
    shutil.copytree(ROOT, folder / "tree", ignore=junk)
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "tree", PYDRONE_NATIVE="0")
    (sdist,) = folder.glob("*.tar.gz")
    check_sdist(sdist)
    return sdist


def check_sdist(sdist: Path) -> None:
    """Checks that it contains every file under version control, if this is a git checkout."""
    if not (ROOT / ".git").exists():
        return
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    missing = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} - held - NOT_IN_SDIST
    if missing:
        raise Failed(f"{sdist.name}: expected every file of the tree, lacks {', '.join(sorted(missing))}")


def build_wheel(sdist: Path, folder: Path) -> Path:
    """Builds it from the sdist only, against the torch of this Python."""
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (folder / "unpacked").iterdir()
    switches = {"PYDRONE_NATIVE": "1", "PYDRONE_CUDA": "0"}
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder / "dist", source, **switches)
    (wheel,) = (folder / "dist").glob("*.whl")
    if "-cp310-abi3-" not in wheel.name:
        raise Failed(f"{wheel.name}: expected a wheel for every Python from 3.10 on (cp310-abi3)")
    return wheel


# ------------------------------------------------------------------------------------------------------- environments


class Environment:
    """A virtual environment with torch and its requirements."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"
        self.environ: dict[str, str] = {}

    @classmethod
    def linked(cls, folder: Path) -> Environment:
        """Links torch and its requirements from this Python: nothing is downloaded, and nothing else is visible."""
        made = cls(folder)
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        site = made.site()
        for name in closure("torch"):
            files = metadata.distribution(name).files or []
            for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(metadata.distribution(name).locate_file(top))
        return made

    @classmethod
    def downloaded(cls, folder: Path, python: str, torch: str) -> Environment:
        made = cls(folder)
        run(python, "-m", "venv", folder)
        pip("install", "--no-deps", f"torch=={torch}", python=made.python)
        ask = "from importlib.metadata import requires; print(*requires('torch'), sep='\\n')"
        wanted = [x for x in run(made.python, "-c", ask).splitlines() if "extra ==" not in x and not NVIDIAS.match(x)]
        pip("install", *wanted, "setuptools>=77.0.3", "wheel", "ninja", python=made.python)
        torch_folder = made.site() / "torch"
        if not re.search(r"^cuda.*= None", (torch_folder / "version.py").read_text(), re.MULTILINE):
            stand_ins.make(torch_folder / "lib", folder / "stand-ins")
            made.environ["LD_LIBRARY_PATH"] = str(folder / "stand-ins")
        return made

    def site(self) -> Path:
        return Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def smoke(self, cpu: str = "built") -> dict[str, str | None]:
        """Runs a copy of smoke.py outside the source tree; returns what it prints."""
        folder = self.folder / "elsewhere"
        folder.mkdir(exist_ok=True)
        script = shutil.copy(SMOKE, folder)
        options = ["--cpu", cpu, "--without", *WITHOUT]
        return json.loads(run(self.python, "-I", script, *options, cwd=folder, **self.environ).splitlines()[-1])


def closure(name: str) -> list[str]:
    """The installed distributions that ``name`` requires, itself first, without triton."""
    found = [name]
    for this in found:
        for requirement in metadata.requires(this) or []:
            needed = re.match(r"[\w.-]+", requirement)[0]
            if "extra ==" in requirement or needed == "triton" or needed in found:
                continue
            try:
                metadata.distribution(needed)
            except metadata.PackageNotFoundError:
                continue  # required on other systems only
            found.append(needed)
    return found


# ---------------------------------------------------------------------------------------------------------------- all


def install_wheel(env: Environment, wheel: Path) -> dict[str, str | None]:
    # This Python's pip: a linked environment has none.
    pip("--python", env.python, "install", "--no-deps", "--no-index", wheel)
    return env.smoke()


def install_sdist_without_compiler(env: Environment, sdist: Path) -> dict[str, str | None]:
    """Calls pip as a user would, but without build isolation, which would download torch again."""
    pip("uninstall", "--yes", "pydrone-rl", python=env.python)
    bare = env.folder / "no-compiler"
    bare.mkdir()
    options = ["--no-build-isolation", "--no-deps", "--no-cache-dir"]
    pip("install", *options, sdist, python=env.python, PATH=str(bare), **env.environ)
    return env.smoke(cpu="missing")


def usable(python: str) -> str | None:
    """The interpreter's path, or None if it does not work (a pyenv shim may exist without its Python)."""
    try:
        return run(python, "-c", "import sys, venv, ensurepip; print(sys.executable)").strip()
    except (OSError, Failed):
        return None


def row(*cells: object) -> None:
    print("{:<9} {:<14} {:<26} {:<48} {}".format(*(str(x) for x in cells)), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one environment, without network access")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help=f"default: {' '.join(PYTHONS)}")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help=f"default: {' '.join(TORCHES)}")
    options = parser.parse_args()
    failures, libraries, began = 0, set(), time.monotonic()

    def shown(source: str, install, *arguments) -> None:
        nonlocal failures
        try:
            found = install(*arguments)
        except (Failed, subprocess.TimeoutExpired) as error:
            failures += 1
            row("", "", source, "FAILED", "")
            print(error, flush=True)
            return
        library = found["library"] and f"built, sha256 {found['library']}..."
        libraries.update({found["library"]} - {None})
        row(found["python"], found["torch"], source, library or f"none: {found['cpu'].partition(':')[0]}", "passed")

    with tempfile.TemporaryDirectory(prefix="pydrone-install-") as temporary:
        folder = Path(temporary)
        sdist = build_sdist(folder)
        wheel = build_wheel(sdist, folder)
        print(f"{sdist.name}, and {wheel.name} built from it: {time.monotonic() - began:.0f} s\n")
        row("Python", "torch", "installed", "native library", "")
        if options.quick:
            shown("wheel", install_wheel, Environment.linked(folder / "linked"), wheel)
            return min(failures, 1)
        for python in options.python:
            path = usable(python)
            if path is None:
                row(python, "", "", "not on this machine", "not run")
                continue
            for torch in options.torch:
                here = folder / "environment"
                try:
                    env = Environment.downloaded(here, path, torch)
                except (Failed, subprocess.TimeoutExpired) as error:
                    failures += 1
                    row(python, torch, "torch", "FAILED", "")
                    print(error, flush=True)
                else:
                    shown("wheel", install_wheel, env, wheel)
                    shown("sdist, without a compiler", install_sdist_without_compiler, env, sdist)
                shutil.rmtree(here, ignore_errors=True)  # about 2 GB
    if len(libraries) > 1:
        raise Failed(f"expected one native library everywhere, got {sorted(libraries)}")
    print(f"\n{failures} failed; {time.monotonic() - began:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
