"""One process that sends its messages trains as one that sends none: gloo's here, NCCL's in tests/gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.distributed import ALONE, Ranks
from pydrone.ppo.trainer import Trainer

N, T, ITERATIONS = 48, 8, 3


class Sends(Ranks):
    """A group of one, whose messages are sent all the same."""

    several = True


def trained(device: str, ranks: Ranks) -> tuple[Trainer, list[dict[str, float]]]:
    ppo = PPOConfig(hidden_dims=(16, 16), normalize_obs=True, normalize_values=True, normalize_rewards=True)
    env = Quadrotor(N, device, seed=3, max_episode_length=9)
    config = TrainConfig(num_steps=T, iterations=ITERATIONS, capture=False, ppo=ppo)
    trainer = Trainer(env, config, echo=lambda line: None, ranks=ranks)
    rows = [trainer.iterate() for _ in range(ITERATIONS)]
    return trainer, [{k: x for k, x in row.items() if not k.startswith(("time/", "steps_per"))} for row in rows]


def compare(device: str, backend: str, folder: Path) -> None:
    """Trains with and without messages. The group is this process's, for as long."""
    expected, figures = trained(device, ALONE)
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        ranks = Sends(torch.distributed.group.WORLD)
        sent = []
        gather, sum_ = ranks.gather, ranks.sum_
        ranks.gather = lambda x: sent.append("gather") or gather(x)
        ranks.sum_ = lambda x: sent.append("sum") or sum_(x)
        found, others = trained(device, ranks)
        found.state_dict()
    finally:
        torch.distributed.destroy_process_group()
    assert sent.count("sum") >= 20 * ITERATIONS and "gather" in sent
    for ours, theirs in zip(others, figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4, nan_ok=True)
    for name, x in expected.policy.state_dict().items():
        torch.testing.assert_close(found.policy.state_dict()[name], x, rtol=1e-3, atol=1e-4, msg=name)
