"""Counts the instructions that the CPU library's operations execute: a parent steps a child through them with ptrace.
Unlike a time, a count does not depend on the machine's load. Linux on x86-64 only.

Prints {call: instructions a sample} as JSON. Each call is counted at two sizes; the difference leaves out what a launch
costs by itself. ``python tests/instructions.py [CALL ...]``; ``PYDRONE_ISA`` as in docs/environment-variables.md.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

LIBRARY = Path(find_spec("pydrone").origin).with_name("_native_cpu.so")
EXPORTED = ("pydrone_append",)  # launches an append that was prepared
OPERATIONS = ("append", "gae", "off_policy", "gather", "ppo_act", "ppo_gradients", "clipped_adam", "task_step")
SIZES, T, OBS, ACTIONS = (64, 128), 8, 17, 4
SAMPLES = {"append": 1, "act": 0.25, "gradients": 0.25, "step": 1}  # of a call, over N; T where not named
HIDDEN = (32, 8)

# <sys/ptrace.h>, and <sys/user.h>: 8 times the register's position in user_regs_struct.
TRACEME, PEEK_CODE, PEEK_REGISTER, POKE_CODE, POKE_REGISTER, CONTINUE, STEP = 0, 1, 3, 4, 6, 7, 9
RIP, RSP = 8 * 16, 8 * 19
NOWHERE = 0  # an address at which nothing can be executed
STEPPED = signal.SIGTRAP << 8 | 0x7F  # <sys/wait.h>: the child's status after a step
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
LIBC.ptrace.restype = ctypes.c_long


def ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    ctypes.set_errno(0)
    result = LIBC.ptrace(request, pid, address, data)
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "ptrace")
    return result & (2**64 - 1)


def calls(n: int, only: Sequence[str] = ()) -> dict[str, Callable[[], object]]:
    """Calls for ``n`` environments: one step of them, or T."""
    import torch

    import pydrone
    from pydrone.buffer import RolloutBuffer

    torch.manual_seed(0)
    shapes = {"obs": (OBS,), "actions": (ACTIONS,), "mu": (ACTIONS,), "sigma": (ACTIONS,)}
    scalars = dict.fromkeys(("rewards", "values", "log_probs"), ())
    step = {name: torch.randn(n, *shape) for name, shape in (shapes | scalars).items()} | {"dones": torch.rand(n) < 0.1}
    full, filling = (RolloutBuffer(n, T, OBS, ACTIONS, fields={"mu": ACTIONS, "sigma": ACTIONS}) for _ in range(2))
    for _ in range(T):
        full.append(**step)
    last = torch.zeros(n)
    full.compute_gae(last)

    def gae_of(shape: tuple[int, int], time_dim: int, *log_rhos: torch.Tensor) -> Callable[[], object]:
        given = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.1, last, *log_rhos
        out, estimator = (torch.empty(shape), torch.empty(shape)), pydrone.vtrace if log_rhos else pydrone.gae
        return lambda: estimator(*given, time_dim=time_dim, out=out)

    every = {
        "append": lambda: filling.append(**step),
        "gae of a buffer": lambda: full.compute_gae(last),
        "gae of [T, N]": gae_of((T, n), 0),
        "gae of [N, T]": gae_of((n, T), 1),
        "vtrace of [T, N]": gae_of((T, n), 0, torch.randn(T, n)),
        "vtrace of [N, T]": gae_of((n, T), 1, torch.randn(n, T)),
        "minibatches": lambda: [None for _ in full.minibatches(1, reuse=True)],
    }
    return {name: call for name, call in every.items() if name in (only or every)}


def learner(n: int, only: Sequence[str] = ()) -> dict[str, Callable[[], object]]:
    """The fused learner's calls for ``n`` / 4 samples, and for n T parameters."""
    import torch
    from torch import nn

    from pydrone.ppo import FusedAct, FusedUpdate, clipped_step

    def network(outputs: int) -> nn.Sequential:
        widths = (OBS, *HIDDEN)
        layers = [x for i, o in zip(widths, HIDDEN) for x in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(HIDDEN[-1], outputs))

    torch.manual_seed(0)
    actor, critic, std = network(ACTIONS), network(1), torch.ones(ACTIONS, requires_grad=True)
    shapes = {"obs": (OBS,), "actions": (ACTIONS,), "mu": (ACTIONS,)}
    scalars = dict.fromkeys(("log_probs", "advantages", "returns", "values"), ())
    given = {name: torch.randn(n // 4, *shape) for name, shape in (shapes | scalars).items()}
    given["sigma"] = torch.rand(n // 4, ACTIONS) + 0.5
    update, act = FusedUpdate(actor, critic, value_clip=0.2, reuse=True), FusedAct(actor, critic)
    parameter = nn.Parameter(torch.randn(n * T))
    parameter.grad = torch.randn(n * T)
    adam = torch.optim.Adam([parameter])
    every = {
        "gradients": lambda: update(std, **given),
        "act": lambda: act(std.detach(), given["obs"]),
        "adam": lambda: clipped_step(adam, [[parameter]], 1.0),
    }
    return {name: call for name, call in every.items() if name in only}


def environment(n: int, only: Sequence[str] = ()) -> dict[str, Callable[[], object]]:
    """A step of ``n`` quadrotors."""
    import torch

    from pydrone.envs.quadrotor import Quadrotor

    env, still = Quadrotor(n, fused=True), torch.zeros(n, 4)
    return {"step": lambda: env.step(still)} if "step" in only else {}


def named(n: int) -> dict[str, Callable[[], object]]:
    """The calls that the command line names; without names, storage and GAE."""
    return calls(n, sys.argv[1:]) | learner(n, sys.argv[1:]) | environment(n, sys.argv[1:])


def child(names: int) -> None:
    """Writes the calls' names, and stops before the first call and after each."""
    import torch

    torch.set_num_threads(1)
    sizes = [named(n) for n in SIZES]
    os.write(names, json.dumps(list(sizes[0])).encode())
    prepared = [call for size in sizes for call in size.values()]
    for _ in range(2):  # the first ones allocate
        for call in prepared:
            call()
    ptrace(TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    for call in prepared:
        call()
        os.kill(os.getpid(), signal.SIGSTOP)


@functools.cache
def symbols() -> list[tuple[str, int]]:
    """The library's functions: mangled names, which local ones may share, and addresses."""
    text = subprocess.run(["nm", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    found = (line.split() for line in text.splitlines())
    return [(words[2], int(words[0], 16)) for words in found if len(words) == 3 and words[1] in "tT"]


def versions() -> list[str]:
    """The instruction sets that the library was compiled for."""
    several = any("_v4E" in name for name, _ in symbols())
    return ["baseline", "x86-64-v3", "x86-64-v4"] if several else ["baseline"]


def isa() -> str:
    """The instruction set whose version runs, if the compiler made several."""
    import torch

    if versions() == ["baseline"]:
        return "baseline"
    best = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}.get(torch.backends.cpu.get_cpu_capability(), "baseline")
    return os.environ.get("PYDRONE_ISA") or best


def base(pid: int) -> int:
    """Where the library begins in the child's memory."""
    maps = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return min(int(line[0].split("-")[0], 16) for line in maps if line[-1] == str(LIBRARY))


def entries(pid: int) -> list[int]:
    """The operations' addresses in the child."""
    wanted = [*EXPORTED, *(f"_ZN7pydrone{len(x)}{x}E" for x in OPERATIONS)]
    found = [
        base(pid) + address
        for name, address in symbols()
        if any(name.startswith(x) for x in wanted) and "." not in name
    ]
    assert len(found) == len(wanted), f"{LIBRARY}: {len(found)} of {wanted} found by nm"
    return found


def stopped_by(pid: int) -> int | None:
    status = os.waitpid(pid, 0)[1]
    return os.WSTOPSIG(status) if os.WIFSTOPPED(status) else None


def steps(pid: int) -> int:
    """Instructions up to the return to NOWHERE, which the kernel refuses to execute: the program counter, whose reading
    would take a third of the time, need not be read."""
    count, step, wait = 0, functools.partial(LIBC.ptrace, STEP, pid, 0, 0), functools.partial(os.waitpid, pid, 0)
    step()
    while wait()[1] == STEPPED:
        count += 1
        step()
    assert ptrace(PEEK_REGISTER, pid, RIP) == NOWHERE, "the operation crashed"
    return count


def counts(pid: int) -> Iterator[int]:
    """Instructions of the operations up to each of the child's stops after the first."""
    assert stopped_by(pid) == signal.SIGSTOP, "the child failed before its first call"
    words = {address: ptrace(PEEK_CODE, pid, address) for address in entries(pid)}
    for address, word in words.items():
        ptrace(POKE_CODE, pid, address, word & ~0xFF | 0xCC)  # int3
    count = 0
    ptrace(CONTINUE, pid)
    while (by := stopped_by(pid)) is not None:
        if by == signal.SIGSTOP:
            yield count
            count = 0
        else:
            assert by == signal.SIGTRAP, f"the child got signal {by}"
            entry = ptrace(PEEK_REGISTER, pid, RIP) - 1
            stack = ptrace(PEEK_REGISTER, pid, RSP)
            back = ptrace(PEEK_CODE, pid, stack)
            ptrace(POKE_CODE, pid, entry, words[entry])
            ptrace(POKE_REGISTER, pid, RIP, entry)
            ptrace(POKE_CODE, pid, stack, NOWHERE)
            count += steps(pid)
            ptrace(POKE_REGISTER, pid, RIP, back)
            ptrace(POKE_CODE, pid, entry, words[entry] & ~0xFF | 0xCC)
        ptrace(CONTINUE, pid)


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on one core a switch between the two costs least
    names, write = os.pipe()
    pid = os.fork()  # before torch starts a thread; only the child imports it, which takes longer than most counts
    if pid == 0:
        child(write)
        return
    found = list(counts(pid))
    names = json.loads(os.read(names, 4096))
    small, large = found[: len(names)], found[len(names) :]
    samples = {x: (SIZES[1] - SIZES[0]) * SAMPLES.get(x, T) for x in names}
    print(json.dumps({x: (b - a) / samples[x] for x, a, b in zip(names, small, large, strict=True)}))


if __name__ == "__main__":
    main()
