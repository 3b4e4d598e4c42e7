"""Which contenders take part in which comparison, on which device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cases
from clock import Clock
from measurement import Absent, Contender, Run
from peers import by_hand, gpu_kernels, kernels, ours, rl_games, rsl_rl, sb3, skrl, torchrl, train, update
from workload import (
    BATCH_BYTES,
    GAE_BYTES,
    NUM_ACTIONS,
    NUM_EPOCHS,
    NUM_MINIBATCHES,
    NUM_OBS,
    POLICY_BYTES,
    ROW_BYTES,
    Size,
)

import pydrone

LEAN = "pydrone (no mean, std)"
WIDE = "pydrone, 512 256 128"  # ELU, as Isaac Lab and mjlab have them
COPY = "memcpy"  # of the bytes that the operation must read and write
TRITON = ", triton"  # the second backend of a GPU; "pydrone" is on the default one

# How many operations one call performs.
PER: dict[str, Callable[[Size], int]] = {
    "append": lambda size: size.num_steps,
    "minibatch epoch": lambda size: NUM_MINIBATCHES,
    "calls": lambda size: size.num_steps,
    "act and store": lambda size: size.num_steps,
}


def _ours(name: str, prepare: Callable, make: Callable | None, clock: Clock, **rest: object) -> list[Contender]:
    """pydrone on the default backend, and on a GPU also on Triton's, there with device time of ``make``'s launches."""

    def on(backend: str | None) -> Callable:
        if make is None or clock.kind == "cpu":
            return partial(prepare, backend=backend)
        return cases.timed(prepare, make, clock.cache_bytes, backend)

    def second(rollout: object) -> Run:
        reason = pydrone.backends()["triton"]
        if reason is not None:
            raise Absent(reason)
        return on("triton")(rollout)

    found = [Contender(name, on(None), **rest)]
    return found + ([Contender(name + TRITON, second, **rest)] if clock.kind == "cuda" else [])


def _copy(useful: int, clock: Clock, operation: str) -> Contender:
    """A memcpy; on a GPU split into one copy per operation of the call, since launches are timed one by one there."""
    parts = PER.get(operation) if clock.kind == "cuda" else None
    return Contender(COPY, by_hand.memcpy(useful, parts=parts), useful, useful, capturable=True)


def gae(clock: Clock) -> list[Contender]:
    """Advantages and returns; the time includes what else a package does in this step (normalisation, statistics).

    V-trace and Retrace have ratios of one, so that their targets are GAE's returns; they read 4 or 8 bytes more.
    """
    all_of = partial(Contender, useful_bytes=GAE_BYTES)
    # A CUDA graph can capture only launches on the current stream.
    graph = partial(all_of, capturable=True)
    rest = {"useful_bytes": GAE_BYTES, "capturable": True}
    return [
        *_ours("pydrone", ours.gae, cases.gae, clock, storage_bytes=49, **rest),
        *_ours("pydrone.gae [T, N]", ours.gae_steps, None, clock, storage_bytes=8, **rest),
        *_ours("pydrone.gae [N, T]", ours.gae_rows, None, clock, storage_bytes=17, **rest),
        *_ours("pydrone.vtrace [T, N]", ours.vtrace_steps, None, clock, storage_bytes=8, **rest),
        *_ours("pydrone.retrace [T, N]", ours.retrace_steps, None, clock, storage_bytes=4, **rest),
        _copy(GAE_BYTES, clock, "gae"),
        graph("torch loop", by_hand.gae_loop, storage_bytes=12),
        graph("torch.compile", by_hand.gae_compiled, storage_bytes=8),
        graph("rsl_rl", rsl_rl.gae, storage_bytes=40),
        all_of("skrl", skrl.gae, storage_bytes=16),
        all_of("SB3", sb3.gae, storage_bytes=36, on_host=True),
        all_of("TorchRL loop", torchrl.gae_loop, storage_bytes=40),
        all_of("TorchRL vectorised", torchrl.gae_vectorised, storage_bytes=40),
        all_of("TorchRL V-trace", torchrl.vtrace, storage_bytes=40),
        all_of("rl_games", rl_games.gae, storage_bytes=24),
        graph("PufferLib", gpu_kernels.gae_pufferlib, storage_bytes=20),
        graph("rl-triton", gpu_kernels.gae_rl_triton, storage_bytes=16),
    ]


def append(clock: Clock) -> list[Contender]:
    """A whole rollout, stored step by step: each field is read once and written once."""
    full = partial(Contender, useful_bytes=2 * (ROW_BYTES + POLICY_BYTES))
    lean = partial(Contender, useful_bytes=2 * ROW_BYTES, against=LEAN)
    rest = {"useful_bytes": 2 * (ROW_BYTES + POLICY_BYTES), "storage_bytes": 150}
    return [
        *_ours("pydrone", ours.append, cases.append, clock, **rest),
        *_ours("pydrone begin + end", ours.append_split, None, clock, **rest),
        lean(LEAN, partial(ours.append, policy=False), storage_bytes=120),
        _copy(2 * (ROW_BYTES + POLICY_BYTES), clock, "append"),
        full("copy_ a field", by_hand.append_copies, storage_bytes=129, capturable=True),
        full("rsl_rl", rsl_rl.append, storage_bytes=150, capturable=True),
        full("rl_games", rl_games.append, storage_bytes=150),
        lean("skrl", skrl.append, storage_bytes=110),
        lean("SB3", sb3.append, storage_bytes=120, on_host=True),
        lean("TorchRL", torchrl.append, storage_bytes=100),
    ]


def epoch(clock: Clock) -> list[Contender]:
    """One epoch of shuffled minibatches of all that PPO learns from: each value is read once and written once.

    Peers draw a randperm, which may wait for the GPU: none of them is captured.
    """
    full = partial(Contender, useful_bytes=2 * (BATCH_BYTES + POLICY_BYTES))
    lean = partial(Contender, useful_bytes=2 * BATCH_BYTES, against=LEAN)
    rest = {"useful_bytes": 2 * (BATCH_BYTES + POLICY_BYTES)}
    reused = partial(ours.epoch, reuse=True)
    return [
        *_ours("pydrone", ours.epoch, cases.gather, clock, storage_bytes=150, **rest),
        *_ours("pydrone reuse", reused, cases.gather, clock, storage_bytes=180, **rest),
        lean(LEAN, partial(ours.epoch, policy=False), storage_bytes=120),
        _copy(2 * (BATCH_BYTES + POLICY_BYTES), clock, "minibatch epoch"),
        full("index_select", by_hand.epoch_index_select, storage_bytes=60),
        full("rsl_rl", rsl_rl.epoch, storage_bytes=150),
        full("rl_games", rl_games.epoch, storage_bytes=290),
        lean("skrl", skrl.epoch, storage_bytes=110),
        lean("SB3", sb3.epoch, storage_bytes=120, on_host=True),
        lean("TorchRL", torchrl.epoch, storage_bytes=220),
    ]


def calls(clock: Clock) -> list[Contender]:
    """As many calls of each operation as a rollout has steps, and of ``copy_`` for a tensor [N]. "pydrone" is
    ``compute_gae``."""
    rest = {"storage_bytes": 180, "against": COPY}
    return [
        *_ours("pydrone", ours.gae_calls, None, clock, **rest),
        *_ours("pydrone.gae(out=)", ours.gae_out_calls, None, clock, **rest),
        *_ours("pydrone append", ours.append, None, clock, **rest),
        *_ours("pydrone begin + end", ours.append_split, None, clock, **rest),
        *_ours("pydrone minibatch", ours.minibatch_calls, None, clock, **rest),
        Contender(COPY, by_hand.small_copies, against=COPY),
    ]


def _iteration_bytes() -> tuple[int, int]:
    """Useful bytes of append, GAE and all epochs, without and with the policy's mean and std."""
    lean = 2 * ROW_BYTES + GAE_BYTES + NUM_EPOCHS * 2 * BATCH_BYTES
    return lean, lean + (1 + NUM_EPOCHS) * 2 * POLICY_BYTES


