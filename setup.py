"""Builds the native backends; pyproject.toml has everything declarative.

Two plain shared libraries, loaded by torch.ops.load_library and independent of Python's C API:

    pydrone/_native_cpu.so    csrc/ops.cpp and csrc/cpu/*.cpp
    pydrone/_native_cuda.so   csrc/cuda/*.cu; separate, because a CPU build of torch could not load it

They use torch's stable ABI at its 2.10 level, so one abi3 wheel serves every Python >= 3.10 and torch >= 2.10. The
build also writes pydrone/_build_info.json: what was built, with which tools, and why the rest was not.
`pydrone.backends()` reads it.

Environment variables:

PYDRONE_NATIVE  auto (default)  build if a C++ compiler is found. Without one the install succeeds and records the
                                reason; if the compiler fails on the sources, that is a warning, also recorded.
                1               a library that cannot be built is an error (the Makefile's setting).
                0               build nothing. An in-place or editable build keeps existing libraries.
PYDRONE_CUDA    auto (default)  build the CUDA library if nvcc and torch have the same CUDA major version. Whether this
                                machine has a GPU does not matter.
                1               fail if it cannot be built. With nvcc and a CPU build of torch, the sources are compiled
                                but not linked: this checks the code, installs no CUDA library, and says so.
                0               never.
PYDRONE_SANITIZE                build the CPU library with these GCC sanitizers: address,undefined. Python must then be
                                started with them preloaded, as `make sanitize` does.
CUDA_HOME, CUDA_PATH            the CUDA toolkit; otherwise nvcc is searched on PATH.
TORCH_CUDA_ARCH_LIST            default 8.0;8.6;8.9;9.0;10.0;12.0+PTX, without those that nvcc does not know.
CXX, MAX_JOBS                   the C++ compiler; the number of parallel compilations.

An isolated build (pip's default) compiles against the newest torch, which is right for the CPU library. The CUDA
library must match the CUDA version of the torch in use: build it with --no-build-isolation, as the Makefile does.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

CPU, CUDA = "pydrone._native_cpu", "pydrone._native_cuda"
CPU_SOURCES = sorted(path.as_posix() for path in [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])
CUDA_SOURCES = sorted(path.as_posix() for path in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(path.as_posix() for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))
INCLUDE = [str(Path("csrc").resolve())]  # absolute: ninja compiles from the build folder
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
# -Wno-psabi: vectors passed by value never leave the library, so their calling convention does not matter.
# -fno-math-errno: GCC does not vectorise a square root that may set errno.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *STABLE_ABI]
LINK_FLAGS = []
if os.environ.get("PYDRONE_SANITIZE"):
    LINK_FLAGS = [f"-fsanitize={os.environ['PYDRONE_SANITIZE']}"]
    CXX_FLAGS += ["-O1", "-g", "-fno-omit-frame-pointer", *LINK_FLAGS]  # the last -O and -g take effect
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", *STABLE_ABI]


def switch(name: str) -> str:
    """The value of an environment variable that must be auto, 0 or 1."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"pydrone: {name}: expected auto, 0 or 1, got {value!r}")
    return value


class Missing(Exception):
    """The reason why a library is not built, for the user."""


NATIVE, USE_CUDA = switch("PYDRONE_NATIVE"), switch("PYDRONE_CUDA")

torch: Any = None
if NATIVE != "0":
    # torch checks the compiler for extensions that use its C++ ABI; these call its C functions only.
    os.environ.setdefault("TORCH_DONT_CHECK_COMPILER_ABI", "1")
    # pip installs ninja beside python, which is not on PATH if the environment is not activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        torch = None
if torch is not None:
    BaseBuildExt: Any = cpp_extension.BuildExtension
else:
    from setuptools.command.build_ext import build_ext as BaseBuildExt


