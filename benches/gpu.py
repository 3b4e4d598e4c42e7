"""Times the operations on a GPU, for the native and the Triton backend, and a whole iteration beside what it replaces.

    python benches/gpu.py --out benches/results

Correctness first, against loops written here. Then, as medians: device time of one launch as a CUDA graph repeats it,
with its data in the L2 cache (hot) and with inputs rotated that are larger than it (cold), and the whole eager call.
A table, and <gpu>.json with commit, versions and command. `make gpu` runs it; `--device cpu --num-envs 64` is a trial.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

GAMMA, LAM = 0.99, 0.95
NUM_MINIBATCHES, NUM_EPOCHS = 4, 5
ROOT = Path(__file__).resolve().parent.parent
FIELDS = ("obs", "actions", "mu", "sigma", "rewards", "values", "log_probs", "dones")

Run = Callable[[], object]


class Clock:
    """Medians, in seconds. On a CPU, where it only tries the code out, launches are called one by one."""

    def __init__(self, device: str, repeats: int) -> None:
        self.cuda, self.repeats = device == "cuda", repeats

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def captured(self, run: Run) -> Run:
        """``run`` as a graph to replay. What a kernel's first launch loads forbids the default capture mode."""
        if not self.cuda:
            return run
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="relaxed"):
            run()
        self.wait()
        return graph.replay

    def launches(self, all_of_them: list[Run], times: int = 1) -> float:
        """Device time of one of ``all_of_them``, launched in turn, ``times`` times over, in one graph."""

        def run() -> None:
            for _ in range(times):
                for launch in all_of_them:
                    launch()

        run()
        replay, seconds = self.captured(run), []
        for _ in range(self.repeats + 3):
            seconds.append(self._one(replay))
        return statistics.median(seconds[3:]) / (times * len(all_of_them))

    def calls(self, run: Run, times: int) -> float:
        """The whole of one call, of ``times`` in a row that nothing waits for but the last."""
        seconds = []
        for _ in range(self.repeats + 2):
            self.wait()
            start = time.perf_counter()
            for _ in range(times):
                run()
            self.wait()
            seconds.append((time.perf_counter() - start) / times)
        return statistics.median(seconds[2:])

    def _one(self, replay: Run) -> float:
        if not self.cuda:
            start = time.perf_counter()
            replay()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def count(self, run: Run) -> int | None:
        """Kernels, copies and fills of one call of ``run``."""
        if not self.cuda:
            return None
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        run()
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            run()
            self.wait()
        # An optimiser's step is marked on the device's time line too; it is none of the launches.
        events = (x for x in recorded.events() if not getattr(x, "is_user_annotation", False))
        return sum(event.device_type == DeviceType.CUDA for event in events)

    def host_calls(self, run: Run) -> dict[str, int]:
        """How often the host launched something (a graph is one), and waited for the device, in one call of ``run``."""
        if not self.cuda:
            return {}
        own, found = self._host_calls(lambda: None), self._host_calls(run)
        return {name: n - own[name] for name, n in found.items()}  # without the profiler's

    def _host_calls(self, run: Run) -> dict[str, int]:
        from torch.profiler import ProfilerActivity, profile

        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            run()
        names = [event.name for event in recorded.events()]
        launch = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
        waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
        return {"host_launches": sum(x.startswith(launch) for x in names), "host_waits": sum(x in waits for x in names)}


class Data:
    """A rollout's inputs, [T, N, ...]; 2 % of the steps end an episode."""

    def __init__(self, num_envs: int, num_steps: int, device: str) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(num_steps, num_envs, *shape, device=device)

        self.num_envs, self.num_steps, self.device = num_envs, num_steps, device
        self.obs, self.actions, self.mu, self.sigma = normal(17), normal(4), normal(4), normal(4).exp()
        self.rewards, self.values, self.log_probs = normal(), normal(), normal()
        self.dones = torch.rand(num_steps, num_envs, device=device) < 0.02
        self.last_values = torch.randn(num_envs, device=device)

    def step(self, t: int) -> dict[str, Tensor]:
        return {name: getattr(self, name)[t] for name in FIELDS}


