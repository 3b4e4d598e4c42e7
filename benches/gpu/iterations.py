"""Whole iterations: storage, GAE and minibatches of one, and trainings on the pure-torch quadrotor."""

from __future__ import annotations

import statistics
import time
from functools import partial

from peers import by_hand, ours, rsl_rl
from workload import GAMMA, LAM, NUM_EPOCHS, NUM_MINIBATCHES, Rollout, Truth

from . import others
from .clock import Clock, Run, in_a_line
from .operations import whole_call

BY_HAND = "torch, step by step"


def storage(rollout: Rollout, truth: Truth, backends: list[str], clock: Clock) -> list[dict]:
    """T appends, GAE and all epochs of minibatches: each backend of ours, what it replaces, and rsl_rl's."""

    def measure(prepare) -> dict:
        return whole_call(prepare(rollout), truth, clock, 1)

    found = [_ours(rollout, truth, backend, clock) for backend in backends]
    found.append(others.row("iteration", BY_HAND, measure, by_hand.iteration))
    return [*found, others.row("iteration", "rsl_rl", measure, partial(rsl_rl.iteration, laps=False))]


def _ours(rollout: Rollout, truth: Truth, backend: str, clock: Clock) -> dict:
    """Eager, and as a CUDA graph."""
    buf, steps = ours.buffer(rollout, backend=backend), [rollout.step(t) for t in range(rollout.num_steps)]

    def learnt_from() -> None:
        for step in steps:
            buf.append(**step)
        buf.compute_gae(rollout.last_values, GAMMA, LAM)
        for _ in buf.minibatches(NUM_MINIBATCHES, NUM_EPOCHS, reuse=True):
            pass

    def run() -> None:
        learnt_from()
        buf.clear()

    learnt_from()
    truth.check(ours.scanned(buf))
    buf.clear()
    row = {"what": "iteration", "backend": backend, "launches": clock.count(run), **clock.host_calls(run)}
    row["eager_us"] = 1e6 * clock.calls(run, 3)
    if clock.cuda:
        replay = clock.captured(run)

        def once() -> None:
            buf.advance(rollout.num_steps, rollouts=1)
            replay()

        row["graph_us"] = 1e6 * clock.calls(once, 3)
        buf.check()
    return row


def trainings(clock: Clock, num_envs: int, num_steps: int) -> list[dict]:
    """A whole iteration on the quadrotor: pydrone's trainer, rsl_rl's, and pydrone's as one graph, in turn.

    What fails is a row that says so; the captured one comes last, since a failed capture can leave CUDA unusable.
    """
    rows, runs = [], {}
    for backend, make_run in (
        ("pydrone", partial(_pydrone_training, clock, num_envs, num_steps, False)),
        ("rsl_rl", partial(_rsl_rl_training, clock, num_envs, num_steps)),
        ("pydrone, captured", partial(_pydrone_training, clock, num_envs, num_steps, True)),
    ):
        rows.append(row := {"what": "training iteration", "backend": backend})
        try:
            run = make_run()
            for _ in range(3):  # a captured one is captured in the second
                run()
            row |= {"launches": clock.count(run), **clock.host_calls(run)}
        except Exception as error:
            known = isinstance(error, ImportError) or (isinstance(error, ValueError) and not clock.cuda)
            row["absent" if known else "failed"] = in_a_line(error)
        else:
            runs[backend] = row, run
    seconds: dict[str, list[float]] = {backend: [] for backend in runs}
    try:
        for _ in range(min(clock.repeats, 10)):
            for backend, (row, run) in runs.items():
                clock.wait()
                start = time.perf_counter()
                figures = run()
                clock.wait()
                seconds[backend].append(time.perf_counter() - start)
                if figures:  # the last ones' stay
                    row["stages_us"] = {name: 1e6 * x for name, x in figures.items() if name.startswith("time/")}
    except Exception as error:
        row["failed"] = in_a_line(error)
    for backend, (row, _) in runs.items():
        if seconds[backend]:
            row["eager_us"] = 1e6 * statistics.median(seconds[backend])
            if seconds.get("rsl_rl"):
                row["of_rsl_rl"] = row["eager_us"] / (1e6 * statistics.median(seconds["rsl_rl"]))
    return rows


def _pydrone_training(clock: Clock, num_envs: int, num_steps: int, capture: bool) -> Run:
    from pydrone.envs.quadrotor import Quadrotor
    from pydrone.ppo.config import TrainConfig
    from pydrone.ppo.trainer import Trainer

    config = TrainConfig(num_envs=num_envs, num_steps=num_steps, capture=capture)
    return Trainer(Quadrotor(num_envs, clock.device), config, echo=lambda line: None).iterate


def _rsl_rl_training(clock: Clock, num_envs: int, num_steps: int) -> Run:
    """Its own runner with TrainConfig's settings, as benches/peers/train.py has them, without the waits of its laps."""
    import contextlib
    import io

    from peers.train import Setting, _runner_config
    from rsl_rl.runners import OnPolicyRunner
    from workload import Size

    from pydrone.envs.quadrotor import Quadrotor
    from pydrone.integrations.rsl_rl_env import VecEnvWrapper

    config = _runner_config(Setting(Size(num_envs, num_steps), clock.device))
    with contextlib.redirect_stdout(io.StringIO()):
        env = VecEnvWrapper(Quadrotor(num_envs, clock.device))
        runner = OnPolicyRunner(env, config, log_dir=None, device=clock.device)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(1)

    return run
