"""Compiles the Triton kernels without a GPU and prints figures of their machine code as JSON.

test_triton_compile.py runs it in a process without TRITON_INTERPRET. It calls the real launchers; instead of a launch,
the kernel is compiled for the compute capability given as the argument (80, 90, 120). A second one, "few", leaves out
what takes seconds.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pydrone._triton import ppo_act as act_module
from pydrone._triton import ppo_gradients as gradients_module
from pydrone._triton.append import append
from pydrone._triton.clipped_adam import clipped_adam
from pydrone._triton.gae import gae, off_policy
from pydrone._triton.gather import gather
from pydrone._triton.layers import activate, activate_backward
from pydrone._triton.ppo_act import ppo_act, ppo_step
from pydrone._triton.ppo_loss import ppo_loss
from pydrone.envs import Randomization, fused
from pydrone.envs.drone import DroneState
from pydrone.envs.quadrotor import Quadrotor, QuadrotorCourse
from pydrone.ops.schema import (
    ACTIVATIONS,
    MATMUL,
    SCALAR_TYPES,
    layer_workspace_size,
    loss_workspace_size,
    workspace_size,
)

OPCODE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)  # and its address
EXTREME = re.compile(r"\b(?:min|max)\.[\w.]*(?:f16|f32|f64)\w*")  # of floating numbers
TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
FEW = "few" in sys.argv[2:]
F32 = SCALAR_TYPES[torch.float32]
# Bytes of shared memory that a program may have.
SHARED = {80: 163, 90: 227, 100: 227}.get(TARGET.arch, 99) * 1024
gradients_module._shared_memory_of = lambda device: SHARED
gradients_module._programs = lambda config, device: 66


def compile_only(kernel: JITFunction, *args, grid, warmup, **options) -> None:
    backend = make_backend(TARGET)
    options |= {"debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled.append(triton.compile(source, target=TARGET, options=options.__dict__))


compiled: list = []
act_module.generation = lambda device: TARGET.arch // 10
JITFunction.run = compile_only


def tool(name: str, *arguments: str) -> str:
    path = os.path.join(triton.__path__[0], "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> bytes:
    """The kernel's section of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, number, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<2I4Q", cubin, table + size * i) for i in range(number)]
    begin = sections[names][4]
    (found,) = [x for x in sections if cubin.startswith(b".text.", begin + x[0])]
    return cubin[found[4] : found[4] + found[5]]


