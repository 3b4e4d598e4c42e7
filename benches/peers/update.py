"""PPO's update of one rollout: five epochs of four minibatches, both networks forward and back, Adam.

Each rollout is collected once, on pydrone's quadrotor, and every call learns from it again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

import torch
from measurement import Absent, Run

from pydrone.envs.quadrotor import Quadrotor

from . import need
from .train import Setting, _config, _runner_config, _vec_env


def ours(setting: Setting, learner: str = "auto", autocast: bool = False, capture: bool = False) -> Run:
    """``Learner.update``, or replays of it."""
    from pydrone.ppo.trainer import Trainer
    from pydrone.ppo.training.graphs import UpdateGraph

    if capture and torch.device(setting.device).type != "cuda":
        raise Absent("needs a CUDA device")
    config = _config(setting, capture=False)
    config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, learner=learner, autocast=autocast))
    trainer = Trainer(Quadrotor(setting.size.num_envs, setting.device), config)
    trainer.start()
    last_values, bootstrap = trainer.collect()
    trainer.buffer.compute_gae(last_values, config.ppo.gamma, config.ppo.lam, **bootstrap)
    figures: dict[str, Any] = {}
    update = UpdateGraph(trainer.learner, trainer.device) if capture else trainer.learner.update

    def call() -> None:
        figures.update(update(trainer.buffer))

    def outputs() -> dict[str, Any]:
        losses = {name: float(figures[name]) for name in ("surrogate_loss", "value_loss", "kl")}
        return {"figures": losses, "parameters": sum(x.numel() for x in trainer.policy.parameters())}

    return Run(call, outputs)


def rsl_rl(setting: Setting, compile_mode: str | None = None, class_name: str = "PPO") -> Run:
    """``PPO.update``, plain or with its option ``torch_compile_mode``."""
    runners = need("rsl_rl.runners")
    env, config = _vec_env(setting), _runner_config(setting, class_name) | {"torch_compile_mode": compile_mode}
    with contextlib.redirect_stdout(io.StringIO()):
        runner = runners.OnPolicyRunner(env, config, log_dir=None, device=setting.device)
        algorithm = runner.alg
        update, algorithm.update = algorithm.update, lambda: {}
        runner.learn(1)  # collects the rollout and learns nothing
        algorithm.storage.clear = lambda: None
    figures: dict[str, float] = {}

    def call() -> None:
        figures.update(update())

    def outputs() -> dict[str, Any]:
        networks = (algorithm.actor, algorithm.critic)
        count = sum(x.numel() for network in networks for x in network.parameters())
        return {"figures": {name: float(x) for name, x in figures.items()}, "parameters": count}

    return Run(call, outputs)
