"""The training loop: collect a rollout, estimate advantages, learn, discard; and what a person sees of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import Env, LogMeter, ObsSpec
from pydrone.layout import parse_obs
from pydrone.memory import plan
from pydrone.ops import native
from pydrone.ops.schema import INVALID, TRUNCATED
from pydrone.ppo import checkpoint, configfile
from pydrone.ppo.config import TrainConfig, check_minibatches
from pydrone.ppo.distributed import Ranks
from pydrone.ppo.learner import Learner
from pydrone.ppo.meters import EpisodeMeter, Stopwatch, stages_of
from pydrone.ppo.normalization import RewardScaler
from pydrone.ppo.policy import make_policy

# What a checkpoint holds, see Trainer.state_dict.
CHECKPOINT_KEYS = ("iteration", "policy", "learner", "config")

# `target_episode_length` looks at the mean over this many iterations.
WINDOW = 10

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
    scalars: list[Tensor]  # of :meth:`Trainer._figures`
    row: Tensor | None  # float64: ``scalars``, the environment's log and the buffer's flags; None with several ranks


class Outcome(NamedTuple):
    """How a training ended."""

    reason: str  # in words
    iterations: int  # done in all
    figures: dict[str, float]  # of the last one
    checkpoint: Path | None


class Trainer:
    """Trains a policy on an environment.

    Args:
        env: has a continuous action of so many dimensions (``env.actions`` an int), or a discrete one
            (``((), torch.int64)``) and ``num_discrete_actions``.
        config: its ``env``, ``num_envs`` and ``device`` are not read: ``env`` has them.
        run_dir: where checkpoints, figures and the learning curve go. None: nowhere.
        echo: takes the lines that report progress.
        show: takes each iteration's figures, the number of iterations in all and the seconds left, instead of a line.
        ranks: the processes that train one policy, each with an ``env`` of its own, of one size. None: those of
            torch.distributed's process group where one is initialised, else this one alone. The first rank alone has
            a ``run_dir``, ``echo`` and ``show``; all of them call the same methods.

    Raises:
        TypeError: the environment's actions are of another kind.
        ValueError: the observations are no vectors, there are more minibatches than samples, ``config.resume`` is
            no checkpoint of a training like this one, or the ranks differ in their settings.
        OSError: ``config.resume`` cannot be read.
    """

    def __init__(
        self,
        env: Env,
        config: TrainConfig | None = None,
        run_dir: str | Path | None = None,
        echo: Callable[[str], None] = print,
        show: Callable[[dict[str, float], int, float], None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks = Ranks.found() if ranks is None else ranks
        if ranks.rank:
            run_dir, echo, show = None, lambda line: None, None
        self.env, self.config, self.echo, self.show = env, config or TrainConfig(), echo, show
        config = self.config
        self.device = torch.device(env.device)
        self.run_dir = None if run_dir is None else Path(run_dir)
        samples = env.num_envs * config.num_steps
        check_minibatches(config.ppo.num_minibatches, samples)
        if config.ppo.recurrent != "none" and config.ppo.num_minibatches > env.num_envs:
            raise ValueError(
                f"num_minibatches: expected at most one an environment, {env.num_envs}, for a recurrent policy, got "
                f"{config.ppo.num_minibatches}"
            )
        self.iteration = 0
        state = None
        if config.resume is not None:
            state = read_checkpoint(config.resume, self.device)
            self.iteration = state["iteration"]
        self._first = self.iteration
        ranks.check_same(_settings(env, config) | {"iteration": self.iteration})
        # A resumed run whose generators cannot be restored draws other numbers than the first one did.
        torch.manual_seed(config.seed + self.iteration)
        ppo = config.ppo
        self.policy = make_policy(env.obs, env.actions, ppo, getattr(env, "num_discrete_actions", None)).to(self.device)
        ranks.broadcast_(list(self.policy.state_dict().values()))
        if ranks.rank:
            torch.manual_seed(ranks.seed(config.seed + self.iteration))
        self.learner = Learner(self.policy, ppo, ranks)
        scaled = ppo.normalize_rewards or ppo.reward_scale != 1
        self._rewards = (
            RewardScaler(env.num_envs, ppo.gamma, ppo.reward_scale, ppo.normalize_rewards).to(self.device)
            if scaled
            else None
        )
        if state is not None:
            self._restore(state)
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
        self.buffer = RolloutBuffer(**sizes, device=self.device, seed=config.seed + self.iteration, rank=ranks.rank)
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
            from pydrone.ppo.graphs import Graph

            self._graph = Graph(self)
        # What an iteration without an end of an episode goes on showing.
        self._episode_figures = dict.fromkeys(("episode_length", "episode_return", "success_rate"), math.nan)
        self._lengths: deque[float] = deque(maxlen=WINDOW)
        self._log: Any = None
        # Whether a signal has asked to stop, and whether the last iteration's message said so of any rank.
        self._interrupt, self._asked_to_stop = None, False
        # The state before an update that is under way.
        self._before_update: dict[str, Any] | None = None
        # What a resumed run could not take over, in words.
        self._not_restored = None if state is None else self._restore_progress(state)

    # ------------------------------------------------------------------------------------------------ one iteration

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

    # ------------------------------------------------------------------------------------------------ all of them

    def train(self) -> Outcome:
        """Iterates until the last iteration, the target, or a SIGINT or SIGTERM, which ends the iteration in hand.

        Where an iteration fails, the state after the last whole one is saved before the error goes on; not where the
        loss is not finite. With no iteration left to do, nothing is written.
        """
        config = self.config
        done = f"all {config.iterations} iterations are done"
        if self.iteration >= config.iterations:
            self.echo(nothing_to_do(self.iteration, config.iterations))
            return Outcome(done, self.iteration, {}, None)
        self._open_run()
        if self._not_restored is not None:
            self.echo(f"Resumed at iteration {self.iteration}; {self._not_restored}.")
        # That the library is missing has been said of the buffer.
        by_autograd = self.learner.not_fused is not None and self.learner.fused_loss is None
        if self.config.ppo.learner == "auto" and by_autograd and native.CPU_MISSING is None:
            self.echo(f"Gradients by autograd: {self.learner.not_fused}.")
        try:
            with _Interrupt(self.echo) as interrupt:
                self._interrupt = interrupt
                reason, figures = self._iterate_all(interrupt)
                saved = self.save()
        except NotFinite:
            raise
        except Exception:
            self._save_after_failure()
            raise
        finally:
            if self._log is not None:
                self._log.close()
        reason = reason or done
        after = "" if reason == done else f", after {self.iteration} iterations"
        self.echo(f"{reason[0].upper()}{reason[1:]}{after}.")
        if saved is not None:
            self.echo(f"Checkpoint: {saved}")
        return Outcome(reason, self.iteration, figures, saved)

    def _iterate_all(self, interrupt: _Interrupt) -> tuple[str | None, dict[str, float]]:
        """Why it ended before the last iteration, None if it did not, and the last figures."""
        config, times = self.config, deque(maxlen=WINDOW)
        figures: dict[str, float] = {}
        while self.iteration < config.iterations:
            try:
                figures = self.iterate()
            except NotFinite as error:
                self._report(error.figures, times)
                raise
            self._report(figures, times)
            if self._target_reached(figures["episode_length"]):
                return f"the mean episode length reached {config.target_episode_length:g} steps", figures
            # Of several ranks all stop in the iteration whose message said so.
            if self._asked_to_stop if self.ranks.several else interrupt.raised:
                return "interrupted", figures
            if self.iteration % config.save_interval == 0 and self.iteration < config.iterations:
                self._save_on_the_way()
        return None, figures

    def _report(self, figures: dict[str, float], times: deque[float]) -> None:
        if self._log is not None:
            self._log.write(figures)
        times.append(figures["time/iteration"])
        left = (self.config.iterations - self.iteration) * sum(times) / len(times)
        if self.show is None:
            self.echo(progress_line(figures, self.config.iterations, left))
        else:
            self.show(figures, self.config.iterations, left)

    def _save_on_the_way(self) -> None:
        """A disk that is full now may not be at the next checkpoint: hours of training do not end with it."""
        try:
            self.save()
        except OSError as error:
            self.echo(f"Checkpoint of iteration {self.iteration} not saved, going on: {error}")

    def _save_after_failure(self) -> None:
        """Keeps what was learnt in this run, as far as its weights are finite; silent where that fails too."""
        # A device that has failed, a full disk, a closed output: the error that led here is the one to see.
        with contextlib.suppress(Exception):
            state = self._before_update or self._learnt()
            if state["iteration"] > self._first and all(x.isfinite().all() for x in state["policy"].values()):
                saved = self._save(state)
                if saved is not None:
                    self.echo(f"Failed in iteration {state['iteration'] + 1}. Checkpoint of the one before: {saved}")

    def save(self) -> Path | None:
        """Writes the checkpoint ``model_ITERATION.pt`` into the run's folder; returns its path."""
        state = self.state_dict()
        try:
            return self._save(state)
        finally:
            self.ranks.gather_objects(None)  # whoever goes on finds it there, or the disk full

    def _save(self, state: dict[str, Any]) -> Path | None:
        return None if self.run_dir is None else checkpoint.save(self.run_dir / f"model_{state['iteration']}.pt", state)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, between iterations: plain containers and tensors, not copied.

        Called on every rank, as is :meth:`save`; the first one's is the checkpoint, with all ranks' progress.
        """
        progress, *others = self.ranks.to_first(self._progress())
        return {**self._learnt(), "progress": progress, **({"others": others} if others else {})}

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

    def _progress(self) -> dict[str, Any]:
        """All else that the next iteration depends on."""
        buffer = self.buffer.state_dict()
        env = self.env.state_dict() if self._obs is not None and hasattr(self.env, "state_dict") else None
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "generators": generators,
            "rollouts": buffer["discarded"] // self.buffer.num_steps,  # the buffer is empty between iterations
            "shuffle_seed": buffer["seed"],
            "env": env,
            "obs": self._obs if env is not None else None,
            "running_episodes": self._episodes.state_dict(),
            "episode_figures": dict(self._episode_figures),
            "episode_lengths": list(self._lengths),
            # The first rank's are where one process has them.
            **({} if self._rewards is None or not self.ranks.rank else {"discounted": self._rewards.running}),
            **({"memory": self.policy.memory} if self.policy.recurrent and self.ranks.rank else {}),
        }

    def _restore_progress(self, state: dict[str, Any]) -> str | None:
        """Takes over what :meth:`_progress` returned; what could not be, in words, or None."""
        progress, before = state.get("progress"), state["config"]
        if progress is None:
            return "its checkpoint was saved after a failure: all episodes begin anew, with other random numbers"
        try:
            self._episode_figures |= progress["episode_figures"]
            self._lengths.extend(progress["episode_lengths"])
            if before["seed"] != self.config.seed:
                return f"its seed was {before['seed']}: all episodes begin anew, with other random numbers"
            each, ranks = [progress, *state.get("others", [])], self.ranks
            if len(each) != ranks.world_size:
                return (
                    f"its processes were {len(each)}, these are {ranks.world_size}: all episodes begin anew, "
                    "with other random numbers"
                )
            progress = each[ranks.rank]
            if ranks.rank and self._rewards is not None and "discounted" in progress:
                self._rewards.running.copy_(progress["discounted"])
            if ranks.rank and self.policy.recurrent:
                self.policy.memory = progress["memory"]
            steps = progress["rollouts"] * self.buffer.num_steps
            counters = {"appended": steps, "discarded": steps, "seed": progress["shuffle_seed"]}
            self.buffer.load_state_dict({**self.buffer.state_dict(), **counters})
            torch.set_rng_state(progress["generators"]["cpu"].cpu())
            if self.device.type == "cuda" and "cuda" in progress["generators"]:
                torch.cuda.set_rng_state(progress["generators"]["cuda"].cpu(), self.device)
            if progress["env"] is None or not hasattr(self.env, "load_state_dict"):
                return f"{before['env']} cannot restore its simulator: all episodes begin anew, with other targets"
            try:
                self.env.load_state_dict(progress["env"])
            except (RuntimeError, ValueError) as error:
                return f"all episodes begin anew, as this environment is not the checkpoint's: {error}"
            self._episodes.load_state_dict(progress["running_episodes"])
            self._obs = progress["obs"]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            path = self.config.resume
            raise ValueError(f"{path}: expected the progress of a training, got something else: {error}") from error
        return None

    def _restore(self, state: dict[str, Any]) -> None:
        """Takes over a checkpoint's networks and optimiser, or says in a sentence why they do not fit."""
        path = self.config.resume
        own = {name: tuple(x.shape) for name, x in self.policy.state_dict().items()}
        try:
            theirs = {name: tuple(x.shape) for name, x in state["policy"].items()}
        except AttributeError:
            raise ValueError(f"{path}: expected the weights of a policy, got something else") from None
        hidden, given = _hidden_dims(theirs), tuple(self.config.ppo.hidden_dims)
        if hidden and hidden != given:
            raise ValueError(f"hidden_dims: expected {hidden}, those of the checkpoint {path}, got {given}")
        for name in sorted(own.keys() | theirs.keys()):
            if own.get(name) != theirs.get(name):
                raise ValueError(
                    f"{path}: {name}: expected shape {own.get(name)} for this environment, got {theirs.get(name)}"
                )
        self.policy.load_state_dict(state["policy"])
        try:
            self.learner.load_state_dict(state["learner"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path}: expected the state of Adam for these networks, got something else") from error
        if self._rewards is not None and "rewards" in state:
            self._rewards.restore(state["rewards"])
        if self.policy.recurrent:
            # Of use where the environment goes on too; where it begins anew, _reset() forgets it.
            self.policy.memory = state.get("memory")

    def _open_run(self) -> None:
        if self.run_dir is None:
            return
        from pydrone.report import CONFIG, RunLog

        config, settings = self.config, dataclasses.asdict(self.config)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(self.run_dir)
        project = config.wandb_project if config.wandb else None
        self._log = RunLog(self.run_dir, config.tensorboard, self.iteration, project, settings)
        (self.run_dir / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        configfile.write(self.run_dir, config)

    def _target_reached(self, episode_length: float) -> bool:
        target = self.config.target_episode_length
        self._lengths.append(episode_length)
        # A mean with a NaN in it, before the first episode has ended, is below every target.
        return target is not None and len(self._lengths) == WINDOW and sum(self._lengths) / WINDOW >= target


def progress_line(figures: dict[str, float], iterations: int, seconds_left: float) -> str:
    """One iteration in a line: the reward of an episode, its length, speed, seconds by stage, time left."""
    number = f"{int(figures['iteration']):>{len(str(iterations))}}/{iterations}"
    stages = " ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages_of(figures).items())
    minutes, seconds = divmod(round(seconds_left), 60)
    reward, length = figures["episode_return"], figures["episode_length"]
    # Unknown until an episode has ended.
    reward, length = ["-" if math.isnan(x) else f"{x:.{digits}f}" for x, digits in ((reward, 3), (length, 1))]
    return (
        f"{number}  reward {reward:>8}  length {length:>7}  "
        f"{figures['steps_per_second']:10,.0f} steps/s  {stages} s  left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )


def read_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The checkpoint of a training, see :meth:`Trainer.state_dict`; raises as :func:`pydrone.ppo.checkpoint.load`."""
    state = checkpoint.load(path, device, CHECKPOINT_KEYS)
    if type(state["iteration"]) is not int or state["iteration"] < 0:
        raise ValueError(f"{path}: iteration: expected an int of at least 0, got {state['iteration']!r}")
    settings = state["config"]
    if not (isinstance(settings, Mapping) and isinstance(settings.get("env"), str) and "ppo" in settings):
        raise ValueError(f"{path}: config: expected the settings of a training, got {type(settings).__name__}")
    return state


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


def nothing_to_do(iteration: int, iterations: int) -> str:
    """What is said instead of a training whose checkpoint stands at its end."""
    return f"Nothing to do: the checkpoint stands at iteration {iteration} of {iterations}."


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


def _hidden_dims(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Widths of the hidden layers of a policy whose ``state_dict`` has these shapes."""
    weights = [shape for name, shape in shapes.items() if name.startswith("actor.") and name.endswith(".weight")]
    return tuple(shape[0] for shape in weights[:-1])


class _Interrupt:
    """SIGINT and SIGTERM set ``raised`` and say so; a SIGINT after that interrupts at once.

    Signals reach the main thread only.
    """

    def __init__(self, echo: Callable[[str], None]) -> None:
        self.raised = False
        self._echo = echo
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # who stops a job may say so again and again
        self.raised = True
        # A signal that comes in the middle of a print cannot print; one whose terminal is gone need not.
        with contextlib.suppress(RuntimeError, OSError):
            self._echo("finishing this iteration and saving; Ctrl-C again stops now")
