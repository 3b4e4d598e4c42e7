# `make` lists the targets. Everything is installed in $(VENV); stamp files there make a second call fast.

PYTHON ?= python3
VENV ?= .venv
# Passed on by `make train`, `make test`, `make bench`, ...: make train ARGS="--num-envs 1024 --iterations 100"
ARGS ?=
# 1: a native library that cannot be built is an error. auto: go on without it. 0: do not build it. See setup.py.
PYDRONE_NATIVE ?= 1

# `make gpu` runs this Python. Its torch must be a CUDA build; nothing is installed into it.
GPU_PYTHON ?= python3

PY := $(VENV)/bin/python
# A file's tests share expensive fixtures, so each file stays in one process. Files with few tests may be the longest: in
# their own order they do not come last.
# With its bytecode: the processes that tests start import what others have compiled.
TEST := env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PIP := $(PY) -m pip --disable-pip-version-check --quiet
# The editable install skips the native code: NATIVE builds it, and compiles only what changed.
# (PYTHONWARNINGS: setuptools warns at every editable install whose folders are not named as its packages.)
INSTALL := PYTHONWARNINGS=ignore::UserWarning PYDRONE_NATIVE=0 $(PIP) install --no-build-isolation --constraint constraints.txt --editable
NATIVE := PYDRONE_NATIVE=$(PYDRONE_NATIVE) $(PY) setup.py --quiet build_ext --inplace

METADATA := pyproject.toml setup.py constraints.txt pydrone/_version.py
SOURCES := $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv build train test test-slow sanitize faults install-check soak lint bench compare gpu gpu-build gpu-checks \
    gpu-bench gpu-genesis gpu-train gpu-sweep gpu-profile wheel clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.stamp-tools ## Create the virtual environment, with torch and the build tools

build: $(VENV)/.stamp-base ## Install the package editable and build its native libraries in place
	$(NATIVE)
	@touch $(VENV)/.stamp-native

train: $(VENV)/.stamp-train $(VENV)/.stamp-native ## Train a drone to hover; ARGS="..." is passed to `pydrone train`
	$(VENV)/bin/pydrone train $(ARGS)

test: $(VENV)/.stamp-test $(VENV)/.stamp-native ## Run the tests
	$(TEST) $(ARGS)

test-slow: $(VENV)/.stamp-test $(VENV)/.stamp-native ## Run the slow tests
	$(TEST) -m slow $(ARGS)

# The CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own: other builds stay as they
# are. Without the tests that measure memory: AddressSanitizer delays frees. No leak detection: torch itself leaks at exit.
SANITIZED := build/sanitized
SANITIZED_RUN = env PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" $(PY)
SANITIZED_TESTS := $(addprefix tests/,test_gae.py test_gae_contract.py test_vtrace.py test_buffer.py \
    test_buffer_state.py rollout ops/test_ops.py ops/test_pages.py ops/test_steps.py trust \
    $(addprefix ppo/learner/,test_fused.py test_fused_ring.py test_fused_bf16.py test_acting.py test_adam.py))
# ThreadSanitizer cannot follow torch's threads: it gets the same sources on std::thread, without torch.
TORCH_INCLUDE = $(PY) -c 'import torch.utils.cpp_extension as x; print(x.include_paths()[0])'
RACE = $(CXX) -std=c++20 -O1 -g -fsanitize=thread -pthread -Wall -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000 \
    -DTORCH_STABLE_ONLY -Itests/trust/race -isystem "$$($(TORCH_INCLUDE))"

sanitize: $(VENV)/.stamp-test ## Run the C++ and the emulated CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	PYDRONE_SANITIZE=address,undefined PYDRONE_NATIVE=1 PYDRONE_CUDA=0 \
	    $(PY) setup.py --quiet build --build-base $(SANITIZED)-objects --build-lib $(SANITIZED)
	$(SANITIZED_RUN) tests/trust/bad_input.py --sanitized --cases 20000
	$(SANITIZED_RUN) -m pytest -q --capture=sys -p no:cacheprovider -k "not memory_is_constant and not test_soak" $(SANITIZED_TESTS) $(ARGS)
	PYDRONE_SANITIZE=address,undefined $(SANITIZED_RUN) -m pytest -q --capture=sys -p no:cacheprovider tests/emulation
	$(RACE) $(addprefix csrc/cpu/,act.cpp adam.cpp append.cpp append_rows.cpp gae.cpp gather.cpp isa.cpp mlp*.cpp ppo.cpp) \
	    tests/trust/race/driver.cpp -o build/race
	build/race
	! build/race planted 2> /dev/null

faults: $(VENV)/.stamp-test $(VENV)/.stamp-native ## Plant known mistakes one at a time, and check that the tests fail for each
	$(PY) tests/trust/plant.py $(ARGS)

install-check: $(VENV)/.stamp-tools ## Build sdist and wheel and try them in clean environments (ARGS=--quick: in one)
	$(PY) tests/trust/install.py $(ARGS)

soak: $(VENV)/.stamp-test $(VENV)/.stamp-native ## Run the long tests: 301 iterations, 10,000 rollouts, 1000 examples of each property
	$(PY) -m pytest -q -m "" -rP tests/trust/test_soak.py
	$(PY) -m pytest -q tests/test_properties.py --hypothesis-profile soak
	$(PY) -m pytest -q -m slow tests/ppo tests/trust/test_contracts.py $(ARGS)

