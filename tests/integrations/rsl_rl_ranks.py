"""One of two processes in which rsl_rl's PPO learns, with and without pydrone; test_rsl_rl_learner.py starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_rsl_rl import CLASS_NAME, Drones, config, construct, fused, learn


def trained(rank: int, *arguments: object, **options: object) -> dict:
    """rsl_rl's runner itself takes no CPU."""
    runner = construct(Drones(), config(*arguments, learning_rate=1e-3, **options))
    algorithm = runner.alg
    algorithm.is_multi_gpu, algorithm.gpu_global_rank, algorithm.gpu_world_size = True, rank, 2
    algorithm.broadcast_parameters()
    torch.manual_seed(20 + rank)  # the processes see different rollouts
    losses = [x["losses"] for x in learn(runner, 3)]
    models = algorithm.actor, algorithm.critic
    weights = torch.cat([x.detach().flatten() for model in models for x in model.parameters()])
    return {"losses": losses, "rate": algorithm.learning_rate, "weights": weights, "fused": fused(runner)}


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    theirs, ours = trained(rank), trained(rank, CLASS_NAME, shuffle="rsl_rl")
    torch.save((theirs, ours), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
