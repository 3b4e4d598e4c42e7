"""A training from the first iteration, or a checkpoint, to the last: when it ends, what it reports, what it saves."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pydrone.envs.base import Env
from pydrone.ops import native
from pydrone.ppo.config import TrainConfig
from pydrone.ppo.distributed import Ranks
from pydrone.ppo.learner.networks import lacks_bf16
from pydrone.ppo.training import checkpoint, graphs
from pydrone.ppo.training.figures import WINDOW
from pydrone.ppo.training.graphs import Graph, UpdateGraph
from pydrone.ppo.training.interrupt import Interrupt
from pydrone.ppo.training.iteration import Iteration
from pydrone.ppo.training.meters import REPLAY, STAGES, Stopwatch, since_process_start, stages_of
from pydrone.ppo.training.progress import progress_of, restore
from pydrone.ppo.training.run_log import RunLog, open_run

# What a checkpoint must hold, see Trainer.state_dict.
CHECKPOINT_KEYS = ("iteration", "policy", "learner", "config")


class Outcome(NamedTuple):
    """How a training ended."""

    reason: str  # in words
    iterations: int  # done in all
    figures: dict[str, float]  # of the last one
    checkpoint: Path | None


class NotFinite(FloatingPointError):
    """An iteration's loss is not finite, or what it is computed from; ``figures`` are the iteration's."""

    def __init__(self, message: str, figures: dict[str, float]) -> None:
        super().__init__(message)
        self.figures = figures


class Trainer(Iteration):
    """Trains a policy on an environment.

    Args:
        env: has a continuous action of so many dimensions (``env.actions`` an int), or a discrete one
            (``((), torch.int64)``) and ``num_discrete_actions``.
        config: its ``env``, ``num_envs`` and ``device`` are not read: ``env`` decides them, and what is recorded of it.
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
        #: why a capture was not possible, in a line for the log
        self._not_captured: str | None = None
        self._graph = self._captured()
        self._watch = Stopwatch(self.device, (REPLAY,) if self._graph is not None else STAGES)
        self._log: RunLog | None = None
        # The signals of the run, and whether any rank had been asked to stop when the last figures were read.
        self._interrupt: Interrupt | None = None
        self._asked_to_stop = False
        # What a resumed run could not take over, and what it changes.
        self._of_resuming = [] if state is None else restore(self, state)

    def _captured(self) -> Graph | None:
        """The graph that computes iterations, if they can be captured. If only the update can be, makes its graph."""
        if self.config.capture is False:
            return None
        reason = graphs.why_not(self)
        if reason is not None and self.config.capture == "auto":
            if self.device.type == "cuda":
                self._not_captured = f"Not captured as a CUDA graph: {reason}."
            if graphs.why_not_update(self) is None:
                self._not_captured = f"Only the update is captured as a CUDA graph: {reason}."
                self.update_graph = UpdateGraph(self.learner, self.device)
            return None
        return Graph(self)

    def train(self) -> Outcome:
        """Iterates until the last iteration, the target, or a SIGINT or SIGTERM; a signal lets the iteration finish.

        Where an iteration fails, the state after the last complete one is saved before the error is raised; not where
        the loss is not finite. With no iteration left to do, nothing is written.

        Raises:
            NotStorable: a checkpoint cannot hold the environment's ``state_dict()``. A TypeError; before the first
                iteration.
        """
        config = self.config
        done = f"all {config.iterations} iterations are done"
        if self.iteration >= config.iterations:
            self.echo(nothing_to_do(self.iteration, config.iterations))
            return Outcome(done, self.iteration, {}, None)
        if self.run_dir is not None:
            self._log = open_run(self.run_dir, self.recorded, self.iteration)
        for line in self._of_resuming:
            self.echo(line)
        if self._not_captured is not None:
            self.echo(self._not_captured)
        learner = self.learner
        # A missing library is reported with the buffer already.
        known = self.device.type == "cpu" and native.CPU_MISSING is not None
        if self.config.ppo.learner != "torch" and learner.not_fused is not None and not known:
            part = "Gradients" if learner.fused_loss is None else "The networks' gradients"
            self.echo(f"{part} by autograd: {learner.not_fused}.")
        if self.config.ppo.matmul == "bfloat16" and self.device.type == "cpu" and lacks_bf16():
            self.echo(
                "matmul: this processor has no AVX512_BF16. Where products in bfloat16 are emulated, an update takes "
                "many times as long as in float32."
            )
        try:
            with Interrupt(self.echo) as interrupt:
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

    def iterate(self) -> dict[str, float]:
        """Does one iteration and returns its figures.

        The host waits for the device once, at the end, for figures, the environment's log and the buffer's flags.

        Raises:
            NotFinite: the loss is not, or observations, rewards, values or advantages are not. A FloatingPointError.
        """
        began, room = time.perf_counter(), self.buffer.layout.final_obs_rows
        if self.observations is None:
            self.start()
        self.learner.set_progress(self.iteration / self.config.iterations)
        computing = self._graph or self
        self._watch.start()
        computed = computing.compute(self._watch.lap)
        asked = self._interrupt is not None and self._interrupt.raised
        figures, culprit, self._asked_to_stop, final_obs = self.figures.read(computed, asked)
        computing.clear()
        self._keep_room(final_obs, room)
        self.iteration += 1
        self.before_update = None
        seconds = time.perf_counter() - began
        figures |= {f"time/{stage}": lap for stage, lap in self._watch.seconds().items()}
        figures["iteration"] = self.iteration
        figures["steps_per_second"] = self.ranks.world_size * self.buffer.num_envs * self.buffer.num_steps / seconds
        figures["time/iteration"] = seconds
        figures["time/process"] = since_process_start()
        if culprit is not None:
            losses = figures["surrogate_loss"], figures["value_loss"]
            if not all(map(math.isfinite, losses)):
                culprit = "the loss is not finite (surrogate {}, value {}): {}".format(*losses, culprit)
            raise NotFinite(f"iteration {self.iteration}: {culprit}", figures)
        return figures

    def _keep_room(self, used: int, room: int) -> None:
        """Makes room for as many final observations as a rollout has used, and says so where it was ``room``."""
        if used <= room:
            return
        approximated = used - self.buffer.layout.final_obs_rows
        if approximated > 0:
            self.grow_final_obs(used)
            if self._graph is not None:
                self._graph.forget()
        now = self.buffer.layout.final_obs_rows
        line = f"{used} truncations in a rollout, expected at most {room}: room for {now} final observations now"
        if approximated > 0:
            line += f"; {approximated} truncations were bootstrapped with the value before them (stored_value)"
        self.echo(f"{line}.")

    def _iterate_all(self, interrupt: Interrupt) -> tuple[str | None, dict[str, float]]:
        """Why it ended before the last iteration, or None, and the last figures."""
        config, times = self.config, deque(maxlen=WINDOW)
        figures: dict[str, float] = {}
        if self.run_dir is not None or self.ranks.rank:
            # What no checkpoint can hold is an error now, not after hours.
            if self.observations is None:
                self.start()
            checkpoint.check({**self.learnt(), "progress": progress_of(self)})
        while self.iteration < config.iterations:
            try:
                figures = self.iterate()
            except NotFinite as error:
                self._report(error.figures, times)
                raise
            self._report(figures, times)
            if self._target_reached():
                return f"the mean episode length reached {config.target_episode_length:g} steps", figures
            # Several ranks all stop after the iteration whose message says so.
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
        """Goes on where the disk is full: it may have room for the next checkpoint."""
        try:
            self.save()
        except OSError as error:
            self.echo(f"Checkpoint of iteration {self.iteration} not saved, going on: {error}")

    def _save_after_failure(self) -> None:
        """Saves what this run has learnt, if its weights are finite. Fails silently."""
        # The device, the disk or the output may have failed too: the first error is the one to see.
        with contextlib.suppress(Exception):
            state = self.before_update or self.learnt()
            if state["iteration"] > self._first and all(x.isfinite().all() for x in state["policy"].values()):
                saved = self._save(state)
                if saved is not None:
                    self.echo(f"Failed in iteration {state['iteration'] + 1}. Checkpoint of the one before: {saved}")

    def save(self) -> Path | None:
        """Writes the checkpoint ``model_ITERATION.pt`` into the run's folder and returns its path."""
        state = self.state_dict()
        try:
            return self._save(state)
        finally:
            self.ranks.gather_objects(None)  # no rank goes on before the file is written, or the disk is full

    def _save(self, state: dict[str, Any]) -> Path | None:
        if self.run_dir is None:
            return None
        path = self.run_dir / f"model_{state['iteration']}.pt"
        try:
            return checkpoint.save(path, state)
        except checkpoint.NotStorable as error:
            # Looked at before the first iteration, but the environment's state may have changed since.
            learnt = {name: x for name, x in state.items() if name not in ("progress", "others")}
            if len(learnt) == len(state):
                raise
            self.echo(f"Checkpoint of iteration {state['iteration']} without the environment's state: {error}")
            return checkpoint.save(path, learnt)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, between iterations: plain containers and tensors, not copied.

        Every rank must call it, as it must :meth:`save`. The first rank's is the checkpoint, with all ranks' progress.
        """
        first, *others = self.ranks.to_first(progress_of(self))
        return {**self.learnt(), "progress": first, **({"others": others} if others else {})}

    def _target_reached(self) -> bool:
        target, lengths = self.config.target_episode_length, self.figures.episode_lengths
        # Before the first episode has ended, the mean is NaN, which is below every target.
        return target is not None and len(lengths) == WINDOW and sum(lengths) / WINDOW >= target


def progress_line(figures: dict[str, float], iterations: int, seconds_left: float) -> str:
    """One iteration in a line: reward and length of an episode, speed, seconds per stage, time left."""
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
    """The message where the checkpoint has done all iterations."""
    return f"Nothing to do: the checkpoint stands at iteration {iteration} of {iterations}."
