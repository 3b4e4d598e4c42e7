"""A whole training iteration on pydrone's quadrotor or on Genesis: pydrone's Trainer, and rsl_rl's OnPolicyRunner alone
and on it.

Both use TrainConfig's defaults. Neither writes files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from measurement import Absent, Run
from workload import Size

import pydrone
import pydrone.envs
from pydrone.envs.quadrotor import Quadrotor
from pydrone.ppo.training.meters import Stopwatch

from . import Lap, need

ON_PYDRONE = "pydrone.integrations.rsl_rl:PPO"  # a class_name of rsl_rl's


class Setting:
    """Stands in for the Rollout: a size and a device, nothing to copy."""

    nbytes, copied = 1, False

    def __init__(self, size: Size, device: str) -> None:
        self.size, self.device = size, device

    def clone(self) -> Setting:
        return self

    def env(self) -> Any:
        """The environment."""
        return Quadrotor(self.size.num_envs, self.device)


class OnGenesis(Setting):
    """Its environment is built once in a process, for all contenders."""

    built: dict[Size, Any] = {}

    def env(self) -> Any:
        if self.size not in self.built:
            options = {"num_envs": self.size.num_envs, "device": self.device}
            self.built[self.size] = pydrone.envs.make("genesis-hover", **options)
        return self.built[self.size]


def on_genesis(prepare: Callable[..., Run], setting: Setting, **options: Any) -> Run:
    """``prepare`` on the Genesis hover task."""
    if torch.device(setting.device).type != "cuda":
        raise Absent("make compare measures it on a CPU")
    if importlib.util.find_spec("genesis") is None:
        raise Absent("genesis-world is not installed")
    return prepare(OnGenesis(setting.size, setting.device), **options)


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


class GraphWatch(Stopwatch):
    """Its laps become part of a CUDA graph that is being captured; each replay takes the time again."""

    def _record(self, stage: str | None) -> None:
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        self._laps.append((stage, event))


def stages_in_a_graph(trainer: Any, watch: Stopwatch) -> dict[str, float]:
    """Seconds by stage of a captured iteration, captured anew with ``watch`` in it, which costs a little time."""
    compute = trainer.compute

    def timed() -> Any:
        watch.start()
        return compute(watch.lap)

    trainer.compute = timed
    trainer._graph.forget()
    try:
        for _ in range(2):
            trainer.iterate()
        return watch.seconds()
    finally:
        del trainer.compute
        trainer._graph.forget()


def ours(setting: Setting, capture: bool | str = False) -> Run:
    """``Trainer.iterate``. GAE's share includes the values of the final observations."""
    from pydrone.ppo.trainer import Trainer

    if capture and torch.device(setting.device).type != "cuda":
        raise Absent("needs a CUDA device")
    trainer = Trainer(setting.env(), _config(setting, capture=capture), echo=lambda line: None)
    laps: list[float] = []
    figures: dict[str, float] = {}

    def call() -> None:
        figures.update(trainer.iterate())
        if "time/gae" in figures:  # a captured iteration has none
            laps.append(figures["time/gae"])

    def stages() -> dict[str, float]:
        if trainer._graph is not None:
            with contextlib.suppress(RuntimeError, TypeError):  # an older torch has no such events
                return stages_in_a_graph(trainer, GraphWatch(trainer.device))
        return {name.removeprefix("time/"): x for name, x in figures.items() if name.startswith("time/")}

    def outputs() -> dict[str, Any]:
        losses = {name: figures[name] for name in ("surrogate_loss", "value_loss")}
        return {"figures": losses, "parameters": sum(x.numel() for x in trainer.policy.parameters())}

    return Run(call, outputs, laps, stages=stages)


def _vec_env(setting: Setting):  # type: ignore[no-untyped-def]
    need("rsl_rl.env")
    from pydrone.integrations.rsl_rl_env import VecEnvWrapper

    env = VecEnvWrapper(setting.env())
    env.env.randomize_episode_lengths()
    return env


def _runner_config(setting: Setting, class_name: str = "PPO") -> dict[str, Any]:
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
            "class_name": class_name,
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


def rsl_rl(setting: Setting, class_name: str = "PPO") -> Run:
    """``OnPolicyRunner.learn(1)``. GAE's share is the time of ``compute_returns``. ``class_name``: the algorithm's."""
    runners = need("rsl_rl.runners")
    env, lap = _vec_env(setting), Lap(setting.device)
    with contextlib.redirect_stdout(io.StringIO()):
        config = _runner_config(setting, class_name)
        runner = runners.OnPolicyRunner(env, config, log_dir=None, device=setting.device)
    algorithm, compute_returns = runner.alg, runner.alg.compute_returns

    def timed(obs: Any) -> None:
        with lap:
            compute_returns(obs)

    algorithm.compute_returns = timed

    def call() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(1)

    def outputs() -> dict[str, Any]:
        algorithm.update = dict  # learns nothing, and keeps the rollout
        call()
        del algorithm.update
        storage, obs = algorithm.storage, env.get_observations()
        with torch.inference_mode():
            compute_returns(obs)
            last_values = algorithm.critic(obs)
        names, config = ("rewards", "values", "dones"), _config(setting).ppo
        planes = (getattr(storage, name) for name in names)
        _, returns = pydrone.gae(*planes, last_values, config.gamma, config.lam, time_dim=0)
        networks = (algorithm.actor, algorithm.critic)
        count = sum(x.numel() for network in networks for x in network.parameters())
        found = {"figures": {}, "parameters": count, "returns": [(storage.returns.clone(), returns)]}
        storage.clear()
        return found

    return Run(call, outputs, lap.seconds)
