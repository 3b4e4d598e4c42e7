"""Stable-Baselines3's PPO and pydrone's in its place, in turn: an iteration of ``learn``, and ``train`` in it.

>>> OMP_NUM_THREADS=1 .venv/bin/python benches/sb3_ppo.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import time

import stable_baselines3
import torch

from pydrone.integrations.sb3 import PPO


class Timed:
    """A model with the times of its iterations, in seconds."""

    def __init__(self, kind: type[stable_baselines3.PPO], env: str) -> None:
        self.model = kind("MlpPolicy", env, seed=0, device="cpu")
        self.learn: list[float] = []
        self.train: list[float] = []
        train = self.model.train

        def timed() -> None:
            start = time.perf_counter()
            train()
            self.train.append(time.perf_counter() - start)

        self.model.train = timed

    def iterate(self) -> None:
        start = time.perf_counter()
        self.model.learn(self.model.n_steps, reset_num_timesteps=False)
        self.learn.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--envs", nargs="+", default=["Pendulum-v1", "CartPole-v1"], help="Gymnasium's names")
    parser.add_argument("--rounds", type=int, default=7, help="iterations of each, after one that is not counted")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {arguments.rounds}, ms")
    for env in arguments.envs:
        both = Timed(stable_baselines3.PPO, env), Timed(PPO, env)
        for _ in range(arguments.rounds + 1):
            for x in both:
                x.iterate()
        for name in ("train", "learn"):
            times = [1e3 * statistics.median(getattr(x, name)[1:]) for x in both]
            print(f"{env} {name}: {times[0]:.0f} and {times[1]:.0f}, {times[0] / times[1]:.1f}x", flush=True)


if __name__ == "__main__":
    main()