lint: $(VENV)/.stamp-lint ## Check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/.stamp-bench $(VENV)/.stamp-native ## Run the benchmarks
	$(PY) -m pytest benches/ --benchmark-only --pydrone-report benches/results $(ARGS)

compare: $(VENV)/.stamp-test $(VENV)/.stamp-native ## Train the hover task with rsl_rl, with rsl_rl on pydrone, and with pydrone
	$(PY) benches/hover.py $(ARGS)

# The package as it would be installed, in a folder of its own: the build for .venv stays as it is. Your PYTHONPATH comes
# after it, for peers and pytest-benchmark that GPU_PYTHON lacks.
GPU_BUILD := build/gpu
GPU_STAMP := $(GPU_BUILD)/.stamp
GPU_RUN = env -u TRITON_INTERPRET -u PYDRONE_BACKEND PYTHONSAFEPATH=1 \
    PYTHONPATH="$(CURDIR)/$(GPU_BUILD)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON)

# No comparison starts after 7 minutes; the report names those that were left out.
GPU_PYTEST = $(GPU_RUN) benches/gpu_checks.py --benchmarks && $(GPU_RUN) -m pytest -q -p no:cacheprovider \
    --benchmark-only --benchmark-columns=median,iqr,rounds --pydrone-device cuda --pydrone-limit 420 \
    --pydrone-report benches/results
GPU_BENCH = $(GPU_PYTEST) benches/ --ignore benches/bench_genesis.py $(ARGS)

gpu: $(GPU_STAMP) ## Build, test, sanitize and time on this machine's GPU, with the torch of GPU_PYTHON; needs no network
	@$(GPU_RUN) benches/gpu_checks.py; checked=$$?; $(GPU_BENCH) && exit $$checked

gpu-build: $(GPU_STAMP) ## The build of `make gpu` alone

gpu-checks: $(GPU_STAMP) ## The tests and sanitizers of `make gpu` alone
	@$(GPU_RUN) benches/gpu_checks.py $(ARGS)

gpu-bench: $(GPU_STAMP) ## The benchmarks of `make gpu` alone
	@$(GPU_BENCH)

gpu-genesis: $(GPU_STAMP) ## Time a training iteration on Genesis, where genesis-world is installed
	@$(GPU_PYTEST) benches/bench_genesis.py $(ARGS)

gpu-train: $(GPU_STAMP) ## Train on the GPU: memory over 301 iterations, the time to hover, learning curves beside autograd's
	@$(GPU_RUN) benches/gpu_train.py --out benches/results $(ARGS)

gpu-sweep: $(GPU_STAMP) ## Time each GPU kernel with other launch parameters and the other layout, and by both backends
	@$(GPU_RUN) benches/gpu_sweep.py --out benches/results $(ARGS)
	@$(GPU_RUN) benches/gpu_backends.py --out benches/results

gpu-profile: $(GPU_STAMP) ## Profile one launch of each GPU kernel with Nsight Compute
	@$(GPU_RUN) benches/gpu_profile.py $(ARGS)

wheel: $(VENV)/.stamp-tools ## Build a wheel in dist/
	rm -rf build/lib* build/bdist*
	PYDRONE_NATIVE=$(PYDRONE_NATIVE) $(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

clean: ## Remove what was built and the virtual environment
	rm -rf $(VENV) build dist *.egg-info pydrone/*.so pydrone/_build_info.json .pytest_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pydrone needs Python 3.10 or later, not %d.%d: make PYTHON=/path/to/python3" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first: the package is built against the torch that it will run with, not against one of pip's choosing.
$(VENV)/.stamp-tools: $(VENV)/.stamp-venv constraints.txt
	$(PIP) install --upgrade pip
	$(PIP) install --constraint constraints.txt torch
	$(PIP) install --upgrade "setuptools>=77.0.3" "wheel>=0.45" "ninja>=1.11"
	@touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-venv constraints.txt
	$(PIP) install --constraint constraints.txt ruff
	@touch $@

$(VENV)/.stamp-base: $(VENV)/.stamp-tools $(METADATA)
	$(INSTALL) .
	@touch $@

$(VENV)/.stamp-train: $(VENV)/.stamp-tools $(METADATA)
	$(INSTALL) ".[train]"
	@touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-tools $(METADATA)
	$(INSTALL) ".[dev,train]"
	@# Without its dependencies, which hold psutil back; its agents need no more than what is installed here.
	$(PIP) install --constraint constraints.txt --no-deps --no-warn-conflicts rl-games
	$(PIP) install --constraint constraints.txt --no-warn-conflicts tensorboardX
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp-tools $(METADATA)
	$(INSTALL) ".[bench,triton]"
	@touch $@

$(VENV)/.stamp-native: $(VENV)/.stamp-tools setup.py $(SOURCES)
	$(NATIVE)
	@touch $@

$(GPU_STAMP): $(METADATA) $(SOURCES) $(shell find pydrone triton_kernels -name '*.py' 2>/dev/null)
	@$(GPU_PYTHON) benches/gpu_checks.py --machine
	rm -rf $(GPU_BUILD)
	TORCH_CUDA_ARCH_LIST=$$($(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') \
	    PYDRONE_NATIVE=1 PYDRONE_CUDA=1 $(GPU_PYTHON) setup.py --quiet build --build-base $(GPU_BUILD)-objects --build-lib $(GPU_BUILD)
	@touch $@