def disassembled(codes: list[bytes]) -> list[list[str]]:
    """The opcodes of each kernel. One call for all: nvdisasm takes 0.4 s to start."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        listing = tool("nvdisasm", "--binary", f"SM{TARGET.arch}{'a' if TARGET.arch >= 90 else ''}", file.name)
    found, ends = [[] for _ in codes], list(itertools.accumulate(map(len, codes)))
    for address, opcode in OPCODE.findall(listing):
        found[bisect.bisect(ends, int(address, 16))].append(opcode)
    return found


def report(name: str, launch: Callable[[], int | None] | None, which: int = -1) -> dict:
    """Of the kernel that ``launch`` launches last, or of another; ``launch`` None: the last launches. Without what
    ``main`` adds from the machine code, which is ``code``."""
    estimate = None if launch is None else launch()
    kernel = compiled[which]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "name": name,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "architecture": TARGET.arch,
        "estimated shared": estimate,
        "most shared": SHARED,
        "minima and maxima": Counter(EXTREME.findall(kernel.asm["ptx"])),
        "code": instructions(kernel.asm["cubin"]),
    }


def column(num_envs: int, steps: int, time_major: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(steps, num_envs, dtype=dtype).t() if time_major else torch.empty(num_envs, steps, dtype=dtype)


def launch_gae(
    num_envs=8192, num_steps=100, capacity=100, start=0, time_major=False, stats=True, pool=False, cursor=False,
    dtype=torch.float32,
) -> None:  # fmt: skip
    make = partial(column, num_envs, capacity, time_major)
    gae(
        make(), make(), make(torch.uint8), None, None, torch.empty(num_envs), torch.empty(64) if pool else None,
        make(torch.int32) if pool else None, 0.99, 0.95, start, True, int(pool),
        torch.zeros(5, dtype=torch.int64) if cursor else None, column(num_envs, num_steps, time_major, dtype),
        column(num_envs, num_steps, time_major, dtype), torch.empty(3, dtype=torch.float64) if stats else None,
        torch.empty(workspace_size(num_envs), dtype=torch.float64),
    )  # fmt: skip


def launch_off_policy(retrace: bool, time_major=False, num_envs=8192, num_steps=100, dtype=torch.float32) -> None:
    make = partial(column, num_envs, num_steps, time_major)
    off_policy(
        make(), make(), make(torch.uint8), None, None, torch.empty(num_envs), None, None, make(),
        make() if retrace else None, 0.99, 0.95, 1.0, 1.0, 0, True, 0, None, None if retrace else make(dtype),
        make(dtype), None if retrace else torch.empty(3, dtype=torch.float64),
        torch.empty(workspace_size(num_envs), dtype=torch.float64),
    )  # fmt: skip


WIDTHS, OFFSETS = (17, 4, 1, 1, 4, 4), (0, 68, 84, 88, 92, 108)


def launch_append(cursor: bool, num_envs: int = 8192, capacity: int = 4) -> None:
    sources = [torch.empty(num_envs, width) for width in WIDTHS]
    flag, plane = torch.empty(num_envs, dtype=torch.bool), column(num_envs, capacity, False)
    pool = torch.empty(2, num_envs, 96, dtype=torch.uint8)
    fields = [(offset, F32, width, 1) for offset, width in zip((*OFFSETS, 0), (*WIDTHS, WIDTHS[0]), strict=True)]
    append(
        [torch.empty(capacity, num_envs, 128, dtype=torch.uint8), plane.to(torch.uint8), plane, plane, pool,
         torch.zeros(2, 2, dtype=torch.int32), plane.int(), torch.zeros(2, dtype=torch.int32)],
        [*sources, sources[2], sources[3], sources[0]], torch.tensor([(len(sources), 2, 1, 1), *fields]), flag, flag,
        None, 1, 1, torch.zeros(5, dtype=torch.int64) if cursor else None, True,
    )  # fmt: skip


def launch_gather(cursor: bool, num_envs: int = 8192, num_steps: int = 4) -> None:
    batch = num_envs * num_steps // 4
    scalar = torch.empty(batch)
    gather(
        torch.empty(num_steps, num_envs, 128, dtype=torch.uint8), list(OFFSETS), [F32] * 6,
        [torch.empty(batch, width) for width in WIDTHS], 84, torch.empty(num_envs, num_steps),
        None, torch.empty(3, dtype=torch.float64), None, num_steps, 0, num_envs * num_steps, 1, 2, 3, True, 0,
        torch.zeros(5, dtype=torch.int64) if cursor else None, scalar, scalar, torch.empty(batch, dtype=torch.int64),
    )  # fmt: skip


def launch_loss(
    actions: int = 4, batch: int = 8192 * 25, strided: bool = False, moments: bool = False, dtype=torch.float32
) -> None:
    make = partial(torch.empty, dtype=dtype)

    def wide() -> torch.Tensor:
        return make(batch, 2 * actions)[:, ::2] if strided else make(batch, actions)

    scalar, std = make(batch), make(actions)
    one = make(()) if moments else None
    ppo_loss(
        wide(), std, wide(), *[scalar] * 5, wide(), wide(), 0.2, 0.2, 1.0, 0.01, one, one, batch,
        make(batch, actions), scalar, std, make(4),
        torch.empty(loss_workspace_size(batch, actions), dtype=torch.float64),
    )  # fmt: skip


VARIED = Randomization(
    mass=(0.8, 1.2), motor_lag=(0.0, 0.05), latency=(0, 2), wind=(0.0, 0.02), pos_noise=(0.0, 0.01)
)  # fmt: skip
OPTIONS = {"randomization": VARIED, "hold": 0.05, "weight_near": 1.0, "max_tilt": 60.0, "init_tilt": 45.0}


def launch_step(course: bool = False, physics: bool = True, num_envs: int = 8192, **options) -> None:
    """The environment's own call, with ``physics``; else the task's, of a simulator's rows of 13."""
    env = (QuadrotorCourse if course else Quadrotor)(num_envs, **options)
    task, actions = env.task, torch.empty(num_envs, 4)
    state = DroneState(env.pos, env.quat, env.vel, env.ang_vel)
    if not physics:
        pos, quat, _, ang_vel = torch.empty(num_envs, 13).split((3, 4, 3, 3), dim=1)
        state = DroneState(pos, quat, env.vel, ang_vel)
    fused.FusedStep(task)(task, state, actions, *((env._body, env.substeps) if physics else ()))


