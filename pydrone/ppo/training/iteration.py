"""One iteration of a training: collect a rollout, estimate advantages, learn, discard, and the figures of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import Env, LogMeter, ObsSpec
from pydrone.memory import plan
from pydrone.ops.schema import INVALID, TRUNCATED
from pydrone.ppo.config import TrainConfig, check_minibatches
from pydrone.ppo.distributed import Ranks
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.policy.normalization import RewardScaler
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.meters import EpisodeMeter, Stopwatch
from pydrone.rollout.layout import parse_obs

# How far the ranks' parameters may be apart, of their norm.
DRIFT = 1e-3


class NotFinite(FloatingPointError):
    """An iteration's loss is not finite, or what it is computed from; ``figures`` are the iteration's."""

    def __init__(self, message: str, figures: dict[str, float]) -> None:
        super().__init__(message)
        self.figures = figures


class Computed(NamedTuple):
    """What an iteration has left on the device for its figures."""

    metrics: tuple[str, ...]  # the learner's
    scalars: list[Tensor]  # of :meth:`Iteration._figures`
    row: Tensor | None  # float64: ``scalars``, the environment's log and the buffer's flags; None with several ranks


class Iteration:
    """A policy, its learner, its environment and its buffer, and what is done with them again and again.

    What is trained for how long, and what is kept of it, is :class:`pydrone.ppo.trainer.Trainer`'s, which is one.
    """

    def __init__(self, env: Env, config: TrainConfig, ranks: Ranks, iteration: int = 0) -> None:
        self.env, self.config, self.ranks, self.iteration = env, config, ranks, iteration
        self.device = torch.device(env.device)
        samples = env.num_envs * config.num_steps
        check_minibatches(config.ppo.num_minibatches, samples)
        if config.ppo.recurrent != "none" and config.ppo.num_minibatches > env.num_envs:
            raise ValueError(
                f"num_minibatches: expected at most one an environment, {env.num_envs}, for a recurrent policy, got "
                f"{config.ppo.num_minibatches}"
            )
        ranks.check_same(_settings(env, config) | {"iteration": iteration})
        # A resumed run whose generators cannot be restored draws other numbers than the first one did.
        torch.manual_seed(config.seed + iteration)
        ppo = config.ppo
        self.policy = make_policy(env.obs, env.actions, ppo, getattr(env, "num_discrete_actions", None)).to(self.device)
        ranks.broadcast_(list(self.policy.state_dict().values()))
        if ranks.rank:
            torch.manual_seed(ranks.seed(config.seed + iteration))
        self.learner = Learner(self.policy, ppo, ranks)
        scaled = ppo.normalize_rewards or ppo.reward_scale != 1
        self._rewards = (
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
            "final_obs_rows": 0 if self.policy.recurrent else _final_obs_rows(env, config.num_steps),
        }
        self.buffer = RolloutBuffer(**sizes, device=self.device, seed=config.seed + iteration, rank=ranks.rank)
        #: bytes of the buffer once it holds the minibatch that is handed out again and again, if one is
        gathers = self.learner.gathers(self.buffer) and not self.policy.recurrent
        reused = math.ceil(samples / ppo.num_minibatches) if gathers else None
        self.planned_nbytes = plan(**sizes, reused_minibatch=reused).nbytes
        self._episodes = EpisodeMeter(env.num_envs, config.num_steps, self.device)
        self._env_log, self._log_keys = LogMeter(), []
        self._watch = Stopwatch(self.device)
        self._obs: Any = None
        self._graph = None
        if config.capture:
            from pydrone.ppo.training.graphs import Graph

            self._graph = Graph(self)
        # What an iteration without an end of an episode goes on showing.
        self._episode_figures = dict.fromkeys(("episode_length", "episode_return", "success_rate"), math.nan)
        # The run's signal, if it listens to any, and whether the last iteration's message said so of any rank.
        self._interrupt: Any = None
        self._asked_to_stop = False
        # The state before an update that is under way.
        self._before_update: dict[str, Any] | None = None

    def iterate(self) -> dict[str, float]:
        """One iteration; returns its figures.

        The host waits for the device once, at the end of it, for the figures, the environment's log and the buffer's
        flags together.

        Raises:
            NotFinite: the loss is not, or observations, rewards, values or advantages are not. A FloatingPointError.
        """
        began = time.perf_counter()
        if self._obs is None:
            self._start()
        buffer = self.buffer
        self.learner.set_progress(self.iteration / self.config.iterations)
        self._watch.start()
        computed = self.compute() if self._graph is None else self._graph.compute()
        figures, culprit = self._read(computed)
        buffer.clear() if self._graph is None else self._graph.clear()
        self.iteration += 1
        self._before_update = None
        seconds = time.perf_counter() - began
        figures["iteration"] = self.iteration
        figures["steps_per_second"] = self.ranks.world_size * buffer.num_envs * buffer.num_steps / seconds
        figures["time/iteration"] = seconds
        if culprit is not None:
            losses = figures["surrogate_loss"], figures["value_loss"]
            if not all(map(math.isfinite, losses)):
                culprit = "the loss is not finite (surrogate {}, value {}): {}".format(*losses, culprit)
            raise NotFinite(f"iteration {self.iteration}: {culprit}", figures)
        return figures

    def compute(self) -> Computed:
        """What the device has to do in an iteration; the host waits for nothing, but for what a learner does."""
        buffer, ppo = self.buffer, self.config.ppo
        last_values, bootstrap = self.collect()
        if self._rewards is not None:
            self._rewards.apply_to(buffer.rewards, buffer.dones, self.ranks)
        # What its flags say is read with the figures.
        buffer.compute_gae(last_values, ppo.gamma, ppo.lam, check=False, **bootstrap)
        if self.ranks.several and ppo.advantage_scope == "rollout":
            merged = self.ranks.moments(*buffer.statistics)
            buffer.statistics.copy_(torch.stack(merged))
        self._watch.lap("gae")
        self._before_update = checkpoint.copied(self._learnt())
        learnt = self.learner.update(buffer)
        self._watch.lap("update")
        return self._figures(learnt)

    @torch.no_grad()
    def collect(self) -> tuple[Tensor, dict[str, Any]]:
        """Fills the buffer. Returns V of the observation that comes after, [N], and how to bootstrap at time-outs."""
        env, buffer, policy, lap = self.env, self.buffer, self.policy, self._watch.lap
        obs, final_obs, final_values = self._obs, None, []
        if policy.recurrent:
            policy.begin_rollout(env.num_envs)
        acting, ends = self.learner.acting(buffer, lap), None
        for _ in range(self.config.num_steps):
            actions = acting(obs, ends)  # with the end of the step before, in one call where it can be
            result = env.step(actions)
            lap("env")
            final_obs = result.final_obs if env.autoreset == "same_step" else None
            if policy.recurrent:
                # Valued at once, with what is remembered of the episode, which is then forgotten.
                if final_obs is not None:
                    final_values.append(policy.value(final_obs))
                policy.reset(result.dones if result.valid is None else ~result.valid)
                lap("policy")
            ends = {
                "rewards": result.rewards,
                "dones": result.dones,
                "truncated": result.truncated,
                "final_obs": None if policy.recurrent else final_obs,
                "valid": result.valid,
            }
            self._env_log.add(result.log)
            lap("env")
            obs = result.obs
        buffer.end(**ends)
        lap("storage")
        self._obs = obs
        last_values = policy.value(obs)
        lap("policy")
        if env.autoreset == "next_step":
            return last_values, {"timeout_bootstrap": "next_value"}
        if final_obs is None:
            return last_values, {"timeout_bootstrap": "stored_value"}
        if final_values:
            return last_values, {"final_values": torch.stack(final_values, 1)}
        return last_values, {"value_fn": policy.value}

    def _start(self) -> None:
        self._reset()
        if self.policy.untried:
            # A rollout for the first statistics alone. The environment begins anew after it, and so does the count of
            # its episodes.
            ppo, buffer = self.config.ppo, self.buffer
            last_values, bootstrap = self.collect()
            if self._rewards is not None:
                self._rewards.apply_to(buffer.rewards, buffer.dones, self.ranks)
            buffer.compute_gae(last_values, ppo.gamma, ppo.lam, check=False, **bootstrap)
            culprit, details = self._find_culprit()  # running statistics would never be rid of it
            if culprit is not None:
                raise FloatingPointError(f"the rollout before the first iteration: {culprit}{details}")
            self.policy.observe_returns(buffer.returns, buffer.dones != INVALID, self.ranks)
            self.policy.observe(buffer.obs, self.ranks)
            buffer.clear()
            self._env_log = LogMeter()
            self._reset()

    def _reset(self) -> None:
        self._obs = self.env.reset()
        if self.policy.recurrent:
            self.policy.reset()
        if self._rewards is not None:
            self._rewards.running.zero_()
        if self.config.random_episode_starts:
            self.env.randomize_episode_lengths()

    @torch.no_grad()
    def _figures(self, learnt: dict[str, Tensor]) -> Computed:
        """The sums and flags that the figures are made of, on the device."""
        buffer = self.buffer
        rewards, codes = buffer.rewards, buffer.dones
        if self._rewards is not None:
            rewards = self._rewards.undo(rewards)
        episodes = self._episodes.update(rewards, codes)
        # A reset step's reward is anything, and counts for nothing.
        skipped = codes == INVALID
        finite = [(x.isfinite() | skipped).all() for x in (rewards, buffer.values, buffer.advantages)]
        flags = buffer.flags()
        finite.append(flags[3] == 0)  # observations, as append's launches have seen them
        timeouts = (codes == TRUNCATED).sum()
        scalars = [*learnt.values(), self.policy.std.mean(), rewards.mean(), *episodes.unbind(), timeouts, *finite]
        row = None
        if not self.ranks.several:
            sums = [x.to(self.device).double() for x in self._env_log.totals()]
            row = torch.cat((torch.stack(scalars + sums).double(), flags))
        return Computed(tuple(learnt), scalars, row)

    @torch.no_grad()
    def _read(self, computed: Computed) -> tuple[dict[str, float], str | None]:
        """The figures on the host, and what is not finite. Raises what the buffer's flags say."""
        rows, log = self._gather(computed)
        # The losses and the standard deviation are those of all ranks on each of them.
        own = len(computed.metrics) + 1
        *losses, std = rows[0][:own]
        rewards, *ended, good_rewards, good_values, good_advantages, good_obs = zip(*(row[own:] for row in rows))
        reward, (count, length, total, timeouts) = sum(rewards) / len(rows), map(sum, ended)
        figures = dict(zip(computed.metrics, losses))
        if count:
            means = {"episode_length": length, "episode_return": total, "success_rate": timeouts}
            self._episode_figures = {name: value / count for name, value in means.items()}
        if "episode/success" in log:
            # The environment's own word; else an episode succeeds that reaches its time limit.
            self._episode_figures["success_rate"] = log["episode/success"]
        figures |= {"action_std": std, "reward": reward, "episodes": count, **self._episode_figures}
        figures |= {f"env/{name}": value for name, value in log.items()}
        figures |= {f"time/{stage}": seconds for stage, seconds in self._watch.seconds().items()}
        culprit, details = None, ""
        if not all(itertools.chain(good_obs, good_rewards, good_values, good_advantages)):
            culprit, details = self._find_culprit()
        if culprit is not None:
            pass
        elif not all(good_advantages):
            culprit = "the advantages are not finite"
        elif not math.isfinite(figures["surrogate_loss"] + figures["value_loss"]):
            culprit = "rewards, values and advantages are; the update diverged"
        if self.ranks.several:
            finite = zip(good_obs, good_rewards, good_values, good_advantages)
            bad = [str(rank) for rank, good in enumerate(finite) if not all(good)]
            culprit = culprit and culprit + (f" (rank {', '.join(bad)})" if bad else "")
        return figures, culprit and culprit + details

    def _find_culprit(self) -> tuple[str | None, str]:
        """What was not finite first on any rank, and all that is not; None where nothing but advantages is."""
        ranks = self.ranks.gather_objects([x for x in self.buffer.non_finite() if x.name != "advantages"])
        found = [(x.step, rank, i, x) for rank, each in enumerate(ranks) for i, x in enumerate(each)]
        if not found:
            return None, ""
        name = min(found, key=lambda x: x[:3])[-1].name
        whose = {"actions": "actions of the policy", "values": "values of the critic"}
        culprit = whose.get(name, f"{'rewards' if name == 'rewards' else 'observations'} of the environment")
        several = self.ranks.several
        details = "; ".join((f"rank {rank}, " if several else "") + str(x) for _, rank, _, x in found)
        return f"the {culprit} are not finite", f": {details}"

    def _gather(self, computed: Computed) -> tuple[list[list[float]], dict[str, float]]:
        """The scalars of each rank, and the means of all environments' logs, in one message.

        In two where a log has keys that it had not before. Raises what the flags of any rank's buffer say.
        """
        log, ranks, scalars = self._env_log, self.ranks, computed.scalars
        if computed.row is not None:
            row, own = computed.row.tolist(), len(scalars) + len(log.totals())
            self.buffer.check(_but_finite(row[own:]))
            return [row[: len(scalars)]], log.means(row[len(scalars) : own])
        flags = self.buffer.flags()
        norm = torch.stack(torch._foreach_norm(list(self.policy.parameters()))).sum()
        while True:
            new = not log.keys() <= set(self._log_keys)
            if not new:
                log.align(self._log_keys)
            known = len(self._log_keys)
            sums = [norm.new_zeros(())] * known if new else [x.to(self.device) for x in log.totals()]
            stop = self._interrupt is not None and self._interrupt.raised
            host = norm.new_tensor([new, stop, *([0] * known if new else log.steps())], dtype=torch.float64)
            own = torch.stack([x.double() for x in [*scalars, *sums, norm]])
            rows = ranks.gather(torch.cat((own, host, flags))).tolist()
            parts = [_split(row, len(scalars), known, 1, 1, 1, known, len(flags)) for row in rows]
            figures, sums, norms, news, stops, steps, flags_ = zip(*parts)
            if not any(x for (x,) in news):
                break
            self._log_keys = sorted({*self._log_keys, *itertools.chain(*ranks.gather_objects(log.keys()))})
        for row in flags_:
            self.buffer.check(_but_finite(row))
        norms = [x for (x,) in norms]
        # Rounding differs between processors; what is more is no longer one policy.
        if max(norms) - min(norms) > DRIFT * max(norms):
            raise RuntimeError(f"the ranks' policies have drifted apart: norms of their parameters {norms}")
        self._asked_to_stop = any(x for (x,) in stops)
        return list(figures), log.means([sum(x) for x in zip(*sums)], steps=[sum(x) for x in zip(*steps)])

    def _learnt(self) -> dict[str, Any]:
        """What counts after a failure in the middle of an iteration."""
        return {
            "iteration": self.iteration,
            "policy": self.policy.state_dict(),
            "learner": self.learner.state_dict(),
            "config": dataclasses.asdict(self.config),
            **({} if self._rewards is None else {"rewards": self._rewards.state_dict()}),
            **({"memory": self.policy.memory} if self.policy.recurrent else {}),
        }


