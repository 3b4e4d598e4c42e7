"""What trainers learn on pydrone and without: three seeds of each, and their time. python benches/peer_curves.py

Stable-Baselines3 on the quadrotor (64 x 64), rsl_rl on Gymnasium's Pendulum (64 x 64). For rsl_rl on the quadrotor and
in Genesis see hover.py; for CartPole under Stable-Baselines3 and skrl, sb3_ppo.py and skrl_ppo.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time

import gymnasium
import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces
from rsl_rl.runners import OnPolicyRunner
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from pydrone.envs.adapters import GymnasiumEnv
from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import sb3
from pydrone.integrations.rsl_rl_env import VecEnvWrapper

NUM_ENVS, NUM_STEPS, WINDOW = 64, 64, 10


class Drones(VecEnv):
    """pydrone's quadrotor for Stable-Baselines3."""

    def __init__(self, seed: int) -> None:
        box = spaces.Box(-np.inf, np.inf, (17,), np.float32), spaces.Box(-1, 1, (4,), np.float32)
        super().__init__(NUM_ENVS, *box)
        self._env = Quadrotor(NUM_ENVS, seed=seed)

    def reset(self):
        return self._env.reset().numpy().copy()

    def step_async(self, actions) -> None:
        self._actions = torch.from_numpy(np.array(actions))

    def step_wait(self):
        result = self._env.step(self._actions)
        obs, final, dones = (x.numpy().copy() for x in (result.obs, result.final_obs, result.dones))
        infos = [{} for _ in range(NUM_ENVS)]
        for i in np.flatnonzero(dones):
            infos[i] = {"terminal_observation": final[i], "TimeLimit.truncated": bool(result.truncated[i])}
        return obs, result.rewards.numpy().copy(), dones, infos

    def close(self) -> None:
        pass

    def get_attr(self, name, indices=None):
        return [None] * NUM_ENVS

    def set_attr(self, name, value, indices=None) -> None:
        raise NotImplementedError

    def env_method(self, name, *args, indices=None, **kwargs):
        raise NotImplementedError

    def env_is_wrapped(self, wrapper, indices=None):
        return [False] * NUM_ENVS


def by_sb3(kind, seed: int, iterations: int) -> float:
    """The mean length of the last 100 episodes."""
    size = NUM_ENVS * NUM_STEPS
    policy = {"net_arch": [128, 128]}
    options = {"n_steps": NUM_STEPS, "batch_size": size // 4, "n_epochs": 5, "learning_rate": 1e-3}
    model = kind("MlpPolicy", VecMonitor(Drones(seed)), seed=seed, device="cpu", policy_kwargs=policy, **options)
    model.learn(iterations * size)
    return statistics.mean(x["l"] for x in model.ep_info_buffer)


def by_rsl_rl(class_name: str, seed: int, iterations: int) -> float:
    """The mean reward of a step in the last iterations."""
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    made = gymnasium.make_vec("Pendulum-v1", NUM_ENVS, vectorization_mode="sync", vector_kwargs=same_step)
    env = VecEnvWrapper(GymnasiumEnv(made, seed=seed))
    rewards, step = [], env.step

    def kept(actions):
        found = step(actions)
        rewards.append(found[1].mean().item())
        return found

    env.step = kept
    model = {"class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "elu"}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"}
    config = {
        "num_steps_per_env": NUM_STEPS,
        "save_interval": 10**9,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": model | {"distribution_cfg": gaussian},
        "critic": model,
        "algorithm": {"class_name": class_name, "gamma": 0.95, "entropy_coef": 0.0, "num_mini_batches": 4},
    }
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        OnPolicyRunner(env, config, log_dir=None, device="cpu").learn(iterations)
    return statistics.mean(rewards[-WINDOW * NUM_STEPS :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=60)
    iterations = parser.parse_args().iterations
    contenders = {
        "Stable-Baselines3 on the quadrotor, mean length": (by_sb3, (stable_baselines3.PPO, sb3.PPO)),
        "rsl_rl on Pendulum, mean reward": (by_rsl_rl, ("PPO", "pydrone.integrations.rsl_rl:PPO")),
    }
    for name, (run, kinds) in contenders.items():
        found: list[list[tuple[float, float]]] = [[], []]
        for seed in (1, 2, 3):
            for kind, results in zip(kinds, found, strict=True):
                start = time.perf_counter()
                results.append((run(kind, seed, iterations), time.perf_counter() - start))
        for who, results in zip(("without", "on pydrone"), found, strict=True):
            texts = [f"{x:.2f} in {seconds:.1f} s" for x, seconds in results]
            print(f"{name}, {who}: {', '.join(texts)}", flush=True)


if __name__ == "__main__":
    main()