def solver_of(n: int) -> fused.Solver:
    shapes = {"qpos": (7, n), "vel": (6, n), "error": (n,), "quat": (4, n, 4)}
    shapes |= dict.fromkeys(("arm", "force", "torque"), (4, n, 3))
    made = {name: torch.empty(shapes.get(name, (n, 3))) for name in fused.Solver._fields}
    return fused.Solver(**made | {"error": made["error"].int()})


def launch_around_simulator(propel: bool, num_envs: int = 8192, **options) -> None:
    """Before and after Genesis' own step."""
    task, actions = (QuadrotorCourse if options else Quadrotor)(num_envs, **options).task, torch.empty(num_envs, 4)
    made, solver = fused.FusedStep(task), solver_of(num_envs)
    if propel:
        made.propel(task, actions, solver, 3.16e-10, (-7.94e-12, 7.94e-12, -7.94e-12, 7.94e-12))
    else:
        made(task, solver, actions)


def launch_layer(activation: int, backward: bool, width: int = 512, batch: int = 8192 * 25) -> None:
    x = torch.empty(batch, width)
    out = torch.empty_like(x) if activation >= 0 and (backward or activation == ACTIVATIONS.index("silu")) else None
    if backward:
        workspace = torch.empty(layer_workspace_size(batch, width), dtype=torch.float64)
        activate_backward(x, x if activation >= 0 else None, activation, out, torch.empty(width), workspace)
    else:
        activate(x, torch.empty(width), activation, out)


def launch_gradients(
    matmul: str, hidden: tuple[int, ...], obs: int = 17, activation: str = "tanh", drawn: bool = False,
    categories: tuple[int, ...] = (), measured: int = 4,
) -> int:  # fmt: skip
    """Returns the estimate of shared memory by which a configuration is chosen."""
    make, actions, batch, outputs = torch.empty, len(categories) or 4, 8192, sum(categories) or 4

    def network(*widths: int) -> list[torch.Tensor]:
        return [x for i, o in itertools.pairwise(widths) for x in (make(o, i), make(o))]

    def field(width: int | None = None) -> torch.Tensor:
        if not drawn:
            return make(batch) if width is None else make(batch, width)
        rows = make(4, batch, 128)
        return rows[..., 0] if width is None else rows[..., :width]

    actor, critic, std = network(obs, *hidden, outputs), network(obs, *hidden, 1), [] if categories else [make(actions)]
    old = [None, None] if categories else [field(actions), field(actions)]
    columns = [field(actions), field(), make(batch, 4) if drawn else field(), None if drawn else field(), field()]
    last = [[4, 0, 4 * batch, 1, 2, 3, 1, 0, batch], make(3, dtype=torch.float64)] if drawn else [[], None]
    gradients_module.ppo_gradients(
        [field(obs)], [], *columns, *old, actor, critic, *(std or [None]), ACTIVATIONS.index(activation),
        MATMUL.index(matmul), 0.2, 0.2, 1.0, 0.01, *[None] * 4, 10.0, None, None,
        [torch.empty_like(x) for x in (*actor, *critic, *std)], make(measured), *last, None, None, categories,
    )  # fmt: skip
    config = gradients_module.config_of(actor, critic, MATMUL.index(matmul), SHARED)
    return gradients_module.shared_memory((obs, *hidden, outputs), config.samples, config.precision)