def gae_loop(rewards: Tensor, values: Tensor, dones: Tensor, last_values: Tensor) -> Tensor:
    """Advantages by the definition, [T, N], in the inputs' dtype."""
    advantages, carry, following = torch.empty_like(values), torch.zeros_like(last_values), last_values
    for t in reversed(range(len(rewards))):
        running = 1.0 - dones[t].to(values.dtype)
        delta = rewards[t] + GAMMA * following * running - values[t]
        carry = delta + GAMMA * LAM * running * carry
        advantages[t], following = carry, values[t]
    return advantages


def check(name: str, ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not off <= bound:
        raise SystemExit(f"{name}: off by {off:.1e} of the largest value, expected at most {bound:.0e}; nothing timed")


def make(data: Data, backend: str | None, capacity: int | None = None):
    from pydrone import RolloutBuffer

    fields = {"mu": 4, "sigma": 4}
    return RolloutBuffer(
        data.num_envs,
        data.num_steps,
        obs=17,
        actions=4,
        fields=fields,
        capacity=capacity,
        final_obs_rows=0,
        device=data.device,
        backend=backend,
    )


def recorded(buf, run: Run) -> list[Run]:
    """The launches of ``run`` on ``buf``, each to be made again with the arguments that it had."""
    kept, ops = [], buf._ops

    def keep(launch: Callable) -> Callable:
        def call(*args) -> None:
            kept.append(partial(launch, *args))
            launch(*args)

        return call

    buf._ops = ops._replace(gae=keep(ops.gae), append=keep(ops.append), gather=keep(ops.gather))
    try:
        run()
    finally:
        buf._ops = ops
    return kept


def fill(buf, data: Data) -> None:
    for t in range(data.num_steps):
        buf.append(**data.step(t))


def verified(data: Data, backend: str):
    """A buffer with a rollout; everything that is timed compared with ``data`` and the loop first."""
    buf = make(data, backend)
    fill(buf, data)
    for name in FIELDS[:-1]:
        if not torch.equal(buf[name] if name not in ("rewards", "values") else getattr(buf, name), turned(data, name)):
            raise SystemExit(f"append, {backend}: {name} is not what was given; nothing timed")
    buf.compute_gae(data.last_values, GAMMA, LAM)
    wide = [getattr(data, name).double() for name in ("rewards", "values")]
    expected = gae_loop(*wide, data.dones, data.last_values.double()).t()
    check(f"gae, {backend}", buf.advantages.double(), expected)
    check(f"returns, {backend}", buf.returns.double(), expected + wide[1].t())
    count, mean, m2 = buf.statistics.tolist()
    normalized = (expected - mean) / math.sqrt(m2 / (count - 1))
    check(f"statistics, {backend}", torch.tensor([mean, m2 / count]), moments(expected), 1e-4)
    drawn = []
    for mb in buf.minibatches(NUM_MINIBATCHES):
        env, t = mb.indices // data.num_steps, mb.indices % data.num_steps
        if not torch.equal(mb.obs, data.obs[t, env]) or not torch.equal(mb["sigma"], data.sigma[t, env]):
            raise SystemExit(f"gather, {backend}: rows are not what was stored; nothing timed")
        check(f"gather, {backend}", mb.advantages.double(), normalized[env, t])
        drawn.append(mb.indices)
    if not torch.equal(torch.cat(drawn).sort().values, torch.arange(data.obs[..., 0].numel(), device=data.device)):
        raise SystemExit(f"gather, {backend}: the permutation is none; nothing timed")
    return buf


def turned(data: Data, name: str) -> Tensor:
    return getattr(data, name).transpose(0, 1)


def moments(x: Tensor) -> Tensor:
    return torch.stack([x.mean(), x.var(unbiased=False)]).float().cpu()


def operations(data: Data, backend: str, clock: Clock, l2: int) -> list[dict]:
    """GAE, append and one minibatch: hot, cold, eager."""
    import pydrone

    buf, n, t = verified(data, backend), data.num_envs, data.num_steps
    rows, samples = [], n * t

    def row(what: str, hot: list[Run], cold: list[Run], eager: Run, moved: int, times: int = 50) -> None:
        found = {"what": what, "backend": backend, "launches": clock.count(eager), "bytes": moved}
        found["hot_us"] = 1e6 * clock.launches(hot, times)
        found["cold_us"] = 1e6 * clock.launches(cold, 4)
        found["eager_us"] = 1e6 * clock.calls(eager, times)
        rows.append(found | {"cold_gb_s": moved / found["cold_us"] / 1e3})

    # rewards, values, advantages, returns: float32; codes: a byte
    nbytes, last = 17 * samples, data.last_values
    sets = min(64, max(2, math.ceil(4 * l2 / nbytes)))
    others = []
    for _ in range(sets):
        other = make(data, backend)
        for name in ("rewards", "values", "dones"):
            other._memory[name].copy_(buf._memory[name])
        other._appended = t
        others += recorded(other, lambda other=other: other.compute_gae(last, GAMMA, LAM))
        others[-1]()
        check(f"gae, {backend}, a second time", other.advantages, buf.advantages)
        # Of the 105 MB of a buffer, what GAE touches is kept.
        other._rows = other._memory["rows"] = None
    eager = partial(buf.compute_gae, last, GAMMA, LAM)
    row("gae", recorded(buf, eager), others, eager, nbytes)

    arguments = [turned(data, name).contiguous() for name in ("rewards", "values", "dones")]
    out = torch.empty_like(arguments[0]), torch.empty_like(arguments[0])
    call = partial(pydrone.gae, *arguments, last, GAMMA, LAM, out=out, backend=backend)
    rows.append({"what": "pydrone.gae(out=)", "backend": backend, "launches": clock.count(call)})
    rows[-1]["eager_us"] = 1e6 * clock.calls(call, 50)

    wide, steps = make(data, backend, capacity=2 * t), [data.step(i) for i in range(t)]
    each = recorded(wide, lambda: fill(wide, data))
    halves = make(data, backend)

    def append() -> None:
        if len(halves) == t:
            halves.clear()
        halves.append(**steps[len(halves)])

    # 124 bytes a row, read and written; two planes of float32 and the codes besides, and their sources
    row("append", each[:1], each, append, n * (2 * 124 + 3 * 4 + 2), times=100)

    def begin_end() -> None:
        step = dict(steps[0])
        late = {name: step.pop(name) for name in ("rewards", "dones")}
        halves.clear()
        halves.begin(**step)
        halves.end(**late)

    rows.append({"what": "begin + end", "backend": backend, "launches": clock.count(begin_end)})
    rows[-1]["eager_us"] = 1e6 * clock.calls(begin_end, 100)

    def epoch() -> None:
        for _ in buf.minibatches(NUM_MINIBATCHES):
            pass

    parts = recorded(buf, epoch)
    # useful bytes: what a minibatch's tensors hold, read and written
    useful = 2 * samples // NUM_MINIBATCHES * 4 * (17 + 3 * 4 + 4)
    row("minibatch", parts[:1], parts, lambda: next(buf.minibatches(NUM_MINIBATCHES, reuse=True)), useful, times=10)
    return rows


def ours(data: Data, backend: str, clock: Clock) -> list[dict]:
    """A whole iteration: T appends, GAE, 5 epochs of 4 minibatches; eager, and as a CUDA graph."""
    buf, steps = make(data, backend), [data.step(t) for t in range(data.num_steps)]

    def run() -> None:
        for step in steps:
            buf.append(**step)
        buf.compute_gae(data.last_values, GAMMA, LAM)
        for _ in buf.minibatches(NUM_MINIBATCHES, NUM_EPOCHS, reuse=True):
            pass
        buf.clear()

    run()
    rows = [{"what": "iteration", "backend": backend, "launches": clock.count(run)}]
    rows[0]["eager_us"] = 1e6 * clock.calls(run, 3)
    if clock.cuda:
        replay = clock.captured(run)

        def once() -> None:
            buf.advance(data.num_steps, rollouts=1)
            replay()

        rows[0]["graph_us"] = 1e6 * clock.calls(once, 3)
        buf.check()
    return rows


def by_hand(data: Data, clock: Clock) -> dict:
    """A ``copy_`` a field and step, the loop, a normalisation, a permutation and an ``index_select`` a field."""
    storage = {name: torch.empty_like(getattr(data, name)) for name in FIELDS}
    samples = data.num_envs * data.num_steps

    def run() -> None:
        for t in range(data.num_steps):
            for name, x in data.step(t).items():
                storage[name][t].copy_(x)
        advantages = gae_loop(storage["rewards"], storage["values"], storage["dones"], data.last_values)
        returns = advantages + storage["values"]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        flat = [storage[name].flatten(0, 1) for name in FIELDS if name not in ("rewards", "dones")]
        flat += [advantages.flatten(), returns.flatten()]
        indices = torch.randperm(samples, device=data.device)  # one for all epochs, as rsl_rl has it
        for _ in range(NUM_EPOCHS):
            for part in indices.tensor_split(NUM_MINIBATCHES):
                for x in flat:
                    x[part]

    run()
    row = {"what": "iteration", "backend": "torch, step by step", "launches": clock.count(run)}
    return row | {"eager_us": 1e6 * clock.calls(run, 1)}


def rsl_rl(data: Data, clock: Clock) -> dict:
    """rsl_rl's own storage, returns and generator, where it is installed."""
    row = {"what": "iteration", "backend": "rsl_rl"}
    try:
        from types import SimpleNamespace

        from rsl_rl.algorithms import PPO
        from rsl_rl.storage import RolloutStorage
        from tensordict import TensorDict
    except ImportError as error:
        return row | {"absent": f"{error.name} is not installed"}

    def groups(t: int) -> TensorDict:
        return TensorDict({"policy": data.obs[t]}, batch_size=[data.num_envs])

    storage = RolloutStorage("rl", data.num_envs, data.num_steps, groups(0), (4,), device=data.device)
    transitions = []
    for t in range(data.num_steps):
        transition = RolloutStorage.Transition()
        transition.observations, transition.actions = groups(t), data.actions[t]
        transition.rewards, transition.dones = data.rewards[t], data.dones[t]
        transition.values, transition.actions_log_prob = data.values[t].unsqueeze(1), data.log_probs[t]
        transition.distribution_params = (data.mu[t], data.sigma[t])
        transitions.append(transition)

    class Critic:
        get_hidden_state = staticmethod(lambda: None)
        reset = staticmethod(lambda hidden_state: None)

        def __call__(self, obs: object) -> Tensor:
            return data.last_values.unsqueeze(1)

    settings = {"gamma": GAMMA, "lam": LAM, "normalize_advantage_per_mini_batch": False}
    algorithm = SimpleNamespace(storage=storage, critic=Critic(), **settings)

    def run() -> None:
        storage.clear()
        for transition in transitions:
            storage.add_transition(transition)
        PPO.compute_returns(algorithm, None)
        for _ in storage.mini_batch_generator(NUM_MINIBATCHES, NUM_EPOCHS):
            pass

    run()
    wide = [getattr(data, name).double() for name in ("rewards", "values")]
    expected = gae_loop(*wide, data.dones, data.last_values.double()) + wide[1]
    check("rsl_rl's returns", storage.returns.squeeze(2).double(), expected)
    return row | {"launches": clock.count(run), "eager_us": 1e6 * clock.calls(run, 1)}


def trainings(clock: Clock, num_envs: int, num_steps: int) -> list[dict]:
    """A whole iteration on the pure-torch quadrotor: pydrone's trainer, rsl_rl's, and pydrone's as one graph, in turn.

    What fails is a row that says so; the captured one comes last, since a failed capture can leave CUDA unusable.
    """
    sys.path.insert(0, str(ROOT / "benches"))
    rows, runs = [], {}
    for backend, make_run in (
        ("pydrone", partial(pydrone_training, clock, num_envs, num_steps, False)),
        ("rsl_rl", partial(rsl_rl_training, clock, num_envs, num_steps)),
        ("pydrone, captured", partial(pydrone_training, clock, num_envs, num_steps, True)),
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


def in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def pydrone_training(clock: Clock, num_envs: int, num_steps: int, capture: bool) -> Run:
    from pydrone.envs.quadrotor import Quadrotor
    from pydrone.ppo.config import TrainConfig
    from pydrone.ppo.trainer import Trainer

    config = TrainConfig(num_envs=num_envs, num_steps=num_steps, capture=capture)
    return Trainer(Quadrotor(num_envs, "cuda" if clock.cuda else "cpu"), config, echo=lambda line: None).iterate


def rsl_rl_training(clock: Clock, num_envs: int, num_steps: int) -> Run:
    """Its own runner with TrainConfig's settings, as benches/peers/train.py has them."""
    import contextlib
    import io
    from types import SimpleNamespace

    from peers.train import _runner_config
    from rsl_rl.runners import OnPolicyRunner

    from pydrone.envs.quadrotor import Quadrotor
    from pydrone.integrations.rsl_rl_env import VecEnvWrapper

    device = "cuda" if clock.cuda else "cpu"
    config = _runner_config(SimpleNamespace(size=SimpleNamespace(num_envs=num_envs, num_steps=num_steps)))
    with contextlib.redirect_stdout(io.StringIO()):
        env = VecEnvWrapper(Quadrotor(num_envs, device))
        runner = OnPolicyRunner(env, config, log_dir=None, device=device)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            runner.learn(1)

    return run


def copy_bandwidth(clock: Clock, nbytes: int) -> float:
    """GB/s of a large copy on the device, bytes read and written counted."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device="cuda" if clock.cuda else "cpu")
    target = torch.empty_like(source)
    return 2 * nbytes / clock.launches([lambda: target.copy_(source)], 4) / 1e9


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(cuda: bool) -> dict:
    import pydrone
    from pydrone.ops import native

    commit, changed = output_of("git", "rev-parse", "HEAD"), output_of("git", "status", "--porcelain", "-uno")
    triton = sys.modules.get("triton")
    found = {
        "commit": commit and commit + (", with changes" if changed else ""),
        "command": " ".join(["python", *sys.argv]).replace(f"{ROOT}/", ""),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "pydrone": pydrone.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None),
            "cuda": torch.version.cuda,
            "nvcc": native.build_info().get("nvcc"),
        },
    }
    if cuda:
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader")
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver and clocks after the last measurement": output_of(*query),
        }
    return found


def table(rows: list[dict], copy_gb_s: float) -> str:
    lines = [f"device copy: {copy_gb_s:.0f} GB/s", ""]
    lines.append(f"{'us':24}{'backend':22}{'launches':>9}{'hot':>9}{'cold':>9}{'eager':>11}{'graph':>9}  cold GB/s")
    for row in rows:
        numbers = [f"{row[key]:.2f}" if key in row else "" for key in ("hot_us", "cold_us", "eager_us", "graph_us")]
        speed = f"{row['cold_gb_s']:.0f} ({100 * row['cold_gb_s'] / copy_gb_s:.0f} %)" if "cold_gb_s" in row else ""
        if "host_waits" in row:
            speed = f"launched by the host {row['host_launches']}, waited {row['host_waits']}"
        if "of_rsl_rl" in row and row["backend"] != "rsl_rl":
            speed += f"{', ' if speed else ''}{row['of_rsl_rl']:.2f} of rsl_rl's time"
        note = row.get("absent") or row.get("failed") or speed
        lines.append(
            f"{row['what']:24}{row['backend']:22}{row.get('launches') or '':>9}"
            f"{numbers[0]:>9}{numbers[1]:>9}{numbers[2]:>11}{numbers[3]:>9}  {note}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for <gpu>.json; nothing is written without it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script out")
    parser.add_argument("--backends", nargs="+", help="default: cuda triton; on a CPU: cpu")
    parser.add_argument("--num-envs", type=int, default=8192)
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise SystemExit(f"gpu.py: no CUDA device is seen by torch {torch.__version__}: nothing was timed")
    if options.out is not None and not cuda:
        raise SystemExit("gpu.py: --out: a CPU's figures are no GPU's; leave --out out")
    clock, began = Clock(options.device, options.repeats), time.perf_counter()
    torch.manual_seed(0)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size if cuda else 1 << 20
    copy_gb_s = copy_bandwidth(clock, (1 << 30) if cuda else (1 << 20))
    data, rows = Data(options.num_envs, options.num_steps, options.device), []
    backends = options.backends or (["cuda", "triton"] if cuda else ["cpu"])
    for backend in backends:
        rows += operations(data, backend, clock, l2)
    for backend in backends:
        rows += ours(data, backend, clock)
    rows += [by_hand(data, clock), rsl_rl(data, clock)]
    rows += trainings(clock, options.num_envs, options.num_steps)
    print(table(rows, copy_gb_s))
    if not cuda:
        print("\nA trial on the CPU: the figures mean nothing.")
    if options.out is not None:
        found = environment(cuda) | {"seconds": round(time.perf_counter() - began, 1)}
        sizes = {"num_envs": options.num_envs, "num_steps": options.num_steps, "repeats": options.repeats}
        found |= {"sizes": sizes, "copy_gb_s": copy_gb_s, "rows": rows}
        options.out.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", found["gpu"]["name"].lower()).strip("-")
        path = options.out / f"{name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\n{path}, {found['seconds']} s")
    if failed := [f"{row['what']}, {row['backend']}" for row in rows if "failed" in row]:
        raise SystemExit(f"gpu.py: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
