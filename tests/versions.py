"""Which versions of the hot loops the CPU library's operations run: a parent has a child stop at the first instruction
of each. Linux on x86-64 only.

Prints {operation: versions} as JSON: ``python tests/versions.py``; ``PYDRONE_ISA`` as in docs/environment-variables.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator

import instructions
from instructions import CONTINUE, PEEK_CODE, PEEK_REGISTER, POKE_CODE, POKE_REGISTER, RIP, TRACEME, ptrace

OPERATIONS = (
    "gae",
    "gae of rows",
    "off_policy",
    "append",
    "gather",
    "ppo_gradients",
    "clipped_adam",
    "ppo_act",
    "ppo_step",
    "task_step",
)
ISAS = {"base": "baseline", "baseline": "baseline", "v3": "x86-64-v3", "v4": "x86-64-v4", "bf16": "x86-64-v4"}
VERSION = re.compile(r"\d\w+_(v3|v4|baseline)E|\dmlp_(base|v3|v4|bf16)[L\d]")


def calls(n: int = 64) -> dict[str, Callable[[], object]]:
    """A call for each of OPERATIONS."""
    import torch

    from pydrone.buffer import RolloutBuffer
    from pydrone.ppo import clipped_step, fused_update
    from pydrone.ppo.config import PPOConfig
    from pydrone.ppo.learner import fused
    from pydrone.ppo.learner.acting import FusedActing
    from pydrone.ppo.policy.make import make_policy

    known = instructions.calls(n)
    policy = make_policy(17, 4, PPOConfig(hidden_dims=(33, 16)))
    actor, critic = (
        torch.nn.Sequential(torch.nn.Linear(17, 33), torch.nn.Tanh(), torch.nn.Linear(33, outputs))
        for outputs in (4, 1)
    )
    std = torch.nn.Parameter(torch.ones(4))
    scalars = {name: torch.randn(n) for name in ("values", "log_probs", "advantages", "returns")}
    given = {"obs": torch.randn(n, 17), "actions": torch.randn(n, 4), **scalars}
    parameters = [*actor.parameters(), *critic.parameters(), std]
    optimizer = torch.optim.Adam(parameters)
    fused_update(actor, critic, std, **given)
    acting = FusedActing(policy, RolloutBuffer(n, 5, 17, 4, fields=policy.fields()), lambda stage: None)
    ends = {"rewards": torch.randn(n), "dones": torch.rand(n) < 0.1}

    def step() -> None:
        with torch.no_grad():
            acting(given["obs"], ends)

    with torch.no_grad():
        acting(given["obs"], None)
    made = (
        known["gae of [T, N]"],
        known["gae of [N, T]"],
        known["vtrace of [T, N]"],
        known["append"],
        known["minibatches"],
        lambda: fused_update(actor, critic, std, **given),
        lambda: clipped_step(optimizer, [parameters], 0.7),
        lambda: fused.act(policy, given["obs"]),
        step,
        instructions.environment(n, ["step"])["step"],
    )
    return dict(zip(OPERATIONS, made, strict=True))


def child() -> None:
    """Stops before the first call and after each."""
    import torch

    torch.set_num_threads(1)
    prepared = calls()
    ptrace(TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    for call in prepared.values():
        call()
        os.kill(os.getpid(), signal.SIGSTOP)


def entries(pid: int) -> dict[int, str]:
    """The instruction sets of the functions that are compiled for several, by address in the child."""
    begin = instructions.base(pid)
    found = ((address, VERSION.search(name)) for name, address in instructions.symbols())
    return {begin + address: ISAS[match[1] or match[2]] for address, match in found if match}


def picked(pid: int) -> Iterator[set[str]]:
    """The versions that ran up to each of the child's stops after the first."""
    assert instructions.stopped_by(pid) == signal.SIGSTOP, "the child failed before its first call"
    versions = entries(pid)
    words = {address: ptrace(PEEK_CODE, pid, address) for address in versions}
    for address in words:  # a word may hold other breakpoints
        ptrace(POKE_CODE, pid, address, ptrace(PEEK_CODE, pid, address) & ~0xFF | 0xCC)
    planted, seen = set(words), set()
    ptrace(CONTINUE, pid)
    while (by := instructions.stopped_by(pid)) is not None:
        if by == signal.SIGSTOP:
            yield seen
            seen = set()
            for address in words.keys() - planted:
                ptrace(POKE_CODE, pid, address, ptrace(PEEK_CODE, pid, address) & ~0xFF | 0xCC)
            planted = set(words)
        else:
            assert by == signal.SIGTRAP, f"the child got signal {by}"
            entry = ptrace(PEEK_REGISTER, pid, RIP) - 1
            seen.add(versions[entry])
            ptrace(POKE_CODE, pid, entry, ptrace(PEEK_CODE, pid, entry) & ~0xFF | words[entry] & 0xFF)
            planted.discard(entry)
            ptrace(POKE_REGISTER, pid, RIP, entry)
        ptrace(CONTINUE, pid)


def main() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on one core a switch between the two costs least
    pid = os.fork()  # before torch starts a thread
    if pid == 0:
        child()
        return
    found = [sorted(x) for x in picked(pid)]
    print(json.dumps(dict(zip(OPERATIONS, found, strict=True))))


if __name__ == "__main__":
    main()
