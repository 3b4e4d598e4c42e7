"""How a comparison is measured: outputs first, then every contender in turn, round after round, in one process.

* **Checked.** A contender runs once and its outputs are compared with the float64 truth. A wrong one is not timed.
* **Interleaved.** In every round each contender has its turn, so that other load on the machine affects all of them
  alike. Slow ones sit out some rounds. Ratios are of medians within one comparison.
* The clock defines what a turn measures: clock.py on a CPU, clock_cuda.py on a GPU.
* **Launches** are counted in an untimed run: on a CPU the operations that PyTorch dispatches to a kernel (without views
  and bare allocations; NumPy and compiled code are not seen), on a GPU the profiler's kernels, copies and fills.
"""

from __future__ import annotations

import gc
import statistics
import time

from clock import Clock, Turn
from measurement import Absent, Comparison, Contender, Result, Run, in_a_line

MIN_TURNS, MAX_TURNS = 3, 60
SLOW = 1.0  # seconds: for slower calls, two turns are enough


class Harness:
    """Measures comparisons with one clock. ``budget``: seconds for the timed turns of each comparison."""

    def __init__(self, clock: Clock, budget: float = 3.0) -> None:
        self.clock, self.budget = clock, budget

    def compare(
        self,
        operation: str,
        rollout,
        truth,
        contenders: list[Contender],
        figures: tuple[str, ...] = ("hot", "cold"),
        budget: float | None = None,
        per: int = 1,
    ) -> Comparison:
        """Prepares, checks, counts and times ``contenders`` on copies of ``rollout``."""
        size, clock = rollout.size, self.clock
        results = {c.name: Result(c.name, c.against, c.useful_bytes * size.samples) for c in contenders}
        comparison = Comparison(operation, str(size), size.num_envs, size.num_steps, results, clock.kind, per)
        try:
            plan = clock.plan(contenders, rollout, figures)
        except Absent as reason:
            for result in results.values():
                result.absent = str(reason)
            return comparison
        comparison.cold, comparison.hot = plan.text, plan.hot
        figures = tuple(figure for figure in figures if figure != "hot" or not plan.hot)
        inputs = [rollout, *(rollout.clone() for _ in range(plan.inputs - 1))]
        ready: list[tuple[Contender, list[Run]]] = []
        for i, contender in enumerate(contenders):
            result = results[contender.name]
            try:
                runs = [contender.prepare(inputs[i % len(inputs)])]
                self._check(runs[0], truth, result)
                if runs[0].kernels is None:
                    # Consecutive contenders use consecutive copies of the input, and the rounds continue the sequence.
                    others = [(i + k * len(contenders)) % len(inputs) for k in range(1, plan.sets)]
                    runs += [contender.prepare(inputs[k]) for k in others]
                ready.append((contender, runs))
            except Absent as reason:
                result.absent = str(reason)
            except AssertionError as error:
                result.wrong = str(error) or "an assertion failed"
            except Exception as error:  # a peer's, of any kind
                result.failed = in_a_line(error)
        clock.wait()
        for figure in figures:
            self._rounds(ready, results, figure, (budget or self.budget) / len(figures), per)
        for contender, runs in ready:
            self._shares(runs, results[contender.name])
        ready.clear()
        gc.collect()
        return comparison

    def _check(self, run: Run, truth, result: Result) -> None:
        start = time.perf_counter()
        result.counts = self.clock.count(run)
        self.clock.wait()
        if self.clock.kind == "cpu":  # on a GPU the profiler was running
            result.first_seconds = time.perf_counter() - start
        truth.check(run.outputs())
        if run.kernels is not None:
            run.kernels.check(truth)

    def _shares(self, runs: list[Run], result: Result) -> None:
        """Takes over the times that the calls report themselves."""
        laps = [lap for run in runs for lap in run.laps or ()]
        seconds = result.seconds.get("cold") or result.seconds.get("hot")
        if laps and seconds:
            result.share = statistics.median(laps) / statistics.median(seconds)
        if runs[0].stages is not None:
            result.stages = runs[0].stages()

    def _estimate(self, turn: Turn, first: float) -> float:
        """Seconds of a turn, to plan with; for a slow contender, those of its first call."""
        if first > SLOW:
            return first
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            turn(0)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def _rounds(
        self,
        ready: list[tuple[Contender, list[Run]]],
        results: dict[str, Result],
        figure: str,
        budget: float,
        per: int,
    ) -> None:
        turns: dict[str, Turn] = {}
        estimates: dict[str, float] = {}

        def attempt(name: str, action) -> None:  # type: ignore[no-untyped-def]
            try:
                action()
            except Absent:
                turns.pop(name, None)  # only this figure is missing
            except Exception as error:
                turns.pop(name, None)
                results[name].failed = f"{figure}: {in_a_line(error)}"

        def prepare(contender: Contender, runs: list[Run]) -> None:
            name, result = contender.name, results[contender.name]
            turns[name] = self.clock.turn(contender, runs, figure, per, result)
            estimates[name] = self._estimate(turns[name], result.first_seconds)
            for run in runs:
                if run.laps is not None:
                    run.laps.clear()

        gc.collect()
        gc.disable()
        try:
            for contender, runs in ready:
                attempt(contender.name, lambda contender=contender, runs=runs: prepare(contender, runs))
            share = budget / max(1, len(turns))
            many = {}
            for name in turns:
                least = MIN_TURNS if estimates[name] < SLOW else 2
                many[name] = int(min(max(share / max(estimates[name], 1e-6), least), MAX_TURNS))
            rounds = max(many.values(), default=0)
            for r in range(rounds):
                for name in list(turns):
                    turn = r * many[name] // rounds
                    if (r + 1) * many[name] // rounds > turn:
                        kept = results[name].seconds.setdefault(figure, [])
                        attempt(name, lambda name=name, turn=turn, kept=kept: kept.append(turns[name](turn)))
        finally:
            gc.enable()
