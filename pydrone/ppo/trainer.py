"""A training, from the first iteration or a checkpoint to the last: what ends it, what a person sees, what is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

from pydrone.envs.base import Env
from pydrone.ops import native
from pydrone.ppo import configfile
from pydrone.ppo.config import TrainConfig
from pydrone.ppo.distributed import Ranks
from pydrone.ppo.training import checkpoint
from pydrone.ppo.training.iteration import Iteration, NotFinite
from pydrone.ppo.training.meters import stages_of

# What a checkpoint holds, see Trainer.state_dict.
CHECKPOINT_KEYS = ("iteration", "policy", "learner", "config")

# `target_episode_length` looks at the mean over this many iterations.
WINDOW = 10


class Outcome(NamedTuple):
    """How a training ended."""

    reason: str  # in words
    iterations: int  # done in all
    figures: dict[str, float]  # of the last one
    checkpoint: Path | None


class Trainer(Iteration):
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
        config, ranks = config or TrainConfig(), Ranks.found() if ranks is None else ranks
        if ranks.rank:
            run_dir, echo, show = None, lambda line: None, None
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.echo, self.show = echo, show
        state = None if config.resume is None else read_checkpoint(config.resume, env.device)
        self._first = 0 if state is None else state["iteration"]
        super().__init__(env, config, ranks, self._first)
        self._lengths: deque[float] = deque(maxlen=WINDOW)
        self._log: Any = None
        # What a resumed run could not take over, in words.
        self._not_restored = None
        if state is not None:
            self._restore(state)
            self._not_restored = self._restore_progress(state)

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
        from pydrone.ppo.training.run_log import CONFIG, RunLog

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
    """The checkpoint of a training, see :meth:`Trainer.state_dict`; raises as ``checkpoint.load``."""
    state = checkpoint.load(path, device, CHECKPOINT_KEYS)
    if type(state["iteration"]) is not int or state["iteration"] < 0:
        raise ValueError(f"{path}: iteration: expected an int of at least 0, got {state['iteration']!r}")
    settings = state["config"]
    if not (isinstance(settings, Mapping) and isinstance(settings.get("env"), str) and "ppo" in settings):
        raise ValueError(f"{path}: config: expected the settings of a training, got {type(settings).__name__}")
    return state


def nothing_to_do(iteration: int, iterations: int) -> str:
    """What is said instead of a training whose checkpoint stands at its end."""
    return f"Nothing to do: the checkpoint stands at iteration {iteration} of {iterations}."


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