def _but_finite(flags: list[float]) -> list[float]:
    """A buffer's flags without what is not finite, which the trainer reports itself, with the iteration's figures."""
    return [*flags[:3], 0.0, 0.0]


def _split(row: list[float], *sizes: int) -> list[list[float]]:
    numbers = iter(row)
    return [list(itertools.islice(numbers, size)) for size in sizes]


def _settings(env: Env, config: TrainConfig) -> dict[str, Any]:
    """What is the same on all ranks."""
    settings = dataclasses.asdict(config)
    settings |= settings.pop("ppo") | {"num_envs": env.num_envs}
    return {name: x for name, x in settings.items() if name not in ("device", "run_dir", "resume")}


def _final_obs_rows(env: Env, num_steps: int) -> int | None:
    """Size of the buffer's pool of final observations."""
    if env.autoreset == "next_step":
        return 0  # the final observation is stored as the next one
    if env.max_episode_length is None:
        # Any step may truncate: room for all of them, as much memory as the observations take, so that no training
        # ends with a full pool.
        return env.num_envs * num_steps
    return None


def stored_obs(obs: ObsSpec, dtype: torch.dtype) -> ObsSpec:
    """``obs`` with the groups that state float32 stored as ``dtype``."""
    if not isinstance(obs, Mapping) or dtype == torch.float32:
        return obs
    groups, _ = parse_obs(obs, dtype)
    return {name: (shape, dtype if given == torch.float32 else given) for name, (shape, given) in groups.items()}
