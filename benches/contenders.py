"""Who takes part in which comparison."""

from __future__ import annotations

from functools import partial

from harness import Contender
from peers import by_hand, gpu_kernels, ours, rl_games, rsl_rl, sb3, skrl, torchrl, train, update
from workload import BATCH_BYTES, GAE_BYTES, NUM_EPOCHS, POLICY_BYTES, ROW_BYTES

LEAN = "pydrone (no mean, std)"


def _contenders(rows: list[tuple]) -> list[Contender]:
    """(name, prepare, useful bytes a sample, storage a sample[, against])."""
    return [Contender(name, prepare, useful, *rest, storage_bytes=size) for name, prepare, useful, size, *rest in rows]


def gae() -> list[Contender]:
    """Advantages and returns; what else a package does in the same step (normalisation, statistics) is in its time."""
    size = GAE_BYTES
    return _contenders(
        [
            ("pydrone", ours.gae, size, 49),
            ("pydrone.gae [T, N]", ours.gae_steps, size, 8),
            ("pydrone.gae [N, T]", ours.gae_rows, size, 17),
            ("memcpy", by_hand.memcpy(size), size, 17),
            ("torch loop", by_hand.gae_loop, size, 12),
            ("torch.compile", by_hand.gae_compiled, size, 8),
            ("rsl_rl", rsl_rl.gae, size, 40),
            ("skrl", skrl.gae, size, 16),
            ("SB3", sb3.gae, size, 36),
            ("TorchRL loop", torchrl.gae_loop, size, 40),
            ("TorchRL vectorised", torchrl.gae_vectorised, size, 40),
            ("rl_games", rl_games.gae, size, 24),
            ("PufferLib", gpu_kernels.gae_pufferlib, size, 20),
            ("rl-triton", gpu_kernels.gae_rl_triton, size, 16),
        ]
    )


def append() -> list[Contender]:
    """A whole rollout, stored step by step: each field is read once and written once."""
    lean, full = 2 * ROW_BYTES, 2 * (ROW_BYTES + POLICY_BYTES)
    return _contenders(
        [
            ("pydrone", ours.append, full, 150),
            ("pydrone begin + end", ours.append_split, full, 150),
            (LEAN, partial(ours.append, policy=False), lean, 120, LEAN),
            ("memcpy", by_hand.memcpy(full), full, full),
            ("copy_ a field", by_hand.append_copies, full, 129),
            ("rsl_rl", rsl_rl.append, full, 150),
            ("rl_games", rl_games.append, full, 150),
            ("skrl", skrl.append, lean, 110, LEAN),
            ("SB3", sb3.append, lean, 120, LEAN),
            ("TorchRL", torchrl.append, lean, 100, LEAN),
        ]
    )


def epoch() -> list[Contender]:
    """One epoch of shuffled minibatches of all that PPO learns from: each value is read once and written once."""
    lean, full = 2 * BATCH_BYTES, 2 * (BATCH_BYTES + POLICY_BYTES)
    return _contenders(
        [
            ("pydrone", ours.epoch, full, 150),
            ("pydrone reuse", partial(ours.epoch, reuse=True), full, 180),
            (LEAN, partial(ours.epoch, policy=False), lean, 120, LEAN),
            ("memcpy", by_hand.memcpy(full), full, full),
            ("index_select", by_hand.epoch_index_select, full, 60),
            ("rsl_rl", rsl_rl.epoch, full, 150),
            ("rl_games", rl_games.epoch, full, 290),
            ("skrl", skrl.epoch, lean, 110, LEAN),
            ("SB3", sb3.epoch, lean, 120, LEAN),
            ("TorchRL", torchrl.epoch, lean, 220, LEAN),
        ]
    )


def iteration() -> list[Contender]:
    """Append, GAE and all epochs, the networks left out."""
    lean = 2 * ROW_BYTES + GAE_BYTES + NUM_EPOCHS * 2 * BATCH_BYTES
    full = lean + (1 + NUM_EPOCHS) * 2 * POLICY_BYTES
    return _contenders(
        [
            ("pydrone", ours.iteration, full, 180),
            (LEAN, partial(ours.iteration, policy=False), lean, 140, LEAN),
            ("memcpy", by_hand.memcpy(full, 1 + NUM_EPOCHS), full, full // (1 + NUM_EPOCHS)),
            ("rsl_rl", rsl_rl.iteration, full, 150),
            ("rl_games", rl_games.iteration, full, 290),
            ("skrl", skrl.iteration, lean, 110, LEAN),
            ("SB3", sb3.iteration, lean, 120, LEAN),
            ("TorchRL", torchrl.iteration, lean, 330, LEAN),
        ]
    )


def ppo_update() -> list[Contender]:
    """All epochs of one rollout: minibatches, networks forward and back, Adam."""
    torch_learner, compiled = partial(update.ours, learner="torch"), partial(update.rsl_rl, compile_mode="default")
    return _contenders(
        [
            ("pydrone", update.ours, 0, 0),
            ("pydrone, --autocast", partial(update.ours, autocast=True), 0, 0),
            ("pydrone, --learner torch", torch_learner, 0, 0),
            ("rsl_rl", update.rsl_rl, 0, 0),
            ("rsl_rl, torch.compile", compiled, 0, 0),
        ]
    )


def training() -> list[Contender]:
    """A whole training iteration: simulation, policy, storage, GAE, update of the networks."""
    return _contenders([("pydrone", train.ours, 0, 0), ("rsl_rl", train.rsl_rl, 0, 0)])


OPERATIONS = {
    "gae": gae,
    "append": append,
    "minibatch epoch": epoch,
    "iteration": iteration,
    "update": ppo_update,
    "training": training,
}
# For the sweep: enough to see the slope.
SWEEP = ("pydrone", "memcpy", "rsl_rl")


def contenders(operation: str) -> list[Contender]:
    """Of one of OPERATIONS, or of "sweep: " and one of them."""
    name = operation.removeprefix("sweep: ")
    return [c for c in OPERATIONS[name]() if name == operation or c.name in SWEEP]
