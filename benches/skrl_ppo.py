"""skrl's PPO with its own update and with the fused one, in turn: python benches/skrl_ppo.py [--rounds N]

On the quadrotor (512 environments x 64 steps), Gymnasium's CartPole (4 x 256), and both with one trunk for policy and
value. Medians of an update and of an iteration.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import Wrapper, wrap_env
from skrl.memories import torch as memories
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.trainers.torch import SequentialTrainer
from skrl.utils import set_seed
from skrl.utils.model_instantiators.torch import categorical_model, deterministic_model, gaussian_model, shared_model

from pydrone.envs.quadrotor import Quadrotor
from pydrone.integrations import skrl as ours

WARM_UP = 1  # iterations that are not counted


class Drone(Wrapper):
    """pydrone's quadrotor for skrl."""

    observation_space = spaces.Box(-np.inf, np.inf, (17,), np.float32)
    action_space = spaces.Box(-1, 1, (4,), np.float32)

    def reset(self):
        return self._env.reset().clone(), {}

    def step(self, actions):
        result = self._env.step(actions)
        columns = (result.rewards, result.dones & ~result.truncated, result.truncated)
        return result.obs.clone(), *(x.clone().unsqueeze(1) for x in columns), {}

    def state(self):
        return None

    def render(self):
        return None

    def close(self):
        return None


def quadrotor():
    return Drone(Quadrotor(512, seed=1))


def cartpole():
    return wrap_env(gym.make_vec("CartPole-v1", 4, vectorization_mode="sync"), verbose=False)


CASES = {
    "quadrotor 512 x 64, [128, 128] tanh": (quadrotor, 64, [128, 128], "tanh", False, {"learning_epochs": 5}),
    "quadrotor 512 x 64, [64, 64] elu, one trunk": (quadrotor, 64, [64, 64], "elu", True, {"learning_epochs": 5}),
    "CartPole 4 x 256, [64, 64] relu": (cartpole, 256, [64, 64], "relu", False, {"mini_batches": 8}),
    "CartPole 4 x 256, [64, 64] relu, one trunk": (cartpole, 256, [64, 64], "relu", True, {"mini_batches": 8}),
}


def models(env, layers, activation, shared):
    given = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}
    layers = [{"name": "net", "input": "OBSERVATIONS", "layers": layers, "activations": activation}]
    discrete = isinstance(env.action_space, spaces.Discrete)
    if shared:
        both = {"structure": ["CategoricalMixin" if discrete else "GaussianMixin", "DeterministicMixin"]}
        outputs = [{"network": layers, "output": x} for x in ("ACTIONS", "ONE")]
        model = shared_model(**given, **both, roles=["policy", "value"], parameters=outputs)
        for role in ("policy", "value"):
            model.init_state_dict(role=role)
        return {"policy": model, "value": model}
    policy = (categorical_model if discrete else gaussian_model)(**given, network=layers, output="ACTIONS")
    value = deterministic_model(**given, network=layers, output="ONE")
    for model in (policy, value):
        model.init_state_dict()
    return {"policy": policy, "value": value}


def run(case, iterations):
    """Seconds of each update and of each iteration."""
    make, steps, layers, activation, shared, options = case
    set_seed(1)
    env = make()
    scalers = {"observation_preprocessor": RunningStandardScaler, "value_preprocessor": RunningStandardScaler}
    scalers["observation_preprocessor_kwargs"] = {"size": env.observation_space}
    scalers["value_preprocessor_kwargs"] = {"size": 1}
    options = {"rollouts": steps, "mini_batches": 4, "learning_epochs": 8, "learning_rate": 3e-4} | scalers | options
    silent = {"write_interval": 0, "checkpoint_interval": 0}
    agent = PPO(
        models=models(env, layers, activation, shared),
        memory=memories.RandomMemory(memory_size=steps, num_envs=env.num_envs, device="cpu"),
        cfg=PPO_CFG(**options, experiment=silent),
        observation_space=env.observation_space,
        action_space=env.action_space,
        device="cpu",
    )
    updates, ends, update = [], [], agent.update

    def timed(**arguments):
        start = time.perf_counter()
        update(**arguments)
        ends.append(time.perf_counter())
        updates.append(ends[-1] - start)

    agent.update = timed
    quiet = {"headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
    SequentialTrainer(env=env, agents=agent, cfg={"timesteps": steps * (iterations + WARM_UP), **quiet}).train()
    return updates[WARM_UP:], np.diff(ends).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is run in turn")
    rounds = parser.parse_args().rounds
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for name, case in CASES.items():
        found: dict[str, list] = {}
        for _ in range(rounds):
            for learner in ("skrl", "storage", "fused"):
                if learner != "skrl":
                    ours.patch(learner="skrl" if learner == "storage" else "fused")
                for x, y in zip(found.setdefault(learner, [[], []]), run(case, 4), strict=True):
                    x += y
                ours.unpatch()
        medians = {key: [1e3 * statistics.median(x) for x in times] for key, times in found.items()}
        theirs = medians["skrl"]
        for key, (update, iteration) in medians.items():
            print(f"{name}, {key}: update {update:.1f} ms ({theirs[0] / update:.2f}x)", end=", ")
            print(f"iteration {iteration:.1f} ms ({theirs[1] / iteration:.2f}x)", flush=True)


if __name__ == "__main__":
    main()