def iteration(clock: Clock) -> list[Contender]:
    """Append, GAE and all epochs, without the networks."""
    without, with_policy = _iteration_bytes()
    full = partial(Contender, useful_bytes=with_policy)
    lean = partial(Contender, useful_bytes=without, against=LEAN)
    copies = by_hand.memcpy(with_policy, 1 + NUM_EPOCHS)
    return [
        *_ours("pydrone", ours.iteration, None, clock, useful_bytes=with_policy, storage_bytes=180),
        lean(LEAN, partial(ours.iteration, policy=False), storage_bytes=140),
        full(COPY, copies, storage_bytes=with_policy // (1 + NUM_EPOCHS), capturable=True),
        full("torch, by hand", by_hand.iteration, storage_bytes=200),
        full("rsl_rl", rsl_rl.iteration, storage_bytes=150),
        full("rl_games", rl_games.iteration, storage_bytes=290),
        lean("skrl", skrl.iteration, storage_bytes=110),
        lean("SB3", sb3.iteration, storage_bytes=120, on_host=True),
        lean("TorchRL", torchrl.iteration, storage_bytes=330),
    ]


def ppo_update(clock: Clock) -> list[Contender]:
    """All epochs of one rollout: minibatches, networks forward and back, Adam.

    The useful bytes are the epochs' samples, read once: a lower bound far below the arithmetic's time.
    """
    some = partial(Contender, useful_bytes=NUM_EPOCHS * (BATCH_BYTES + POLICY_BYTES))
    return [
        some("pydrone", update.ours),
        some("pydrone, --autocast", partial(update.ours, autocast=True)),
        some("pydrone, --learner torch", partial(update.ours, learner="torch")),
        some("pydrone, captured", partial(update.ours, capture=True)),
        some("rsl_rl", update.rsl_rl),
        some("rsl_rl on pydrone", partial(update.rsl_rl, class_name=train.ON_PYDRONE)),
        some("rsl_rl, torch.compile", partial(update.rsl_rl, compile_mode="default")),
        some(COPY, by_hand.memcpy(NUM_EPOCHS * (BATCH_BYTES + POLICY_BYTES))),
    ]


def training(clock: Clock) -> list[Contender]:
    """A whole training iteration: simulation, policy, storage, GAE, update of the networks.

    The bytes that a simulator must move are unknown; the memcpy covers storage, GAE and minibatches only.
    """
    copies = by_hand.memcpy(_iteration_bytes()[1], 1 + NUM_EPOCHS)
    return [
        Contender("pydrone", train.ours),
        Contender("rsl_rl", train.rsl_rl),
        Contender("rsl_rl on pydrone", partial(train.rsl_rl, class_name=train.ON_PYDRONE)),
        Contender(COPY, copies, _iteration_bytes()[1]),
        # Last: a capture that fails can leave CUDA unusable.
        Contender("pydrone, --capture", partial(train.ours, capture=True)),
    ]


def training_on_genesis(clock: Clock) -> list[Contender]:
    """The same with the Genesis simulator, on a GPU alone. One scene serves all: building it takes a minute."""
    copies = by_hand.memcpy(_iteration_bytes()[1], 1 + NUM_EPOCHS)
    return [
        Contender("pydrone", partial(train.on_genesis, train.ours)),
        Contender("rsl_rl", partial(train.on_genesis, train.rsl_rl)),
        Contender(COPY, copies, _iteration_bytes()[1]),
        Contender("pydrone, --capture", partial(train.on_genesis, train.ours, capture="auto")),
    ]


def _precisions(prepare: Callable, clock: Clock, **rest: object) -> list[Contender]:
    """pydrone's kernel in each precision of the products, and torch in the default one and in float32.

    Where no kernel serves float32, its row is what pydrone does instead.
    """
    some = partial(Contender, **rest)
    on_cuda = clock.kind == "cuda"
    return [
        some("pydrone", prepare, capturable=True),
        some("pydrone, bfloat16", partial(prepare, matmul="bfloat16"), capturable=True),
        some("pydrone, float32", partial(prepare, matmul="float32", served=not on_cuda)),
        some("pydrone, --learner torch", partial(prepare, served=False, learner="torch")),
        some("the same, float32", partial(prepare, served=False, learner="torch", matmul="float32")),
        some("the same, bfloat16", partial(prepare, served=False, learner="torch", matmul="bfloat16")),
    ]


def ppo_gradients(clock: Clock) -> list[Contender]:
    """Gradients of one minibatch, both networks, loss included. The useful bytes are its samples, read once."""
    useful = (BATCH_BYTES + POLICY_BYTES) // NUM_MINIBATCHES
    return [*_precisions(kernels.gradients, clock, useful_bytes=useful), _copy(useful, clock, "ppo gradients")]


def ppo_minibatch(clock: Clock) -> list[Contender]:
    """Gradients and Adam of one minibatch; also for wide networks, which go layer by layer on CUDA."""
    useful = (BATCH_BYTES + POLICY_BYTES) // NUM_MINIBATCHES
    some, wide = partial(Contender, useful_bytes=useful), partial(kernels.minibatch, served=False, **kernels.WIDE)
    return [
        *_precisions(kernels.minibatch, clock, useful_bytes=useful),
        some(WIDE, wide),
        some(f"{WIDE}, --learner torch", partial(wide, learner="torch"), against=WIDE),
        _copy(useful, clock, "ppo minibatch"),
    ]


def _beside_torch(prepare: Callable, copy: Contender, **theirs: object) -> list[Contender]:
    some = partial(Contender, useful_bytes=copy.useful_bytes, capturable=True)
    return [some("pydrone", prepare), some("torch", partial(prepare, **(theirs or {"by_torch": True}))), copy]


def _copy_of(nbytes: Callable[[Size], int]) -> Contender:
    """A memcpy of ``nbytes``, where these are not so many bytes for each sample of a rollout."""

    def prepare(setting: train.Setting) -> Run:
        return by_hand.memcpy(16)(train.Setting(Size(max(1, nbytes(setting.size) // 16), 1), setting.device))

    return Contender(COPY, prepare, capturable=True)


def clipped_adam(clock: Clock) -> list[Contender]:
    """Of each parameter: its value, gradient and two moments are read, all but the gradient written."""
    parameters = 2 * (NUM_OBS + 1) * 128 + 2 * 129 * 128 + 129 * (NUM_ACTIONS + 1)
    return _beside_torch(kernels.clipped_adam, _copy_of(lambda size: 7 * 4 * parameters))


def act(clock: Clock) -> list[Contender]:
    """Of each environment: observation and noise are read, actions, mean, value and log-probability written."""
    nbytes = 4 * (NUM_OBS + 3 * NUM_ACTIONS + 2)
    found = _beside_torch(kernels.act, _copy_of(lambda size: nbytes * size.num_envs))
    precisions = [(f"pydrone, {x}", partial(kernels.act, matmul=x)) for x in ("float32", "bfloat16")]
    return found[:1] + [Contender(*x, capturable=True) for x in precisions] + found[1:]


def act_and_store(clock: Clock) -> list[Contender]:
    """What is stored is read and written, as by append."""
    return _beside_torch(kernels.act_and_store, _copy(2 * (ROW_BYTES + POLICY_BYTES), clock, "append"))


def environment_step(clock: Clock) -> list[Contender]:
    """Of each drone: the state is read and written, actions are read, two observations and a reward written."""
    nbytes = 4 * (2 * 13 + NUM_ACTIONS + 2 * NUM_OBS + 1)
    return _beside_torch(kernels.environment, _copy_of(lambda size: nbytes * size.num_envs), fused=False)


def layer_forward(clock: Clock) -> list[Contender]:
    """Each activation is read once and written once."""
    return _beside_torch(kernels.layer_forward, _copy(_layer_bytes(2), clock, "layer forward"))


def layer_backward(clock: Clock) -> list[Contender]:
    """Gradient and activation are read once, the other gradient is written once."""
    return _beside_torch(kernels.layer_backward, _copy(_layer_bytes(3), clock, "layer backward"))


def _layer_bytes(accesses: int) -> int:
    return accesses * 4 * sum(kernels.WIDE["hidden_dims"]) // NUM_MINIBATCHES


OPERATIONS = {
    "gae": gae,
    "append": append,
    "minibatch epoch": epoch,
    "iteration": iteration,
    "calls": calls,
    "ppo gradients": ppo_gradients,
    "ppo minibatch": ppo_minibatch,
    "clipped adam": clipped_adam,
    "act": act,
    "act and store": act_and_store,
    "environment step": environment_step,
    "layer forward": layer_forward,
    "layer backward": layer_backward,
    "update": ppo_update,
    "training": training,
    "training on Genesis": training_on_genesis,
}
# Of OPERATIONS, those of benches/bench_ppo.py; and the one that `make gpu-bench` leaves out.
KERNELS = tuple(OPERATIONS)[5:13]
APART = "training on Genesis"
# The sweep's contenders: enough to see the slope.
SWEEP = ("pydrone", COPY, "rsl_rl")


def contenders(operation: str, clock: Clock) -> list[Contender]:
    """The contenders of one of OPERATIONS, or of "sweep: " and one of them."""
    name = operation.removeprefix("sweep: ")
    return [c for c in OPERATIONS[name](clock) if name == operation or c.name in SWEEP]
