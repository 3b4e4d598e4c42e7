"""One rank of a distributed training. test_distributed.py starts it; it runs all scenarios and saves its results.

Each environment depends only on its global number, and the noise is given, so K processes see what one process sees.
"""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path

import torch

from pydrone.envs.base import StepResult
from pydrone.envs.state import restore, state_of
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.distributed import MeanGradients, PeerLost, Ranks
from pydrone.ppo.trainer import NotFinite, Trainer

N, T, ITERATIONS = 3, 8, 3  # of each process

# Scenario: options of the learner.
CASES: dict[str, dict] = {
    "plain": {"desired_kl": 1e-3},  # the learning rate moves
    "normalized": {"normalize_obs": True, "normalize_values": True, "normalize_rewards": True},
    "early stop": {"max_kl": 1e-3, "schedule": "fixed", "learning_rate": 3e-3, "num_epochs": 8},
    "gru": {"recurrent": "gru", "rnn_dim": 4, "normalize_obs": True},
}


class Points:
    """Points moved by their actions. The environment's number decides episode ends and, with NEXT_STEP, reset steps."""

    obs, actions, max_episode_length, device = 3, 2, None, torch.device("cpu")

    def __init__(self, first: int, num_envs: int, autoreset: str = "same_step") -> None:
        self.numbers, self.num_envs, self.autoreset = torch.arange(first, first + num_envs), num_envs, autoreset
        self.t, self.x = torch.zeros((), dtype=torch.int64), torch.zeros(num_envs, 2)
        self.resetting = torch.zeros(num_envs, dtype=torch.bool)

    def reset(self):
        self.t.zero_(), self.resetting.zero_()
        self.x = torch.stack((self.numbers / 3 - 1, (self.numbers % 2).float()), 1)
        return self._obs()

    def _obs(self):
        return torch.cat((self.x, self.numbers[:, None] / 2), 1)

    def randomize_episode_lengths(self) -> None:
        pass

    def step(self, actions):
        self.t += 1
        next_step = self.autoreset == "next_step"
        valid = ~self.resetting if next_step else None
        start = torch.stack((self.numbers / 3 - 1, (self.numbers % 2).float()), 1)
        moved = self.x + 0.3 * actions.tanh()
        self.x = torch.where(self.resetting[:, None], start, moved)
        rewards = torch.where(self.resetting, 0.0, 1 - self.x.norm(dim=1))
        # Higher numbers end more often, so that the ranks differ in episodes and valid samples.
        dones = (self.t % (6 - self.numbers.clamp_max(4)) == 0) & ~self.resetting
        truncated, final_obs = dones & (self.numbers % 2 == 1), self._obs()
        log = {"distance": self.x.norm(dim=1).mean(), "episode/count": dones.sum(), "episode/x": self.x[dones, 0].sum()}
        if next_step:
            self.resetting = dones
        else:
            self.x = torch.where(dones[:, None], start, self.x)
        return StepResult(self._obs(), rewards, dones, truncated, None if next_step else final_obs, valid, log)

    def state_dict(self):
        return state_of(self)

    def load_state_dict(self, state):
        restore(self, state)

    def close(self) -> None:
        pass


def settings(**kwargs) -> TrainConfig:
    ppo = {"hidden_dims": (8,), "num_minibatches": 1, "num_epochs": 3, "learning_rate": 1e-3, **kwargs.pop("ppo", {})}
    sizes = {"num_steps": T, "iterations": ITERATIONS, "tensorboard": False, "env": "quadrotor"}
    return TrainConfig(**{**sizes, **kwargs}, ppo=PPOConfig(**ppo))


def with_noise(first: int, num_envs: int, total: int) -> None:
    """Makes policies draw the same noise for an environment on any rank."""
    noise = torch.randn(200, total, 2, generator=torch.Generator().manual_seed(5))
    rows = iter(noise[:, first : first + num_envs])
    torch.randn_like = lambda x: next(rows)


