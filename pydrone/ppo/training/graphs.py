"""A training iteration as one CUDA graph: one launch instead of thousands, with nothing for the host to do in between.

Where the environment cannot be in it, the update alone can be (:class:`UpdateGraph`). The first iteration runs eagerly
on a side stream: it loads the kernels and makes the optimiser's and the libraries' state. Before the second the same
Python code is captured; the second and all later ones are replays of the same operations on the same memory. What
changes between them is on the device: the ring's counters, which also key the shuffle, the generators' offsets, the
learning rate, running statistics and episodes.

Python runs only at the capture. What it would count and remember in later iterations is done here, beside the replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pydrone.buffer import RolloutBuffer
from pydrone.envs.base import autoreset_mode
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.training.figures import Computed
from pydrone.ppo.training.iteration import Iteration, Lap
from pydrone.ppo.training.meters import REPLAY


def why_not(iteration: Iteration) -> str | None:
    """Why a training cannot be captured, or None."""
    env = iteration.env
    if (reason := why_not_update(iteration)) is not None:
        return reason
    if not getattr(env, "capturable", False):
        return f"{type(env).__name__} does not say that its steps can be captured (capturable = True)"
    return None


def why_not_update(iteration: Iteration) -> str | None:
    """Why its update cannot be captured, or None."""
    env, ppo = iteration.env, iteration.config.ppo
    if iteration.device.type != "cuda":
        return f"it needs a CUDA device, the environment is on {iteration.device.type}"
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
        iteration.captured = True
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
            with outside(iteration.env, waiting):
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
        try:
            with capturable(iteration.learner):
                replay = capture(self._compute, self._generators, self._stream, iteration.env)
        finally:
            iteration.before_update = None  # nothing has been computed yet
        if before != places(iteration.observations):
            raise RuntimeError(
                "capture: expected an environment that writes its observations to the same memory in every step()"
            )
        self._replay = replay


class UpdateGraph:
    """The learner's update by a CUDA graph, in place of :meth:`Learner.update`; all before it is launched as usual.

    The graph reads the buffer, which is always at the same place, and the device's counters, which also key the
    shuffle; it draws nothing.
    """

    def __init__(self, learner: Learner, device: torch.device) -> None:
        self._learner, self._stream, self._warm = learner, side_stream(device), False
        self._replay: Callable[[], None] | None = None
        self._figures: dict[str, Tensor]

    def __call__(self, buffer: RolloutBuffer) -> dict[str, Tensor]:
        """As :meth:`Learner.update`; the next call overwrites its tensors."""
        if buffer.valid is not None:  # minibatches without reset steps have sizes that the host must know
            return self._learner.update(buffer)

        def update() -> None:
            with buffer.as_captured():
                self._figures = self._learner.update(buffer)

        buffer.advance(0)  # gives the device the host's counters
        if self._warm and self._replay is None:
            with capturable(self._learner):
                self._replay = capture(update, (), self._stream)
        if self._replay is None:
            aside(update, self._stream)
            self._warm = True
        else:
            self._replay()
        return self._figures


@contextlib.contextmanager
def capturable(learner: Learner) -> Iterator[None]:
    """In it torch's Adam can be captured; outside a capture it warns of that."""
    groups = learner.optimizer.param_groups
    try:
        for group in groups:
            group["capturable"] = learner.learning_rate.is_cuda
        yield
    finally:
        for group in groups:
            group["capturable"] = False


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
    run: Callable[[], None], generators: Sequence[torch.Generator], stream: torch.cuda.Stream, env: Any = None
) -> Callable[[], None]:
    """Captures ``run`` and returns its replay. Nothing is computed yet.

    Where ``env`` gives something to its ``outside``, a graph ends and the next one begins: a replay does it in between.
    """
    torch.cuda.synchronize(stream.device)
    if not hasattr(env, "outside"):
        graph = _graph(generators)
        # relaxed: a library may still load or allocate.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="relaxed"):
            run()
        return graph.replay
    # One pool, since the graphs are replayed in their order, and what one computes the next ones read.
    pool, replays, graphs = torch.cuda.graph_pool_handle(), [], []

    def begin() -> None:
        graphs.append(_graph(generators))
        graphs[-1].capture_begin(pool=pool, capture_error_mode="relaxed")

    def end() -> None:
        graphs[-1].capture_end()
        replays.append(graphs[-1].replay)

    def between(call: Callable[[], None]) -> None:
        end()
        replays.append(call)
        begin()

    with torch.cuda.stream(stream), outside(env, between):
        begin()
        try:
            run()
        finally:
            end()

    def replay() -> None:
        for each in replays:
            each()

    return replay


def _graph(generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    return graph


@contextlib.contextmanager
def outside(env: Any, run: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """In it ``run`` is given what ``env`` keeps out of graphs, if it does."""
    if not hasattr(env, "outside"):
        yield
        return
    env.outside, before = run, env.outside
    try:
        yield
    finally:
        env.outside = before


def waiting(call: Callable[[], None]) -> None:
    """Calls a simulator whose kernels run on a stream that does not wait for a side stream, nor the other way round."""
    torch.cuda.synchronize()
    call()
    torch.cuda.synchronize()


def places(obs: Tensor | dict[str, Tensor]) -> list[int]:
    """The addresses of observations."""
    return [x.data_ptr() for x in (obs.values() if isinstance(obs, dict) else [obs])]
