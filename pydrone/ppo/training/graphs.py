"""A training iteration as one CUDA graph: one launch instead of thousands, with nothing for the host to do in between.

The first iteration runs eagerly on a side stream: it loads the kernels and makes the optimiser's and the libraries'
state. Before the second the same Python code is captured; the second and all later ones are replays of the same
operations on the same memory. What changes between them is on the device: the ring's counters, which also key the
shuffle, the generators' offsets, the learning rate, running statistics and episodes.

Python runs only at the capture. What it would count and remember in later iterations is done here, beside the replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pydrone.envs.base import autoreset_mode
from pydrone.ppo.training.figures import Computed
from pydrone.ppo.training.iteration import Iteration, Lap
from pydrone.ppo.training.meters import REPLAY


def why_not(iteration: Iteration) -> str | None:
    """Why a training cannot be captured, or None."""
    env, ppo = iteration.env, iteration.config.ppo
    if iteration.device.type != "cuda":
        return f"it needs a CUDA device, the environment is on {iteration.device.type}"
    if not getattr(env, "capturable", False):
        return f"{type(env).__name__} does not say that its steps can be captured (capturable = True)"
    if (mode := autoreset_mode(env.autoreset)) != "same_step":
        return f"minibatches without reset steps have sizes that the host must know, autoreset is {mode!r}"
    if iteration.policy.recurrent:
        return "the policy is recurrent, and its sequences have sizes that the host must know"
    if ppo.max_kl is not None:
        return "with max_kl the host looks at every minibatch"
    if ppo.matmul == "bfloat16":
        return "autocast in a graph has not been tried"
    if iteration.ranks.several:
        return "the messages of several processes in a graph have not been tried"
    return None


class Graph:
    """Computes an iteration by a CUDA graph, in place of :meth:`Iteration.compute` and :meth:`Iteration.clear`.

    Raises ValueError, with the reason, where a training cannot be captured.
    """

    def __init__(self, iteration: Iteration) -> None:
        reason = why_not(iteration)
        if reason is not None:
            raise ValueError(f"capture: expected False here: {reason}")
        self._iteration = iteration
        generator = getattr(iteration.env, "generator", None)
        self._generators = [] if generator is None else [generator]
        self._stream, self._warm = side_stream(iteration.device), False
        self._replay: Callable[[], None] | None = None
        # What the captured code left in Python: its result, and the state before the update.
        self._computed: Computed
        self._before_update: dict[str, Any]

    def compute(self, lap: Lap) -> Computed:
        """As the iteration's; :meth:`clear` must follow. The next call overwrites its tensors."""
        iteration = self._iteration
        iteration.buffer.advance(iteration.config.num_steps)  # the host's count of the appends
        if self._warm and self._replay is None:
            self._capture()
        if self._replay is None:
            aside(self._compute, self._stream)
            self._warm = True
        else:
            self._replay()
        iteration.before_update = {**self._before_update, "iteration": iteration.iteration}
        lap(REPLAY)
        return self._computed

    def forget(self) -> None:
        """Has the next iteration capture anew, because a tensor has moved."""
        self._replay = None

    def clear(self) -> None:
        """Discards the rollout on the host. The graph has done so on the device, where the data stays for a while."""
        self._iteration.buffer.advance(0, rollouts=1)

    def _compute(self) -> None:
        iteration = self._iteration
        # The first run counts on the device too, so that it loads the kernels that the capture launches.
        with iteration.buffer.as_captured():
            self._computed = iteration.compute()
            iteration.buffer.clear()
        self._before_update = iteration.before_update

    def _capture(self) -> None:
        iteration, before = self._iteration, places(self._iteration.observations)
        learner = iteration.learner
        groups = learner.optimizer.param_groups
        try:
            for group in groups:
                group["capturable"] = learner.learning_rate.is_cuda
            replay = capture(self._compute, self._generators, self._stream)
        finally:
            iteration.before_update = None  # nothing has been computed yet
            for group in groups:
                group["capturable"] = False  # outside a capture Adam warns of it
        if before != places(iteration.observations):
            raise RuntimeError(
                "capture: expected an environment that writes its observations to the same memory in every step()"
            )
        self._replay = replay


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of the first run and of the capture: libraries and autograd keep state for each stream."""
    return torch.cuda.Stream(device)


def aside(run: Callable[[], None], stream: torch.cuda.Stream) -> None:
    """Runs on a side stream, as PyTorch requires before a capture; the current stream waits for it."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        run()
    current.wait_stream(stream)


def capture(
    run: Callable[[], None], generators: Sequence[torch.Generator], stream: torch.cuda.Stream
) -> Callable[[], None]:
    """Captures ``run`` and returns its replay. Nothing is computed yet."""
    torch.cuda.synchronize(stream.device)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # relaxed: a library may still load or allocate.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
        run()
    return graph.replay


def places(obs: Tensor | dict[str, Tensor]) -> list[int]:
    """The addresses of observations."""
    return [x.data_ptr() for x in (obs.values() if isinstance(obs, dict) else [obs])]