def learn(case: str, rank: int, world_size: int) -> dict:
    """Trains on 1 / ``world_size`` of six environments; returns the figures and the final state."""
    num_envs = 2 * N // world_size
    with_noise(rank * num_envs, num_envs, 2 * N)
    env = Points(rank * num_envs, num_envs, "next_step" if case == "normalized" else "same_step")
    trainer = Trainer(env, settings(ppo=CASES[case]), echo=lambda line: None)
    rows = [trainer.iterate() for _ in range(ITERATIONS)]
    state = trainer.state_dict()
    return {
        "figures": [{k: x for k, x in row.items() if not k.startswith(("time/", "steps_per"))} for row in rows],
        "policy": state["policy"],
        "adam": state["learner"]["state"],
        "rate": trainer.learner.learning_rate.clone(),
        "moments": {} if trainer.reward_scaler is None else trainer.reward_scaler.moments.state_dict(),
    }


# ------------------------------------------------------------------------------------------- other scenarios


def collectives(ranks: Ranks) -> dict:
    """Each collective by itself; in the second mean rank 1 has no samples."""
    x = torch.nn.Parameter(torch.zeros(2, 2))
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    mean = MeanGradients(ranks, [x, frozen], 1)
    found = {"sum": ranks.sum_(torch.tensor([1.0, ranks.rank])), "gather": ranks.gather(torch.tensor(5.0 + ranks.rank))}
    for name, counts in (("mean", (1, 3)), ("of one", (2, 0)), ("of none", (0, 0))):
        x.grad = kept = torch.full((2, 2), 1.0 + 4 * ranks.rank)
        if counts[ranks.rank] == 0:
            x.grad = kept = None
        figures = mean(torch.tensor([10.0 if ranks.rank == 0 else 2.0]), counts[ranks.rank])
        found[name] = x.grad.clone(), figures, kept is None or x.grad is kept
    found["frozen"] = frozen.grad
    moments = (torch.tensor([[1.0, 3.0], [8.0, 8.0]])[ranks.rank]).double()
    found["moments"] = ranks.moments(torch.tensor(2.0).double(), moments, torch.full((2,), 0.5).double())
    own = torch.full((3,), float(ranks.rank))
    ranks.broadcast_([own])
    return found | {"broadcast": own, "seed": ranks.seed(7), "objects": ranks.gather_objects({"rank": ranks.rank})}


def begun(ranks: Ranks) -> dict:
    """The initial state of ranks that would draw different first weights."""
    seed = torch.manual_seed
    torch.manual_seed = lambda number: seed(number + ranks.rank)
    trainer = Trainer(Points(0, N), settings())
    torch.manual_seed = seed
    again = Trainer(Points(0, N), settings())
    drawn = torch.rand(4)
    again.start()
    last_values, bootstrap = again.collect()
    again.buffer.compute_gae(last_values, **bootstrap)
    (minibatch,) = again.buffer.minibatches(1)
    return {"policy": trainer.policy.state_dict(), "drawn": drawn, "order": minibatch.indices}


def not_finite(ranks: Ranks) -> dict:
    env = Points(ranks.rank * N, N)
    step = env.step
    if ranks.rank == 1:  # in the second iteration
        env.step = lambda actions: step(actions)._replace(
            **({"rewards": torch.full((N,), math.nan)} if env.t == T + 2 else {})
        )
    trainer = Trainer(env, settings(), echo=lambda line: None)
    try:
        trainer.train()
    except NotFinite as error:
        return {"error": str(error), "iteration": trainer.iteration}
    return {}


def interrupted(ranks: Ranks, folder: Path) -> dict:
    env = Points(ranks.rank * N, N)
    step = env.step

    def signalled(actions):
        if ranks.rank == 1 and env.t == T + 3:
            signal.raise_signal(signal.SIGTERM)
        return step(actions)

    env.step = signalled
    lines: list[str] = []
    outcome = Trainer(env, settings(iterations=50), folder / "interrupted", lines.append).train()
    return {"outcome": list(outcome[:2]), "lines": lines}


