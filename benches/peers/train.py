"""A whole training iteration on pydrone's quadrotor: pydrone's Trainer, and rsl_rl's OnPolicyRunner.

Both use TrainConfig's defaults. Neither writes files.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import torch
from measurement import Absent, Run
from workload import Size

import pydrone
from pydrone.envs.quadrotor import Quadrotor

from . import Lap, need


class Setting:
    """Stands in for the Rollout: a size and a device, nothing to copy."""

    nbytes, copied = 1, False

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device

    def clone(self) -> Setting:
        return self


class Sound:
    """Stands in for the Truth: two trainings with different random numbers have no common result."""

    def check(self, outputs: dict[str, Any]) -> None:
        """``figures`` are finite, ``parameters`` as many as the first contender's, ``returns`` (ours, theirs) equal.

        A memcpy has neither parameters nor returns.
        """
        for name, x in outputs["figures"].items():
            assert math.isfinite(x), f"{name} is {x}"
        if "parameters" in outputs:
            expected = self.__dict__.setdefault("parameters", outputs["parameters"])
            assert outputs["parameters"] == expected, f"{outputs['parameters']} parameters, pydrone has {expected}"
        for ours, theirs in outputs.get("returns", ()):
            assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max(), "the returns differ"


def _config(setting: Setting, **options: Any):  # type: ignore[no-untyped-def]
    from pydrone.ppo.config import TrainConfig

    num_envs, num_steps = setting.size
    return TrainConfig(env="quadrotor", num_steps=num_steps, num_envs=num_envs, **options)


def ours(setting: Setting, capture: bool = False) -> Run:
    """``Trainer.iterate``. GAE's share includes the values of the final observations."""
    from pydrone.ppo.trainer import Trainer

    if capture and torch.device(setting.device).type != "cuda":
        raise Absent("needs a CUDA device")
    config, env = _config(setting, capture=capture), Quadrotor(setting.size.num_envs, setting.device)
    trainer = Trainer(env, config, echo=lambda line: None)
    laps: list[float] = []
    figures: dict[str, float] = {}

    def call() -> None:
        figures.update(trainer.iterate())
        if "time/gae" in figures:  # a captured iteration has none
            laps.append(figures["time/gae"])

    def stages() -> dict[str, float]:
        return {name.removeprefix("time/"): x for name, x in figures.items() if name.startswith("time/")}

    def outputs() -> dict[str, Any]:
        losses = {name: figures[name] for name in ("surrogate_loss", "value_loss")}
        return {"figures": losses, "parameters": sum(x.numel() for x in trainer.policy.parameters())}

    return Run(call, outputs, laps, stages=stages)


def _vec_env(setting: Setting):  # type: ignore[no-untyped-def]
    need("rsl_rl.env")
    from pydrone.integrations.rsl_rl_env import VecEnvWrapper

    env = VecEnvWrapper(Quadrotor(setting.size.num_envs, setting.device))
    env.env.randomize_episode_lengths()
    return env


def _runner_config(setting: Setting) -> dict[str, Any]:
    config = _config(setting)
    ppo = config.ppo
    model = {"class_name": "MLPModel", "hidden_dims": list(ppo.hidden_dims), "activation": "tanh"}
    gaussian = {"class_name": "GaussianDistribution", "init_std": ppo.init_std, "std_type": "scalar"}
    return {
        "num_steps_per_env": config.num_steps,
        "save_interval": config.save_interval,
        "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**model, "distribution_cfg": gaussian},
        "critic": dict(model),
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": ppo.num_epochs,
            "num_mini_batches": ppo.num_minibatches,
            "learning_rate": ppo.learning_rate,
            "schedule": ppo.schedule,
            "desired_kl": ppo.desired_kl,
            "clip_param": ppo.clip,
            "entropy_coef": ppo.entropy_coef,
            "value_loss_coef": ppo.value_loss_coef,
            "use_clipped_value_loss": ppo.clipped_value_loss,
            "max_grad_norm": ppo.max_grad_norm,
            "gamma": ppo.gamma,
            "lam": ppo.lam,
            "rnd_cfg": None,
            "symmetry_cfg": None,
        },
    }


def rsl_rl(setting: Setting) -> Run:
    """``OnPolicyRunner.learn(1)``. GAE's share is the time of ``PPO.compute_returns``."""
    runners = need("rsl_rl.runners")
    env, lap = _vec_env(setting), Lap(setting.device)
    with contextlib.redirect_stdout(io.StringIO()):
        runner = runners.OnPolicyRunner(env, _runner_config(setting), log_dir=None, device=setting.device)
    algorithm, compute_returns = runner.alg, runner.alg.compute_returns

    def timed(obs: Any) -> None:
        with lap:
            compute_returns(obs)

    algorithm.compute_returns = timed

    def call() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(1)

    def outputs() -> dict[str, Any]:
        storage, obs = algorithm.storage, env.get_observations()
        with torch.inference_mode():
            compute_returns(obs)
            last_values = algorithm.critic(obs)
        names, config = ("rewards", "values", "dones"), _config(setting).ppo
        planes = (getattr(storage, name) for name in names)
        _, returns = pydrone.gae(*planes, last_values, config.gamma, config.lam, time_dim=0)
        networks = (algorithm.actor, algorithm.critic)
        count = sum(x.numel() for network in networks for x in network.parameters())
        return {"figures": {}, "parameters": count, "returns": [(storage.returns, returns)]}

    return Run(call, outputs, lap.seconds)
