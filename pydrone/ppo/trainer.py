"""The training loop: collect a rollout, estimate advantages, learn, discard; and what a person sees of it."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import Env, LogMeter
from pydrone.ops.schema import INVALID, RUNNING
from pydrone.ppo import checkpoint
from pydrone.ppo.config import TrainConfig
from pydrone.ppo.learner import Learner
from pydrone.ppo.policy import ActorCritic

# The parts of an iteration whose time is taken.
STAGES = ("env", "policy", "storage", "gae", "update")

# `target_episode_length` looks at the mean over this many iterations.
WINDOW = 10


class Stopwatch:
    """Seconds by stage. On CUDA by events in the stream, so that taking the time does not wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spare: list[torch.cuda.Event] = []
        self._laps: list[tuple[str | None, torch.cuda.Event]] = []
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._last = 0.0

    def start(self) -> None:
        """Begins an iteration at zero."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()
        if self._cuda:
            self._spare += [event for _, event in self._laps]
            self._laps = []
            self._record(None)

    def lap(self, stage: str) -> None:
        """The time since the last call went into ``stage``."""
        if self._cuda:
            self._record(stage)
        else:
            now = time.perf_counter()
            self._seconds[stage] += now - self._last
            self._last = now

    def seconds(self) -> dict[str, float]:
        """By stage, since :meth:`start`. On CUDA the device must have been waited for."""
        for (_, before), (stage, after) in zip(self._laps, self._laps[1:]):
            self._seconds[stage] += before.elapsed_time(after) * 1e-3
        return dict(self._seconds)

    def _record(self, stage: str | None) -> None:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._laps.append((stage, event))


class EpisodeMeter:
    """Episodes that end within a rollout: how many, their lengths and rewards, in a dozen launches a rollout.

    rsl_rl keeps the last 100 episodes in a deque on the host, which costs a synchronisation a step; this is the mean
    over all episodes that ended in the iteration. An episode's reward is the plain sum, not discounted.
    """

    def __init__(self, num_envs: int, num_steps: int, device: torch.device) -> None:
        self._steps = torch.arange(1, num_steps + 1, device=device)
        # Of the running episodes, in rollouts that are gone.
        self._length = torch.zeros(num_envs, device=device)
        self._reward = torch.zeros(num_envs, device=device)

    def update(self, rewards: Tensor, codes: Tensor) -> Tensor:
        """[3]: count, summed length and summed reward of the episodes that ended.

        rewards: [N, T]. codes: uint8 [N, T], the buffer's. Up to an environment's last end every step belongs to an
        episode that ended, so nothing need be known of the ends before it.
        """
        counted = codes != INVALID
        ends = counted & (codes != RUNNING)
        last = torch.where(ends, self._steps, 0).amax(1, keepdim=True)  # steps up to the last end, 0 without one
        ended = last.squeeze(1) > 0
        before = self._steps <= last
        rewards = torch.where(counted, rewards, 0)
        reward_before, length_before = torch.where(before, rewards, 0).sum(1), (before & counted).sum(1)
        reward_after, length_after = torch.where(before, 0, rewards).sum(1), (counted & ~before).sum(1)
        totals = torch.stack(
            (
                ends.sum(),
                (length_before + torch.where(ended, self._length, 0)).sum(),
                (reward_before + torch.where(ended, self._reward, 0)).sum(),
            )
        )
        self._length = length_after + torch.where(ended, 0, self._length)
        self._reward = reward_after + torch.where(ended, 0, self._reward)
        return totals


class Outcome(NamedTuple):
    """How a training ended."""

    reason: str  # in words
    iterations: int  # done in all
    figures: dict[str, float]  # of the last one
    checkpoint: Path | None


class Trainer:
    """Trains a Gaussian policy on an environment.

    Args:
        env: has a continuous action of so many dimensions (``env.actions`` an int).
        config: its ``env``, ``num_envs`` and ``device`` are not read: ``env`` has them.
        run_dir: where checkpoints, figures and the learning curve go. None: nowhere.
        echo: takes the lines that report progress.

    Raises:
        TypeError: the environment's actions are not continuous.
    """

    def __init__(
        self,
        env: Env,
        config: TrainConfig | None = None,
        run_dir: str | Path | None = None,
        echo: Callable[[str], None] = print,
    ) -> None:
        self.env, self.config, self.echo = env, config or TrainConfig(), echo
        config = self.config
        if not isinstance(env.actions, int):
            raise TypeError(f"env.actions: expected an int, for continuous actions, got {env.actions!r}")
        self.device = torch.device(env.device)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.iteration = 0
        state = None if config.resume is None else checkpoint.load(config.resume, self.device)
        if state is not None:
            self.iteration = int(state["iteration"])
        # A resumed run draws other numbers than the first one did.
        torch.manual_seed(config.seed + self.iteration)
        ppo = config.ppo
        self.policy = ActorCritic(env.obs, env.actions, ppo.hidden_dims, ppo.init_std).to(self.device)
        self.learner = Learner(self.policy, ppo)
        if state is not None:
            self.policy.load_state_dict(state["policy"])
            self.learner.load_state_dict(state["learner"])
        self.buffer = RolloutBuffer(
            env.num_envs,
            config.num_steps,
            obs=env.obs,
            actions=env.actions,
            device=self.device,
            fields={"mu": env.actions, "sigma": env.actions},
            max_episode_length=env.max_episode_length,
            # With NEXT_STEP autoreset the final observation is stored as the next one.
            final_obs_rows=0 if env.autoreset == "next_step" else None,
            seed=config.seed + self.iteration,
        )
        self._episodes = EpisodeMeter(env.num_envs, config.num_steps, self.device)
        self._env_log = LogMeter()
        self._watch = Stopwatch(self.device)
        self._obs: Any = None
        # What an iteration without an end of an episode goes on showing.
        self._episode_figures = {"episode_length": math.nan, "episode_return": math.nan}
        self._lengths: deque[float] = deque(maxlen=WINDOW)
        self._log: Any = None

    # ------------------------------------------------------------------------------------------------ one iteration

    def iterate(self) -> dict[str, float]:
        """One iteration; returns its figures. The host waits for the device once, at the end of it."""
        began = time.perf_counter()
        if self._obs is None:
            self._start()
        buffer, ppo = self.buffer, self.config.ppo
        self._watch.start()
        last_values, bootstrap = self.collect()
        # On CUDA the pool's counts are read below, with the figures.
        buffer.compute_gae(last_values, ppo.gamma, ppo.lam, check=self.device.type == "cpu", **bootstrap)
        self._watch.lap("gae")
        learnt = self.learner.update(buffer)
        self._watch.lap("update")
        figures = self._read(learnt)
        buffer.check()
        buffer.clear()
        self.iteration += 1
        seconds = time.perf_counter() - began
        figures["iteration"] = self.iteration
        figures["steps_per_second"] = buffer.num_envs * buffer.num_steps / seconds
        figures["time/iteration"] = seconds
        if not math.isfinite(figures["surrogate_loss"] + figures["value_loss"]):
            raise FloatingPointError(
                f"iteration {self.iteration}: the loss is not finite (surrogate {figures['surrogate_loss']}, value "
                f"{figures['value_loss']}); an observation or a reward of the environment may not be, either"
            )
        return figures

    @torch.no_grad()
    def collect(self) -> tuple[Tensor, dict[str, Any]]:
        """Fills the buffer. Returns V of the observation that comes after, [N], and how to bootstrap at time-outs."""
        env, buffer, policy, lap = self.env, self.buffer, self.policy, self._watch.lap
        obs, final_obs = self._obs, None
        for _ in range(self.config.num_steps):
            step = policy.act(obs)
            lap("policy")
            buffer.begin(
                obs=obs,
                actions=step.actions,
                values=step.values,
                log_probs=step.log_probs,
                mu=step.mean,
                sigma=step.std,
            )
            lap("storage")
            result = env.step(step.actions)
            lap("env")
            final_obs = result.final_obs if env.autoreset == "same_step" else None
            buffer.end(
                rewards=result.rewards,
                dones=result.dones,
                truncated=result.truncated,
                final_obs=final_obs,
                valid=result.valid,
            )
            lap("storage")
            self._env_log.add(result.log)
            lap("env")
            obs = result.obs
        self._obs = obs
        last_values = policy.value(obs)
        lap("policy")
        if env.autoreset == "next_step":
            return last_values, {"timeout_bootstrap": "next_value"}
        if final_obs is None:
            return last_values, {"timeout_bootstrap": "stored_value"}
        return last_values, {"value_fn": policy.value}

    def _start(self) -> None:
        self._obs = self.env.reset()
        if self.config.random_episode_starts:
            self.env.randomize_episode_lengths()

    @torch.no_grad()
    def _read(self, learnt: dict[str, Tensor]) -> dict[str, float]:
        """The figures on the host: the one place where it waits for the device."""
        episodes = self._episodes.update(self.buffer.rewards, self.buffer.dones)
        scalars = [*learnt.values(), self.policy.std.mean(), self.buffer.rewards.mean(), *episodes.unbind()]
        *losses, std, reward, count, length, total = torch.stack(scalars).tolist()
        figures = dict(zip(learnt, losses))
        if count:
            self._episode_figures = {"episode_length": length / count, "episode_return": total / count}
        figures |= {"action_std": std, "reward": reward, "episodes": count, **self._episode_figures}
        figures |= {f"env/{name}": value for name, value in self._env_log.means().items()}
        figures |= {f"time/{stage}": seconds for stage, seconds in self._watch.seconds().items()}
        return figures

    # ------------------------------------------------------------------------------------------------ all of them

    def train(self) -> Outcome:
        """Iterates until the last iteration, the target, or an interrupt, which ends the iteration in hand."""
        config = self.config
        figures: dict[str, float] = {}
        reason = f"all {config.iterations} iterations are done"
        times: deque[float] = deque(maxlen=WINDOW)
        self._open_run()
        saved = None
        try:
            with _Interrupt() as interrupt:
                while self.iteration < config.iterations:
                    figures = self.iterate()
                    times.append(figures["time/iteration"])
                    left = (config.iterations - self.iteration) * sum(times) / len(times)
                    self.echo(progress_line(figures, config.iterations, left))
                    if self._log is not None:
                        self._log.write(figures)
                    if self._target_reached(figures["episode_length"]):
                        reason = f"the mean episode length reached {config.target_episode_length:g} steps"
                        break
                    if interrupt.raised:
                        reason = "interrupted"
                        break
                    if self.iteration % config.save_interval == 0:
                        self.save()
            saved = self.save()
        finally:
            if self._log is not None:
                self._log.close()
        self.echo(f"{reason[0].upper()}{reason[1:]}, after {self.iteration} iterations.")
        if saved is not None:
            self.echo(f"Checkpoint: {saved}")
        return Outcome(reason, self.iteration, figures, saved)

    def save(self) -> Path | None:
        """Writes the checkpoint ``model_ITERATION.pt`` into the run's folder; returns its path."""
        if self.run_dir is None:
            return None
        return checkpoint.save(self.run_dir / f"model_{self.iteration}.pt", self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: plain containers and tensors."""
        return {
            "iteration": self.iteration,
            "policy": self.policy.state_dict(),
            "learner": self.learner.state_dict(),
            "config": dataclasses.asdict(self.config),
        }

    def _open_run(self) -> None:
        if self.run_dir is None:
            return
        from pydrone.report import RunLog

        self._log = RunLog(self.run_dir, self.config.tensorboard)
        settings = json.dumps(dataclasses.asdict(self.config), indent=2)
        (self.run_dir / "config.json").write_text(settings + "\n", encoding="utf-8")

    def _target_reached(self, episode_length: float) -> bool:
        target = self.config.target_episode_length
        self._lengths.append(episode_length)
        # A mean with a NaN in it, before the first episode has ended, is below every target.
        return target is not None and len(self._lengths) == WINDOW and sum(self._lengths) / WINDOW >= target


def progress_line(figures: dict[str, float], iterations: int, seconds_left: float) -> str:
    """One iteration in a line: the reward of an episode, its length, speed, seconds by stage, time left."""
    number = f"{int(figures['iteration']):>{len(str(iterations))}}/{iterations}"
    stages = " ".join(f"{stage} {figures[f'time/{stage}']:.2f}" for stage in STAGES)
    minutes, seconds = divmod(round(seconds_left), 60)
    return (
        f"{number}  reward {figures['episode_return']:8.3f}  length {figures['episode_length']:7.1f}  "
        f"{figures['steps_per_second']:10,.0f} steps/s  {stages} s  left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )


class _Interrupt:
    """Ctrl-C sets ``raised``; a second one interrupts at once. Signals reach the main thread only."""

    def __init__(self) -> None:
        self.raised = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