def logs(ranks: Ranks) -> dict:
    """Rank 0 logs "a" from the first step on, rank 1 "b" from the second iteration on."""
    env = Points(ranks.rank * N, N)
    step = env.step

    def logging(actions):
        result = step(actions)
        log = {"a": torch.tensor(2.0)} if ranks.rank == 0 else {}
        if ranks.rank == 1 and env.t > T:
            log = {"b": torch.tensor(3.0)}
        return result._replace(log={**result.log, **log})

    env.step = logging
    trainer = Trainer(env, settings(), echo=lambda line: None)
    return {"figures": [trainer.iterate() for _ in range(3)]}


def other_settings(ranks: Ranks) -> dict:
    try:
        Trainer(Points(0, N), settings(ppo={"num_epochs": 2 + ranks.rank}))
    except ValueError as error:
        return {"error": str(error)}
    return {}


def drifted(ranks: Ranks) -> dict:
    trainer = Trainer(Points(0, N), settings(), echo=lambda line: None)
    trainer.iterate()
    trainer.policy.std_param.data.mul_(1 + ranks.rank)
    try:
        trainer.iterate()
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def resumed(ranks: Ranks, folder: Path, ppo: dict) -> dict:
    """Five iterations against three and then two; and a checkpoint for one process to resume."""

    def train(name: str, iterations: int, resume: str | None = None) -> Trainer:
        config = settings(iterations=iterations, resume=resume, ppo=ppo)
        trainer = Trainer(Points(ranks.rank * N, N), config, folder / name, lambda line: said.append(line))
        trainer.train()
        return trainer

    said: list[str] = []
    train("whole", 5)
    train("parts", 3)
    torch.manual_seed(99)
    said.clear()
    last = train("parts", 5, str(folder / "parts" / "model_3.pt"))
    # Two processes resume the checkpoint of one.
    alone = str(folder / "alone" / "model_2.pt")
    if ranks.rank == 0:
        Trainer(Points(0, N), settings(iterations=2, ppo=ppo), folder / "alone", lambda _: None, ranks=Ranks()).train()
    ranks.gather_objects(None)
    begun = list(said)
    said.clear()
    train("more", 3, alone)
    return {"said": begun, "of one": said, "buffer": last.buffer.state_dict()["appended"]}


def failing(ranks: Ranks, folder: Path) -> dict:
    """Rank 1 fails in its third iteration; rank 0 is told and saves what was learnt."""
    env = Points(ranks.rank * N, N)
    step = env.step

    def fail(actions):
        if ranks.rank == 1 and env.t == 2 * T + 3:
            raise RuntimeError("the simulator")
        return step(actions)

    env.step = fail
    lines: list[str] = []
    try:
        Trainer(env, settings(iterations=9), folder / "failing", lines.append).train()
    except PeerLost as error:
        return {"error": str(error), "lines": lines}
    return {}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    ranks = Ranks.found()
    drawn = torch.randn_like
    found: dict = {case: learn(case, rank, 2) for case in CASES}
    torch.randn_like = drawn
    found["collectives"] = collectives(ranks)
    found["begun"] = begun(ranks)
    found["not finite"] = not_finite(ranks)
    found["interrupted"] = interrupted(ranks, folder)
    found["logs"] = logs(ranks)
    found["other settings"] = other_settings(ranks)
    found["drifted"] = drifted(ranks)
    found["resumed"] = resumed(ranks, folder, CASES["normalized"] | CASES["gru"])
    torch.save(found, folder / f"rank{rank}.pt")
    torch.save(failing(ranks, folder), folder / f"failing{rank}.pt")  # last, as it breaks the group


if __name__ == "__main__":
    main()
