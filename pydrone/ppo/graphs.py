"""A rollout and an update as CUDA graphs: hundreds of launches become two, and the host has nothing to do in between.

The first of each runs as ever, on a side stream: it loads kernels, and makes what the optimiser and the libraries keep.
Before the second, the same Python code is captured; it and all later ones are replays, of the same operations on the
same memory. What changes from one to the next is on the device: the ring's counters, which key the shuffle too, the
generators' offsets, the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from pydrone.envs.base import LogMeter

if TYPE_CHECKING:
    from pydrone.ppo.trainer import Trainer

R = TypeVar("R")


def why_not(trainer: Trainer) -> str | None:
    """Why a training cannot be captured, or None."""
    env, ppo = trainer.env, trainer.config.ppo
    if trainer.device.type != "cuda":
        return f"it needs a CUDA device, the environment is on {trainer.device.type}"
    if not getattr(env, "capturable", False):
        return f"{type(env).__name__} does not say that its steps can be captured (capturable = True)"
    if env.autoreset != "same_step":
        return f"minibatches without reset steps have sizes that the host must know, autoreset is {env.autoreset!r}"
    if trainer.policy.recurrent:
        return "the policy is recurrent, and its sequences have sizes that the host must know"
    if ppo.max_kl is not None:
        return "with max_kl the host looks at every minibatch"
    if ppo.autocast:
        return "autocast in a graph has not been tried"
    if trainer.ranks.several:
        return "the messages of several processes in a graph have not been tried"
    return None


class Captured(Generic[R]):
    """``run`` without arguments, whose tensors stay where they are: run once, then captured, then replayed.

    Args:
        run: launches what it does on the current stream and waits for nothing.
        generators: those it draws from besides torch's own.
        before: called before each replay and not captured.
    """

    def __init__(self, run: Callable[[], R], generators: list[torch.Generator], before: Callable[[], None]) -> None:
        self._run, self._generators, self._before = run, generators, before
        self._warm = False
        self._replay: Callable[[], None] | None = None
        self._result: R

    def __call__(self) -> R:
        """Does what ``run`` does. The result's tensors are written over by the next replay."""
        if not self._warm:
            self._warm = True
            return aside(self._run)
        if self._replay is None:
            self._replay, self._result = capture(self._run, self._generators)
        self._before()
        self._replay()
        return self._result


def aside(run: Callable[[], R]) -> R:
    """Runs on a side stream, as PyTorch wants it of what is captured later; the current one waits for it."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = run()
    current.wait_stream(stream)
    return result


def capture(run: Callable[[], R], generators: list[torch.Generator]) -> tuple[Callable[[], None], R]:
    """How to replay it, and what ``run`` returned; nothing has been computed yet."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # relaxed: kernels that follow the device's counters are loaded here.
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        result = run()
    return graph.replay, result


class Graphs:
    """The rollout and the update of a trainer, in place of its own; the rest of an iteration stays as it is.

    Raises ValueError, with the reason, where a training cannot be captured.
    """

    def __init__(self, trainer: Trainer) -> None:
        reason = why_not(trainer)
        if reason is not None:
            raise ValueError(f"capture: expected False here: {reason}")
        self._trainer = trainer
        self._log: LogMeter | None = None
        generator = getattr(trainer.env, "generator", None)
        steps = trainer.config.num_steps
        self._rollout = Captured(
            self._collect, [] if generator is None else [generator], lambda: trainer.buffer.advance(steps)
        )
        self._update = Captured(self._learn, [], lambda: None)

    def collect(self) -> tuple[Tensor, dict[str, Any]]:
        """As the trainer's; its stopwatch counts all of it as the environment's."""
        trainer = self._trainer
        result = self._rollout()
        trainer._env_log = self._log.copy()
        trainer._watch.lap("env")
        return result

    def update(self) -> dict[str, Tensor]:
        """As the learner's."""
        return self._update()

    def _collect(self) -> tuple[Tensor, dict[str, Any]]:
        trainer = self._trainer
        watch, before = trainer._watch, trainer._obs
        trainer._watch, trainer._env_log = _Stopped(), LogMeter()
        try:
            result = trainer.collect()
        finally:
            trainer._watch, self._log = watch, trainer._env_log
        if places(before) != places(trainer._obs):
            raise RuntimeError(
                "capture: expected an environment that writes its observations to the same memory in reset() and step()"
            )
        return result

    def _learn(self) -> dict[str, Tensor]:
        learner = self._trainer.learner
        for group in learner.optimizer.param_groups:
            group["capturable"] = learner.learning_rate.is_cuda
        return learner.update(self._trainer.buffer)


class _Stopped:
    """A stopwatch that does not run: events recorded in a graph have no time of their own."""

    def lap(self, stage: str) -> None:
        pass


def places(obs: Tensor | dict[str, Tensor]) -> list[int]:
    """Where observations lie."""
    return [x.data_ptr() for x in (obs.values() if isinstance(obs, dict) else [obs])]