def require_torch() -> None:
    if NATIVE == "0":
        raise Missing("not built: PYDRONE_NATIVE=0")
    if sys.platform == "win32":
        raise Missing("not built: the native backends are built on Linux and macOS")
    if torch is None:
        raise Missing("not built: torch could not be imported by the build")
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        raise Missing(f"not built: torch {torch.__version__} at build time, expected 2.10 or later")


def find_cxx() -> str:
    """The C++ compiler's command; also sets CXX, which all build tools read."""
    wanted = os.environ.get("CXX")
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            os.environ["CXX"] = candidate
            return candidate
    where = f"CXX={wanted} was not found" if wanted else "none of c++, g++ and clang++ is on PATH"
    raise Missing(f"there was no C++ compiler at install time: {where}")


def warn(message: str) -> None:
    """Issues a Python warning. pip hides warnings without -v, so pydrone.backends() and doctor also give the reason."""
    warnings.warn(f"pydrone: {message}.", stacklevel=2)


def first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[0]


class Nvcc:
    """nvcc, its toolkit and version. Raises Missing if there is none."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        found = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
        if found is None:
            where = f"in {home}/bin (CUDA_HOME)" if home else "on PATH, and CUDA_HOME is not set"
            raise Missing(f"nvcc was not found {where}")
        self.path = found
        self.home = home or self._toolkit()
        version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", version)
        self.version = (int(release[1]), int(release[2])) if release else (0, 0)

    def __str__(self) -> str:
        return "nvcc {}.{}".format(*self.version)

    def _toolkit(self) -> str:
        """The toolkit's folder, according to nvcc itself: the file on PATH may be a wrapper script."""
        dry = subprocess.run([self.path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        return os.path.realpath(top[1].strip() if top else Path(self.path).resolve().parent.parent)

    def architectures(self) -> str:
        known = subprocess.run([self.path, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        usable = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
        return ";".join(usable or ARCHITECTURES) + "+PTX"


def cpu_extension() -> Extension:
    require_torch()
    find_cxx()
    if not CPU_SOURCES:
        raise Missing("not built: csrc is missing from the source tree")
    return cpp_extension.CppExtension(
        CPU,
        CPU_SOURCES,
        depends=HEADERS,
        include_dirs=INCLUDE,
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    if USE_CUDA == "0":
        raise Missing("not built: PYDRONE_CUDA=0")
    require_torch()
    if not CUDA_SOURCES:
        raise Missing("not built: csrc/cuda is missing from the source tree")
    if torch.version.cuda is None and USE_CUDA != "1":
        raise Missing(f"not built: torch {torch.__version__} is a build without CUDA")
    nvcc = Nvcc()
    find_cxx()
    if torch.version.cuda and nvcc.version[0] != int(torch.version.cuda.split(".")[0]):
        raise Missing(f"{nvcc} does not match torch {torch.__version__}, built for CUDA {torch.version.cuda}")
    cpp_extension.CUDA_HOME = nvcc.home  # torch leaves it None in builds without CUDA
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = nvcc.architectures()
    flags = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
    extension = cpp_extension.CUDAExtension(
        CUDA, CUDA_SOURCES, depends=HEADERS, include_dirs=INCLUDE, extra_compile_args=flags, py_limited_api=True
    )
    extension.nvcc = str(nvcc)
    return extension


class build_native(BaseBuildExt):
    """A build_ext that may build fewer libraries than planned, and records why."""

    def run(self) -> None:
        if NATIVE == "0" and self.inplace:
            return
        self.reasons: dict[str, str] = {}
        planned = []
        # CUDA first: if it is required but impossible, the build ends here, before anything is touched.
        for name, plan, demanded in ((CUDA, cuda_extension, USE_CUDA == "1"), (CPU, cpu_extension, NATIVE == "1")):
            try:
                planned.append(self._prepared(plan()))
            except Missing as missing:
                self.reasons[name] = str(missing)
                if demanded and NATIVE != "0":
                    variable = "PYDRONE_CUDA" if name == CUDA else "PYDRONE_NATIVE"
                    raise SystemExit(f"pydrone: {variable}=1, but {missing}.") from None
                if name == CPU and NATIVE != "0":
                    warn(f"{CPU} is left out: {missing}")
        self._remove_old()
        self.extensions = planned
        super().run()
        self._write_info()

    def build_extensions(self) -> None:
        # One at a time: a failure of the CUDA library must not prevent the CPU one.
        built = []
        for extension in self.extensions:
            self.extensions = [extension]
            try:
                super().build_extensions()
            except Exception as error:
                self._failed(extension, error)
            else:
                built += [extension] if extension.name not in self.reasons else []
        self.extensions = built

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA and torch.version.cuda is None:
            self.compiler.compile(
                ext.sources,
                output_dir=self.build_temp,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            self.reasons[CUDA] = (
                f"compiled with {ext.nvcc} and not linked: torch {torch.__version__} is a build without CUDA, "
                "which could not load the library"
            )
            warn(f"csrc/cuda was {self.reasons[CUDA]}")
        else:
            super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module, so without Python's suffix.
        return os.path.join(*fullname.split(".")) + ".so"

    def _prepared(self, ext: Extension) -> Extension:
        """Does what finalize_options does for the extensions that it knows."""
        ext._full_name = ext.name
        ext._file_name = self.get_ext_filename(ext.name)
        ext._links_to_dynamic = ext._needs_stub = False
        self.ext_map[ext.name] = self.ext_map[ext.name.split(".")[-1]] = ext
        return ext

    def _failed(self, ext: Extension, error: Exception) -> None:
        compiler = ext.nvcc if ext.name == CUDA else first_line(*shlex.split(os.environ["CXX"]), "--version")
        detail = " ".join(str(error).split())
        self.reasons[ext.name] = f"{compiler} failed on pydrone's sources at install time: {detail}"
        if NATIVE == "1" or (ext.name == CUDA and USE_CUDA == "1"):
            raise SystemExit(f"pydrone: {ext.name}: {self.reasons[ext.name]}") from error
        warn(f"{ext.name} is left out: {self.reasons[ext.name]}. See the compiler's output with pip install -v")

    def _package_dirs(self) -> list[Path]:
        folders = [Path(self.build_lib, "pydrone")]
        if self.inplace:
            folders.append(Path(self.get_finalized_command("build_py").get_package_dir("pydrone")))
        return folders

    def _remove_old(self) -> None:
        """Removes libraries of earlier builds, which this build may not replace. Unlinks: they may be in use."""
        for folder in self._package_dirs():
            for name in ("_native_cpu.so", "_native_cuda.so", "_build_info.json"):
                Path(folder, name).unlink(missing_ok=True)

    def _write_info(self) -> None:
        """Writes a flat JSON object: native_cpu and native_cuda (null if built, else the reason), then the tools."""
        built = {ext.name: ext for ext in self.extensions}
        info: dict[str, str | None] = {name.split("._")[-1]: self.reasons.get(name) for name in (CPU, CUDA)}
        info["torch"] = torch.__version__ if torch else None
        if CPU in built:
            info["compiler"] = first_line(*shlex.split(os.environ["CXX"]), "--version")
            info["flags"] = " ".join(CXX_FLAGS)
        if CUDA in built:
            info["nvcc"] = built[CUDA].nvcc
            info["nvcc_flags"] = " ".join(NVCC_FLAGS)
            info["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
        target = self._package_dirs()[-1]
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no abi3; bdist_wheel refuses the tag

setup(
    # triton_kernels is another distribution's top-level name, so the folder is installed as pydrone._triton.
    packages=[*find_packages(include=["pydrone", "pydrone.*"]), "pydrone._triton"],
    package_dir={"pydrone._triton": "triton_kernels"},
    # A placeholder for the wheel's platform tag; build_native decides what is built.
    ext_modules=[Extension(CPU, CPU_SOURCES, depends=[*HEADERS, *CUDA_SOURCES], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": build_native},
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
