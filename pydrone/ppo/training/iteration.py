"""One iteration of a training, on the device: collect a rollout, estimate advantages, learn."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import Env, LogMeter, ObsSpec, autoreset_mode, begun, to_act_on
from pydrone.envs.record import Record, settings_of
from pydrone.memory import plan
from pydrone.ppo.config import TrainConfig, check_minibatches
from pydrone.ppo.distributed import Ranks
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.normalization import RewardScaler
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.average import WeightAverage
from pydrone.ppo.training.figures import Computed, Figures
from pydrone.rollout.layout import parse_obs

# Called with a stage when its work is done, see Stopwatch.lap.
Lap = Callable[[str], None]


def no_lap(stage: str) -> None:
    """Takes no time."""


class Iteration:
    """A policy, its learner, its environment and its buffer, and what the device does with them in each iteration.

    :class:`pydrone.ppo.trainer.Trainer`, which is one, decides how many there are and what is kept of them.
    """

    def __init__(self, env: Env, config: TrainConfig, ranks: Ranks, iteration: int = 0) -> None:
        self.env, self.config, self.ranks, self.iteration = env, config, ranks, iteration
        self.device, self.autoreset = torch.device(env.device), autoreset_mode(env.autoreset)
        samples = env.num_envs * config.num_steps
        check_minibatches(config.ppo.num_minibatches, samples)
        if config.ppo.recurrent != "none" and config.ppo.num_minibatches > env.num_envs:
            raise ValueError(
                f"num_minibatches: expected at most one per environment, {env.num_envs}, for a recurrent policy, got "
                f"{config.ppo.num_minibatches}"
            )
        self.environment = Record.of(env)
        #: the settings as the run's files have them: where the environment decides, its own
        self.recorded = copy.copy(config)
        device = self.device.type if ranks.several else str(self.device)
        vars(self.recorded).update(settings_of(env, self.environment), device=device)
        ranks.check_same(_settings(env, config) | {"iteration": iteration})
        # A resumed run whose generators cannot be restored then draws other numbers than the first run did.
        torch.manual_seed(config.seed + iteration)
        ppo = config.ppo
        self.policy = make_policy(env.obs, env.actions, ppo, getattr(env, "num_discrete_actions", None)).to(self.device)
        ranks.broadcast_(list(self.policy.state_dict().values()))
        if ranks.rank:
            torch.manual_seed(ranks.seed(config.seed + iteration))
        self.learner = Learner(self.policy, ppo, ranks)
        #: of the weights; equal on all ranks, whose weights are. None: not asked for
        self.average = WeightAverage(self.policy, ppo.ema_decay) if ppo.ema_decay else None
        scaled = ppo.normalize_rewards or ppo.reward_scale != 1
        self.reward_scaler = (
            RewardScaler(env.num_envs, ppo.gamma, ppo.reward_scale, ppo.normalize_rewards).to(self.device)
            if scaled
            else None
        )
        sizes = {
            "num_envs": env.num_envs,
            "num_steps": config.num_steps,
            "obs": stored_obs(env.obs, getattr(torch, ppo.obs_dtype)),
            "actions": env.actions,
            "obs_dtype": getattr(torch, ppo.obs_dtype),
            "fields": self.policy.fields(),
            "max_episode_length": env.max_episode_length,
            "final_obs_rows": self._final_obs_rows(),
        }
        self.buffer = RolloutBuffer(**sizes, device=self.device, seed=config.seed + iteration, rank=ranks.rank)
        #: whether the rollout is part of a CUDA graph
        self.captured = False
        #: computes the update by a CUDA graph, in place of the learner's; None: the learner does
        self.update_graph: Callable[[RolloutBuffer], dict[str, Tensor]] | None = None
        gathers = self.learner.gathers(self.buffer) and not self.policy.recurrent
        reused = math.ceil(samples / ppo.num_minibatches) if gathers else None
        #: bytes of the buffer, with the gathered minibatch that it reuses, if there is one
        self.planned_nbytes = plan(**sizes, reused_minibatch=reused).nbytes
        self.figures = Figures(self.buffer, self.policy, ranks)
        #: what the environment has logged in this iteration
        self.log = LogMeter()
        #: what the policy acts on next; None before the first reset
        self.observations: Any = None
        #: :meth:`learnt` before an update in progress
        self.before_update: dict[str, Any] | None = None

    def compute(self, lap: Lap = no_lap) -> Computed:
        """Launches an iteration. The host waits for the device only where the learner does."""
        self.log = LogMeter()
        self._estimate(*self.collect(lap))
        buffer = self.buffer
        if self.ranks.several and self.config.ppo.advantage_scope == "rollout":
            merged = self.ranks.moments(*buffer.statistics)
            buffer.statistics.copy_(torch.stack(merged))
        lap("gae")
        self.before_update = checkpoint.copied(self.learnt())
        learnt = (self.update_graph or self.learner.update)(buffer)
        if self.average is not None:
            self.average.update()
        lap("update")
        scaler = self.reward_scaler
        return self.figures.sum_up(learnt, self.log, buffer.rewards if scaler is None else scaler.undo(buffer.rewards))

    def clear(self) -> None:
        """Discards the rollout, after its figures are read."""
        self.buffer.clear()

    @torch.no_grad()
    def collect(self, lap: Lap = no_lap) -> tuple[Tensor, dict[str, Any]]:
        """Fills the buffer. Returns V after the last step, [N], and how to bootstrap at time-outs."""
        env, buffer, policy = self.env, self.buffer, self.policy
        obs, known, final_values = self.observations, False, []
        if policy.recurrent:
            policy.begin_rollout(env.num_envs)
        acting, ends = self.learner.acting(buffer, lap), None
        for step in range(self.config.num_steps):
            actions = acting(obs, ends)  # stores the end of the step before too, in one call where possible
            result = env.step(actions)
            lap("env")
            final_obs = result.final_obs if self.autoreset == "same_step" else None
            known |= final_obs is not None
            if policy.recurrent:
                # Valued at once, while the policy still remembers the episode.
                final_values.append(None if final_obs is None else policy.value(final_obs))
                policy.reset(begun(result, self.autoreset))
                lap("policy")
            elif final_obs is not None:
                self._make_room(step, result.truncated)
            ends = {
                "rewards": result.rewards,
                "dones": result.dones,
                "truncated": result.truncated,
                "final_obs": None if policy.recurrent else final_obs,
                "valid": result.valid,
            }
            self.log.add(result.log)
            lap("env")
            obs = to_act_on(result, self.autoreset)
        buffer.end(**ends)
        lap("storage")
        self.observations = obs
        last_values = policy.value(obs)
        lap("policy")
        if self.autoreset == "next_step":
            return last_values, {"timeout_bootstrap": "next_value"}
        if not known:
            return last_values, {"timeout_bootstrap": "stored_value"}
        # Some steps may have come without final observations.
        if policy.recurrent:
            stored = buffer.values.unbind(1)
            final_values = [stored[t] if x is None else x for t, x in enumerate(final_values)]
            return last_values, {"final_values": torch.stack(final_values, 1)}
        return last_values, {"value_fn": policy.value, "without_final_obs": "stored_value"}

    def _final_obs_rows(self) -> int | None:
        """Size of the buffer's pool of final observations; None: the buffer's default."""
        if self.policy.recurrent or self.autoreset == "next_step":
            return 0  # valued at once; stored as the next observation
        if self.env.max_episode_length is None:
            # Any step may truncate. Room for all of them takes as much memory as the observations.
            return self.env.num_envs * self.config.num_steps
        return None

    def _make_room(self, step: int, truncated: Tensor) -> None:
        """Enlarges the pool of final observations where those of this step would not fit.

        On the CPU, where the count costs nothing to read. Elsewhere and in a captured iteration
        :class:`~pydrone.ppo.trainer.Trainer` does so after the rollout.
        """
        buffer, room = self.buffer, self.buffer.layout.final_obs_rows
        if self.device.type != "cpu" or self.captured or (step + 1) * buffer.num_envs <= room:
            return
        used = buffer.final_obs_used + int(torch.count_nonzero(truncated))
        if used > room:
            self.grow_final_obs(used)

    def grow_final_obs(self, used: int) -> None:
        """Enlarges the pool of final observations, of which a rollout has used ``used``, with room for as many more."""
        before, most = self.buffer.nbytes, self.buffer.num_envs * self.buffer.num_steps
        self.buffer.grow_final_obs(min(2 * used, most))
        self.planned_nbytes += self.buffer.nbytes - before

    def _estimate(self, last_values: Tensor, bootstrap: dict[str, Any]) -> None:
        """Scales the rewards and computes the advantages; takes what :meth:`collect` returned."""
        ppo, buffer = self.config.ppo, self.buffer
        if self.reward_scaler is not None:
            self.reward_scaler.apply_to(buffer.rewards, buffer.dones, self.ranks)
        # The buffer's flags are read with the figures.
        buffer.compute_gae(last_values, ppo.gamma, ppo.lam, check=False, **bootstrap)

    def start(self) -> None:
        """Resets the environment. Where running statistics are still empty, one rollout fills them first.

        Raises FloatingPointError where that rollout is not finite.
        """
        self._reset()
        if self.policy.untried:
            # The environment, and the count of its episodes, then begin anew.
            buffer = self.buffer
            self._estimate(*self.collect())
            culprit, details = self.figures.find_culprit()  # running statistics would stay non-finite for good
            if culprit is not None:
                raise FloatingPointError(f"the rollout before the first iteration: {culprit}{details}")
            self.policy.observe_returns(buffer, ranks=self.ranks)
            self.policy.observe(buffer, self.ranks)
            buffer.clear()
            self._reset()

    def _reset(self) -> None:
        self.observations = self.env.reset()
        if self.policy.recurrent:
            self.policy.reset()
        if self.reward_scaler is not None:
            self.reward_scaler.running.zero_()
        if self.config.random_episode_starts:
            self.env.randomize_episode_lengths()

    def learnt(self) -> dict[str, Any]:
        """The part of a checkpoint that is worth saving even when an iteration fails halfway; not copied."""
        return {
            "iteration": self.iteration,
            "policy": self.policy.state_dict(),
            "learner": self.learner.state_dict(),
            "config": dataclasses.asdict(self.recorded),
            "environment": self.environment.stored(),
            **({} if self.average is None else {"average": self.average.state_dict()}),
            **({} if self.reward_scaler is None else {"rewards": self.reward_scaler.state_dict()}),
            **({"memory": self.policy.memory} if self.policy.recurrent else {}),
        }


def _settings(env: Env, config: TrainConfig) -> dict[str, Any]:
    """The settings that must be equal on all ranks."""
    settings = dataclasses.asdict(config)
    settings |= settings.pop("ppo") | {"num_envs": env.num_envs}
    return {name: x for name, x in settings.items() if name not in ("device", "run_dir", "resume")}


def stored_obs(obs: ObsSpec, dtype: torch.dtype) -> ObsSpec:
    """``obs`` with its float32 groups stored as ``dtype``."""
    if not isinstance(obs, Mapping) or dtype == torch.float32:
        return obs
    groups, _ = parse_obs(obs, dtype)
    return {name: (shape, dtype if given == torch.float32 else given) for name, (shape, given) in groups.items()}