def launch_adam(hidden: tuple[int, ...]) -> None:
    shapes = []
    for outputs in (4, 1):
        widths = (17, *hidden, outputs)
        shapes += [x for i, o in itertools.pairwise(widths) for x in ((o, i), (o,))]
    lists = [[torch.empty(shape) for shape in [*shapes, (4,)]] for _ in range(4)]
    groups = [0] * (len(shapes) // 2) + [1] * (len(shapes) // 2) + [0]
    clipped_adam(
        *lists, [torch.empty(()) for _ in groups], groups, 1.0, torch.empty(()), 0.9, 0.999, 1e-8, torch.empty(2),
        torch.empty((), dtype=torch.float64), [0.01, 1e-6, 1.5, 1e-5, 1e-2],
    )  # fmt: skip


def launch_act(matmul: str, step: bool = False, num_envs: int = 8192, categories: tuple[int, ...] = ()) -> None:
    """Four outputs."""
    wide, scalar, std = torch.empty(num_envs, 4), torch.empty(num_envs), None if categories else torch.empty(4)
    obs = torch.empty(num_envs, 17)
    networks = []
    for outputs in (4, 1):
        widths = (17, 128, 128, outputs)
        networks.append([x for i, o in itertools.pairwise(widths) for x in (torch.empty(o, i), torch.empty(o))])
    act = [[obs], [], wide, *networks, std, 0, MATMUL.index(matmul), *[None] * 4, 10.0, None, None, None]
    act += [wide, scalar, scalar, wide]
    if not step:
        ppo_act(*act[:-4], wide[:, : len(categories) or 4], *act[-3:], categories)
        return
    plane, flag = torch.empty(num_envs, 4), torch.empty(num_envs, dtype=torch.bool)
    memory = [torch.empty(4, num_envs, 128, dtype=torch.uint8), plane.to(torch.uint8), plane]
    pool = [torch.empty(2, num_envs, 96, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int32), plane.int()]
    end = torch.tensor([(0, 1, 1, 0), (0, F32, 17, 1)])
    fields = [(offset, F32, width, 1) for offset, width in zip(OFFSETS, WIDTHS, strict=True)]
    begin = torch.tensor([(len(fields), 1, 0, 0), *fields])
    cursor = torch.zeros(5, dtype=torch.int64)
    ppo_step(
        [*memory, *pool], [scalar, obs], end, flag, flag, None, 0, 0, *act, std.expand(num_envs, 4), memory, [obs],
        begin, 1, 0, cursor,
    )  # fmt: skip


def reports() -> Iterator[dict]:
    yield report("gae rows", launch_gae)
    yield report("gae rows, no statistics", partial(launch_gae, stats=False))
    yield report("gae rows, second rollout", partial(launch_gae, capacity=200, start=100))
    yield report("gae rows, few", partial(launch_gae, num_envs=1024))
    yield report("gae rows, pool", partial(launch_gae, pool=True))
    yield report("gae rows, cursor", partial(launch_gae, cursor=True))
    yield report("gae rows, wrapped", partial(launch_gae, capacity=120, start=40))
    yield report("gae rows, odd", partial(launch_gae, num_steps=101, capacity=101))
    yield report("gae rows, long", partial(launch_gae, num_steps=1000, capacity=1000))
    yield report("gae rows, several warps", partial(launch_gae, num_steps=2048, capacity=2048, num_envs=256))
    yield report("gae rows, short", partial(launch_gae, num_envs=32768, num_steps=8, capacity=8))
    yield report("vtrace rows", partial(launch_off_policy, False))
    yield report("retrace rows", partial(launch_off_policy, True))
    yield report("gae rows, float64", partial(launch_gae, dtype=torch.float64))
    yield report("gae columns", partial(launch_gae, time_major=True))
    if not FEW:
        yield report("vtrace columns", partial(launch_off_policy, False, True))
        yield report("retrace columns", partial(launch_off_policy, True, True))
        yield report("gae columns, pool", partial(launch_gae, time_major=True, pool=True))
    yield report("append", partial(launch_append, False))
    yield report("append, cursor", partial(launch_append, True))
    yield report("gather", partial(launch_gather, False))
    yield report("gather, cursor", partial(launch_gather, True))
    yield report("loss", launch_loss)
    yield report("loss, normalised values", partial(launch_loss, moments=True))
    yield report("loss, strided", partial(launch_loss, strided=True))
    yield report("loss, one action", partial(launch_loss, 1))
    yield report("loss, 17 actions", partial(launch_loss, 17))
    yield report("loss, float64", partial(launch_loss, dtype=torch.float64))
    yield report("env step", launch_step)
    yield report("env step, all options", partial(launch_step, course=True, **OPTIONS))
    yield report("task", partial(launch_step, physics=False))
    yield report("propellers", partial(launch_around_simulator, True))
    yield report("task in a solver", partial(launch_around_simulator, False))
    if not FEW:
        yield report("task, all options", partial(launch_step, physics=False, course=True, **OPTIONS))
        yield report("propellers, all options", partial(launch_around_simulator, True, **OPTIONS))
        yield report("task in a solver, all options", partial(launch_around_simulator, False, **OPTIONS))
    for i, name in enumerate(ACTIVATIONS):
        yield report(f"layer, {name}", partial(launch_layer, i, False))
        yield report(f"layer back, {name}", partial(launch_layer, i, True))
    yield report("layer back, none", partial(launch_layer, -1, True, 4))
    # Weights in TF32 are in shared memory twice; where it has 100 KB, 64 units fit.
    hidden = (128, 128) if SHARED > 200 * 1024 else (64, 64)
    yield report("gradients", partial(launch_gradients, "tf32", hidden, drawn=True), -2)
    yield report("gradients, sum", None)
    discrete = partial(launch_gradients, "tf32", (64, 64), drawn=True, categories=(3, 2, 7))
    yield report("gradients, discrete", discrete, -2)
    if not FEW:
        yield report("gradients, bfloat16", partial(launch_gradients, "bfloat16", (128, 128)), -2)
        yield report("gradients, float32", partial(launch_gradients, "float32", (32, 32)), -2)
        yield report("gradients, as many inputs as units", partial(launch_gradients, "tf32", (64, 64), 48, "silu"), -2)
    yield report("adam", partial(launch_adam, (128, 128)))
    yield report("adam, squares", None, -2)
    yield report("adam, wide", partial(launch_adam, (512, 256, 128)))
    yield report("adam, wide, squares", None, -2)
    yield report("step", partial(launch_act, "tf32", step=True))
    if not FEW:
        yield report("act, bfloat16", partial(launch_act, "bfloat16"))
        yield report("act, discrete", partial(launch_act, "tf32", categories=(3, 1)))
        yield report("step, float32", partial(launch_act, "float32", step=True))


def main() -> None:
    lines = list(reports())
    for line, opcodes in zip(lines, disassembled([line.pop("code") for line in lines]), strict=True):
        first_store = next(i for i, opcode in enumerate(opcodes) if opcode.startswith("STG"))
        line["opcodes"] = Counter(opcodes)
        ticket = next((i for i, opcode in enumerate(opcodes) if opcode.startswith("ATOM")), 0)
        line["before the ticket"] = {
            name: sum(opcode.startswith(name) for opcode in opcodes[:ticket]) for name in ("SHFL", "BAR", "STG.E.128")
        }
        line["loads before the first store"] = sum(opcode.startswith("LDG") for opcode in opcodes[:first_store])
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
