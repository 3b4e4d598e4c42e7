"""A training iteration as one CUDA graph: thousands of launches become one, and the host has nothing to do in between.

The first iteration runs as ever, on a side stream: it loads the kernels, and makes what the optimiser and the libraries
keep. Before the second, the same Python code is captured; it and all later ones are replays, of the same operations on
the same memory. What changes from one to the next is on the device: the ring's counters, which key the shuffle too, the
generators' offsets, the learning rate, running statistics and episodes.

Python runs once then, at the capture. What it would have counted and remembered is done here, beside the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pydrone.envs.base import LogMeter
from pydrone.ppo.training.meters import REPLAY, Stopwatch

if TYPE_CHECKING:
    from pydrone.ppo.trainer import Trainer
    from pydrone.ppo.training.iteration import Computed


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


class Graph:
    """A trainer's iteration, but for the reading of its figures, in place of the trainer's own ``compute``.

    Raises ValueError, with the reason, where a training cannot be captured.
    """

    def __init__(self, trainer: Trainer) -> None:
        reason = why_not(trainer)
        if reason is not None:
            raise ValueError(f"capture: expected False here: {reason}")
        self._trainer = trainer
        trainer._watch = Stopwatch(trainer.device, (REPLAY,))
        generator = getattr(trainer.env, "generator", None)
        self._generators = [] if generator is None else [generator]
        self._stream, self._warm = side_stream(trainer.device), False
        self._replay: Callable[[], None] | None = None
        # What the captured code left in Python: its result, the sums of the log, the state before the update.
        self._computed: Computed
        self._log: LogMeter
        self._before_update: dict[str, Any]

    def compute(self) -> Computed:
        """As the trainer's; :meth:`clear` is to follow. The next call writes over its tensors."""
        trainer = self._trainer
        trainer.buffer.advance(trainer.config.num_steps)  # what the appends would count on the host
        if self._warm and self._replay is None:
            self._capture()
        if self._replay is None:
            aside(self._compute, self._stream)
            self._warm = True
        else:
            self._replay()
        trainer._env_log = self._log.copy()
        trainer._before_update = {**self._before_update, "iteration": trainer.iteration}
        trainer._watch.lap(REPLAY)
        return self._computed

    def clear(self) -> None:
        """Discards the rollout on the host: on the device it is, and its numbers stay until the next one's."""
        self._trainer.buffer.advance(0, rollouts=1)

    def _compute(self) -> None:
        trainer = self._trainer
        watch, trainer._watch, trainer._env_log = trainer._watch, _Stopped(), LogMeter()
        try:
            # With the device's counters the first time too: the kernels are those of the capture.
            with trainer.buffer.as_captured():
                self._computed = trainer.compute()
                trainer.buffer.clear()
        finally:
            trainer._watch = watch
        self._log, self._before_update = trainer._env_log, trainer._before_update

    def _capture(self) -> None:
        trainer, before = self._trainer, places(self._trainer._obs)
        groups = trainer.learner.optimizer.param_groups
        try:
            for group in groups:
                group["capturable"] = trainer.learner.learning_rate.is_cuda
            replay = capture(self._compute, self._generators, self._stream)
        finally:
            trainer._before_update = None  # nothing has been computed yet
            for group in groups:
                group["capturable"] = False  # Adam warns where it is set, and nothing is captured
        if before != places(trainer._obs):
            raise RuntimeError(
                "capture: expected an environment that writes its observations to the same memory in every step()"
            )
        self._replay = replay


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the first run and of the capture: what libraries and autograd keep for a stream is there then."""
    return torch.cuda.Stream(device)


def aside(run: Callable[[], None], stream: torch.cuda.Stream) -> None:
    """Runs on a side stream, as PyTorch wants it of what is captured later; the current one waits for it."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)


def capture(
    run: Callable[[], None], generators: Sequence[torch.Generator], stream: torch.cuda.Stream
) -> Callable[[], None]:
    """How to replay it; nothing has been computed yet."""
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # relaxed: what a library loads or allocates only now is no mistake.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        run()
    return graph.replay


class _Stopped:
    """A stopwatch that does not run: events recorded in a graph have no time of their own."""

    def lap(self, stage: str) -> None:
        pass


def places(obs: Tensor | dict[str, Tensor]) -> list[int]:
    """Where observations lie."""
    return [x.data_ptr() for x in (obs.values() if isinstance(obs, dict) else [obs])]
