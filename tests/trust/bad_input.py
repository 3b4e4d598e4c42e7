"""Numbered invalid calls: a valid call of a public function, with one or two of its arguments replaced by wrong ones.

    python tests/trust/bad_input.py --cases 20000            # all of them: `make sanitize` does so with sanitizers
    python tests/trust/bad_input.py --first 1234 --cases 1   # one case, with its outcome

Each must raise TypeError, ValueError or RuntimeError with a message that names a wrong argument, and change no byte of
a buffer or tensor; the valid call must work afterwards.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import pydrone
from pydrone import RolloutBuffer
from pydrone.memory import plan
from pydrone.ops.native import build_info

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "ops"), str(TESTS / "trust")]

from bad_learner import clipped_step, fused_update, learner_op  # noqa: E402
from bad_values import (  # noqa: E402
    BIG,
    HUGE,
    NAN,
    Bad,
    Subject,
    bad_bool,
    bad_choice,
    bad_int,
    bad_tensor,
    bad_unit,
    not_tensors,
    other_layouts,
    other_shapes,
    overlapping,
)
from rollout_model import random_step  # noqa: E402
from test_ops import ARGUMENTS  # noqa: E402

NATIVE = pydrone.backends()["cpu"] is None
OPS = torch.ops.pydrone
ALTERNATIVES = {"final_values", "timeout_bootstrap", "value_fn"}  # one of them is given: two wrong ones may be right


class Case(NamedTuple):
    """``wrong`` raises an error that names one of ``names``, and leaves ``held`` unchanged; then ``right`` works."""

    what: str
    wrong: Callable[[], object]
    right: Callable[[], object]
    names: frozenset[str]
    held: tuple[object, ...]


# ---------------------------------------------------------------------------------------------- the functions


def estimator(rng: random.Random) -> Subject:
    name = rng.choice(["gae", "gae", "vtrace", "retrace"])
    n, t = rng.randint(2, 5), rng.randint(2, 5)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.float16])
    result = torch.float64 if dtype == torch.float64 else torch.float32
    shape = rng.choice([(n, t), (n, t, 1)])
    time_dim = rng.choice([0, 1])
    shape = shape if time_dim else (t, n, *shape[2:])

    def flags() -> Tensor:
        return (torch.rand(shape) < 0.3).to(rng.choice([torch.bool, torch.uint8, torch.int64, torch.float32]))

    given = {"rewards": torch.randn(shape).to(dtype), "values": torch.randn(shape).to(dtype), "dones": flags()}
    given |= {"last_values": torch.randn(n).to(dtype), "gamma": 0.9, "lam": 0.8, "time_dim": time_dim}
    given |= {"stats": rng.choice([True, False])}
    how = rng.choice([None, "final_values", "stored_value", "next_value"])
    if how:
        given["truncated"] = flags()
        given |= {how: torch.randn(shape).to(dtype)} if how == "final_values" else {"timeout_bootstrap": how}
    if rng.random() < 0.3:
        given["valid"] = flags()
    reals = ["values", "last_values", *{"gae": (), "vtrace": ("log_rhos",)}.get(name, ("log_rhos", "q_values"))]
    given |= {x: torch.randn(shape).to(dtype) for x in reals[2:]}
    wrong: dict[str, list] = {name: bad_tensor(given[name], "real") for name in reals}
    everything = (*reals, "dones", "truncated", "valid")
    wrong["rewards"] = [Bad(x, everything) for x in bad_tensor(given["rewards"], "real")]
    wrong["dones"] = bad_tensor(given["dones"], "flag")
    wrong |= {name: bad_tensor(given[name], "flag", True) for name in ("truncated", "valid") if name in given}
    if how == "final_values":
        # Without it a truncation has no bootstrap, and the error says that.
        wrong["final_values"] = [*bad_tensor(given["final_values"], "real", True), Bad(None, ("truncated",))]
        wrong["timeout_bootstrap"] = ["next_value"]
        wrong["truncated"].append(Bad(None, ("final_values",)))
    elif how:
        wrong["final_values"] = [Bad(torch.zeros(shape), ("timeout_bootstrap",))]
        wrong["timeout_bootstrap"] = [*bad_choice(True), Bad(None, ("truncated",))]
    for x in ("rewards", "final_values", *reals):
        if isinstance(given.get(x), Tensor):
            wrong[x].append(given[x].clone().requires_grad_())
            wrong[x].append(given[x].clone().requires_grad_() * 1)
    clips = {"gae": (), "vtrace": ("rho_clip", "c_clip"), "retrace": ("c_clip",)}[name]
    wrong |= {x: [-1, -1e-30, -math.inf, NAN, "1", None, [1.0], object()] for x in clips}
    wrong |= {"gamma": bad_unit(), "lam": bad_unit(), "time_dim": [2, -1, "1", None, 0.5, [1], HUGE]}
    wrong |= {"stats": bad_bool(), "backend": ["tpu", "", "CPU", 3, b"cpu", object(), "cuda", "triton"]}
    tensors = tuple(x for x in given.values() if isinstance(x, Tensor))
    if name == "retrace":
        del given["stats"], wrong["stats"]
        if rng.random() < 0.5:
            given["out"] = torch.zeros(shape, dtype=result)
            wrong["out"] = bad_tensor(given["out"], "real", True)
            wrong["out"] += [given["out"].half(), (given["out"],), given["values"]]
            tensors += (given["out"],)
    elif rng.random() < 0.5:
        outputs = torch.zeros(shape, dtype=result), torch.zeros(shape, dtype=result)
        given["out"] = outputs
        both = [*overlapping(outputs, tensors), outputs[:1], outputs * 2, outputs[0], "x", 3, {}]
        for i in (0, 1):
            for x in [*bad_tensor(outputs[i], "real"), outputs[i].half(), outputs[i].clone().requires_grad_()]:
                both.append((x, outputs[1]) if i == 0 else (outputs[0], x))
        wrong["out"] = both
        # A tensor of the outputs' own dtype only if the inputs say so.
        tensors += outputs
    return Subject(name, getattr(pydrone, name), given, wrong, tensors)


OBS = [3, (2, 2), {"a": 3, "b": ((2, 2), torch.uint8)}, {"a": (2, torch.float16), "c": ()}]
ACTIONS = [2, ((), torch.int64), ((3,), torch.int32)]


def buffer(rng: random.Random, steps: int | None = None, **options) -> RolloutBuffer:
    """A random buffer with ``steps`` random steps; by default a random number, fewer than a rollout."""
    num_steps = options.pop("num_steps", rng.randint(2, 3))
    options.setdefault("capacity", rng.choice([None, num_steps + 1, 2 * num_steps]))
    if not NATIVE or rng.random() < 0.3:
        options["backend"] = "reference"
    fields = rng.choice([None, {"mu": 2}, {"mask": ((2,), torch.bool), "cost": ()}])
    options = {
        "obs": rng.choice(OBS),
        "actions": rng.choice(ACTIONS),
        "fields": fields,
        "seed": rng.randint(0, 9),
    } | options
    buf = RolloutBuffer(rng.randint(2, 4), num_steps, **options)
    for _ in range(rng.randint(0, num_steps - 1) if steps is None else steps):
        buf.append(**random_step(buf))
    return buf


def wrong_source(x: Tensor) -> list[object]:
    return bad_tensor(x, "real" if x.dtype.is_floating_point else "exact")


def wrong_obs(buf: RolloutBuffer, obs: object, optional: bool = False) -> list[object]:
    if isinstance(obs, Tensor):
        return [x for x in wrong_source(obs) if x is not None or not optional]
    made: list[object] = [3, "x", obs["a"], [], {}, obs | {"more": obs["a"]}, {"a": obs["a"]}]
    made += [] if optional else [None]
    for name, x in obs.items():
        made += [obs | {name: y} for y in wrong_source(x)]
    return made


def wrong_halves(buf: RolloutBuffer, step: dict[str, object]) -> dict[str, list]:
    """Wrong values for each argument of append, by name."""
    wrong = {"obs": wrong_obs(buf, step["obs"])}
    for name in ("actions", "log_probs", "values", *buf.layout.extra):
        wrong[name] = wrong_source(step[name])
    wrong["rewards"] = bad_tensor(step["rewards"], "real")
    for name in ("dones", "truncated", "valid"):
        if name in step:
            wrong[name] = bad_tensor(step[name], "flag", name != "dones")
    if "final_obs" in step:
        wrong["final_obs"] = wrong_obs(buf, step["final_obs"], True)
        wrong["truncated"].append(Bad(None, ("final_obs",)))
    elif "truncated" not in step:
        wrong["final_obs"] = [Bad(step["obs"], ("truncated",))]
    wrong["sigma"] = [torch.zeros(buf.num_envs), None]
    return wrong


def late_step(rng: random.Random, buf: RolloutBuffer) -> dict[str, object]:
    step = random_step(buf)
    if rng.random() < 0.5:
        step["truncated"] = (torch.rand(buf.num_envs) < 0.5).to(rng.choice([torch.bool, torch.int32, torch.float32]))
        if rng.random() < 0.7:
            step["final_obs"] = random_step(buf)["obs"]
    if rng.random() < 0.3:
        step["valid"] = torch.rand(buf.num_envs) < 0.5
    for name in ("rewards", "values", "log_probs", "dones"):
        if rng.random() < 0.2:
            step[name] = step[name].unsqueeze(1)
    return step


ENDS = ("rewards", "dones", "truncated", "final_obs", "valid")


def append(rng: random.Random) -> Subject:
    buf = buffer(rng)
    step = late_step(rng, buf)
    return Subject("append", buf.append, step, wrong_halves(buf, step), (buf,))


def begin(rng: random.Random) -> Subject:
    buf = buffer(rng)
    step = {name: x for name, x in random_step(buf).items() if name not in ENDS}
    wrong = {name: x for name, x in wrong_halves(buf, random_step(buf)).items() if name in (*step, "sigma")}
    return Subject("begin", buf.begin, step, wrong | {"rewards": [torch.zeros(buf.num_envs)]}, (buf,))


def end(rng: random.Random) -> Subject:
    buf = buffer(rng)
    step = late_step(rng, buf)
    if rng.random() < 0.5:
        buf.begin(**{name: x for name, x in step.items() if name not in ENDS})
    else:
        buf.slot()
    wrong = {name: x for name, x in wrong_halves(buf, step).items() if name in (*ENDS, "sigma")}
    return Subject("end", buf.end, {name: x for name, x in step.items() if name in ENDS}, wrong, (buf,))


def full(rng: random.Random, **options) -> RolloutBuffer:
    num_steps = rng.randint(2, 3)
    return buffer(rng, num_steps, num_steps=num_steps, **options)


def compute_gae(rng: random.Random) -> Subject:
    buf = full(rng)
    given: dict[str, object] = {"last_values": torch.randn(buf.num_envs), "gamma": 0.9, "lam": 0.8}
    wrong = {"last_values": bad_tensor(given["last_values"], "real"), "gamma": bad_unit(), "lam": bad_unit()}
    wrong |= {"value_fn": [3, "x", object(), torch.zeros(3)], "check": bad_bool()}
    wrong |= {"timeout_bootstrap": bad_choice(True), "without_final_obs": bad_choice()}
    if rng.random() < 0.5:  # final values are accepted without truncations, too
        given["final_values"] = torch.randn(buf.num_envs, buf.num_steps)
        wrong["final_values"] = bad_tensor(given["final_values"], "real", True)
        both = ("final_values",)
        wrong["value_fn"] = [Bad(x, both) for x in (*wrong["value_fn"], len)]
        wrong["timeout_bootstrap"] = [Bad(x, both) for x in (*wrong["timeout_bootstrap"], "next_value")]
    if buf.capacity == buf.num_steps and rng.random() < 0.3:
        buf.clear()
        for _ in range(buf.num_steps):
            late = {"truncated": torch.ones(buf.num_envs), "final_obs": random_step(buf)["obs"]}
            buf.append(**random_step(buf) | (late if buf._ring.appended % buf.num_steps == 0 else {}))
        given.pop("final_values", None)
        size = buf.num_envs
        results = [torch.zeros(size + 1), torch.zeros(size, 2), torch.zeros(size).int(), None, 3.0, "x"]
        results += other_layouts(torch.zeros(size))
        given["value_fn"] = lambda obs: torch.zeros(size)
        wrong["value_fn"] = [3, "x", *((lambda obs, y=y: y) for y in results), Bad(None, ("truncated",))]
        wrong["final_values"] = [Bad(torch.zeros(size, buf.num_steps), ("value_fn",))]
        wrong["timeout_bootstrap"] = [Bad(x, ("value_fn",)) for x in ("next_value", "nonsense")]
    if rng.random() < 0.3:
        buf.compute_gae(torch.zeros(buf.num_envs), timeout_bootstrap="next_value")
        outputs = [buf._storage.tensors["advantages"], buf._storage.tensors["returns"]]
        across = [x.t().view(-1)[: buf.num_envs] for x in outputs]  # the outputs are time-major
        wrong["last_values"] = [*wrong["last_values"], *across, *(x[:, 0] for x in outputs)]
    return Subject("compute_gae", buf.compute_gae, given, wrong, (buf,))


def minibatches(rng: random.Random) -> Subject:
    buf = full(rng)
    buf.compute_gae(torch.zeros(buf.num_envs))
    given = {"num_minibatches": 2, "num_epochs": 1, "shuffle": "full", "normalize_advantages": True}
    given |= {"drop_last": False, "reuse": False}
    samples = buf.num_envs * buf.num_steps
    wrong = {"num_minibatches": [*bad_int(1), samples + 1, BIG, HUGE], "num_epochs": bad_int(1)}
    wrong |= {"shuffle": bad_choice(), "drop_last": bad_bool(), "reuse": bad_bool()}
    wrong["normalize_advantages"] = ["false", "", "rollout", 2, 0.5, None, [], object()]
    return Subject("minibatches", lambda **x: next(buf.minibatches(**x)), given, wrong, (buf,))


def sequences(rng: random.Random) -> Subject:
    buf = full(rng, fields={"h": 2})
    buf.compute_gae(torch.zeros(buf.num_envs))
    state = torch.randn(buf.num_envs, buf.num_steps, 2)
    given = {"hidden": {"h": rng.choice(["h", state])}, "burn_in": 1, "num_minibatches": 1, "num_epochs": 1}
    given["normalize_advantages"] = True
    states = [3, None, "nonsense", "final_row", "", [], object(), *other_layouts(state), *other_shapes(state)[:4]]
    wrong = {"hidden": [3, "h", ["h"], state, *({"h": x} for x in states)], "burn_in": bad_int(0)}
    wrong |= {"num_minibatches": [*bad_int(1), buf.num_envs + 1, HUGE], "num_epochs": bad_int(1)}
    wrong["normalize_advantages"] = [*bad_bool(), "minibatch"]
    return Subject("sequences", lambda **x: next(buf.sequences(**x)), given, wrong, (buf,))


def wrong_sizes() -> list[object]:
    dtypes = [(3, torch.complex64), (3, torch.quint8), ((3,), "float32"), ((2, 2), torch.float8_e4m3fn)]
    return [0, -1, (3, -1), (0,), (3, 0), "17", None, 2.5, NAN, True, (2.5,), [None], object(), -HUGE, {3}, *dtypes]


def constructor(rng: random.Random, call: Callable = RolloutBuffer) -> Subject:
    given = {"num_envs": rng.randint(1, 4), "num_steps": rng.randint(1, 3), "obs": rng.choice(OBS)}
    given |= {"actions": rng.choice(ACTIONS), "capacity": None, "obs_dtype": torch.float32}
    given |= {"fields": rng.choice([None, {"mu": 2}]), "max_episode_length": None, "final_obs_rows": None}
    wrong: dict[str, list] = {name: bad_int(1) for name in ("num_envs", "num_steps")}
    wrong["num_envs"] += [BIG, HUGE, 2**31]
    wrong["num_steps"] += [Bad(x, ("num_envs",)) for x in (BIG, HUGE, 2**31)]
    wrong["capacity"] = [*bad_int(1, True), given["num_steps"] - 1]
    sizes = wrong_sizes()
    wrong["obs"] = [*sizes, {}, {0: 3}, {None: 3}, *({"a": x} for x in sizes)]
    wrong["actions"] = [*sizes, {}, {"a": 3}]
    wrong["obs_dtype"] = [torch.float64, torch.int8, torch.complex64, "float32", None, float, 3]
    wrong["fields"] = [["mu"], "mu", 3, {"values": 1}, {"a b": 1}, {"": 1}, {3: 1}, *({"mu": x} for x in sizes)]
    wrong["max_episode_length"] = bad_int(1, True)
    wrong["final_obs_rows"] = bad_int(0, True)
    if call is RolloutBuffer:
        # Larger than an address space: no machine can allocate it.
        huge = ("num_envs", "memory")
        wrong["obs"] += [Bad(x, huge) for x in (2**60, BIG, HUGE, (2**31, 2**31), {"a": 2**60})]
        wrong["actions"] += [Bad(x, huge) for x in (2**60, HUGE)]
        wrong["capacity"] += [Bad(x, huge) for x in (2**60, BIG, HUGE)]
        wrong["final_obs_rows"] += [Bad(x, huge) for x in (2**60, BIG, HUGE)]
        given |= {"device": "cpu", "seed": 0, "rank": 0, "backend": None}
        wrong["device"] = [
            "nonsense",
            "cuda:99",
            -1,
            1e9,
            None,
            object(),
            [],
            "meta",
            torch.device("meta"),
            "mps",
            "xpu",
        ]
        wrong |= {name: [1.5, "3", None, True, NAN, [], object()] for name in ("seed", "rank")}
        wrong["backend"] = ["tpu", "", "CPU", 3, b"cpu", object(), "cuda", "triton"]
        if torch.cuda.is_available():
            wrong["device"] = [x for x in wrong["device"] if x is not None]
    else:
        given |= {"iterations": 3, "reused_minibatch": 1}
        wrong |= {"iterations": bad_int(1), "reused_minibatch": [*bad_int(1, True), BIG]}
        wrong["seed"] = [3]
    return Subject("RolloutBuffer" if call is RolloutBuffer else "plan", call, given, wrong)


def memory_plan(rng: random.Random) -> Subject:
    return constructor(rng, plan)


def load_state_dict(rng: random.Random) -> Subject:
    buf = buffer(rng)
    other = copy.deepcopy(buf)
    if len(other) < other.num_steps:
        other.append(**random_step(other))
    state = other.state_dict()
    wrong: list[object] = [None, 3, "x", [], {}, list(state), dict(list(state.items())[1:]), state | {"more": 1}]
    for name, x in state.items():
        if isinstance(x, Tensor):
            others = [
                y for y in other_layouts(x) if y.layout != torch.strided or y.device.type == "meta" or y.is_nested
            ]
            values = [*not_tensors(x, False), *other_shapes(x), *others, x.to(torch.complex64)]
        elif name in ("truncations", "resets"):
            values = [None, 3, "x", [], [False] * (len(x) + 1), ["x"] * len(x), [None] * len(x), {}]
        elif name == "computed":
            values = [None, "x", 3, [], torch.tensor(1)]
        elif name == "layout":
            values = [None, 3, "x", [], [*x, 1], x[:-1], [99, *x[1:]]]
        else:
            values = [None, "3", 2.5, NAN, True, [], torch.tensor(3)]
            values += [] if name == "seed" else [-1, -HUGE]
        wrong += [state | {name: y} for y in values]
    steps = {"discarded": [1, state["appended"] + buf.num_steps], "appended": [state["discarded"] + buf.capacity + 1]}
    wrong += [state | {name: y} for name, values in steps.items() for y in values]
    sizes = {"num_envs": buf.num_envs + 1, "num_steps": buf.num_steps, "obs": 7, "actions": 1}
    wrong.append(RolloutBuffer(**sizes).state_dict())
    names = [Bad(x, ("state_dict", *state)) for x in wrong]
    return Subject("load_state_dict", buf.load_state_dict, {"state": state}, {"state": names}, (buf, *state.values()))


def others(rng: random.Random) -> Subject:
    """Methods with one or two arguments."""
    buf = full(rng)
    buf.compute_gae(torch.zeros(buf.num_envs))
    if rng.random() < 0.4:
        room = buf.capacity - len(buf)
        wrong = {"steps": [*bad_int(0), Bad(room + 1, ("ring",)), Bad(HUGE, ("ring",))]}
        wrong["rollouts"] = [*bad_int(0), 2 + buf.capacity, HUGE]
        return Subject("advance", buf.advance, {"steps": 0, "rollouts": 0}, wrong, (buf,))
    if rng.random() < 0.6:
        places = ["nonsense", "cuda:99", -1, 1e9, object(), [], "meta", "mps", "cpu:99x"]
        return Subject("to", buf.to, {"device": "cpu"}, {"device": places}, (buf,))
    names = ["nonsense", "final_row", "", "self", "advantage", "Obs"]
    return Subject(
        "item", lambda name: buf[name], {"name": "rewards"}, {"name": [Bad(x, (x, "field")) for x in names]}, (buf,)
    )


def order(rng: random.Random) -> Subject:
    """Valid arguments at the wrong time."""
    kind = rng.choice(["empty", "partial", "full", "open", "discarded"])
    options = {"capacity": None} if kind == "full" else {}
    buf = full(rng, **options) if kind in ("full", "discarded") else buffer(rng, 0 if kind == "empty" else 1, **options)
    step = random_step(buf)
    early = {name: x for name, x in step.items() if name not in ENDS}
    late = {name: x for name, x in step.items() if name in ENDS}
    last = torch.zeros(buf.num_envs)
    # The call, and the names that its error may give.
    calls: dict[str, tuple[Callable, tuple[str, ...]]] = {
        "end": (lambda: buf.end(**late), ("end",)),
        "compute_gae": (lambda: buf.compute_gae(last), ("compute_gae",)),
        "minibatches": (lambda: buf.minibatches(), ("minibatches",)),
        "sequences": (lambda: buf.sequences(), ("sequences",)),
        **{name: (lambda name=name: getattr(buf, name), (name,)) for name in ("advantages", "returns", "statistics")},
    }
    if kind == "full":
        ring = ("ring",)
        calls["append"] = (lambda: buf.append(**step), ring)
        calls["begin"], calls["slot"] = (lambda: buf.begin(**early), ring), (buf.slot, ring)
        calls["advance"] = (lambda: buf.advance(1), ring)
        del calls["compute_gae"]
    elif kind == "open":
        opened = rng.choice([lambda: buf.begin(**early), buf.slot])
        opened()
        again = {"append": lambda: buf.append(**step), "begin": lambda: buf.begin(**early), "slot": buf.slot}
        again |= {"advance": lambda: buf.advance(1), "state_dict": buf.state_dict}
        calls |= {name: (call, (name,)) for name, call in again.items()}
        for name, call in (("deepcopy", lambda: copy.deepcopy(buf)), ("load", lambda: buf.load_state_dict({}))):
            calls[name] = (call, ("state_dict",))
        del calls["end"]
    elif kind == "discarded":
        buf.compute_gae(last)
        reading = rng.choice([lambda: buf.minibatches(2), lambda: buf.sequences(num_minibatches=2)])()
        next(reading)
        buf.clear()
        calls["next"] = (lambda: next(reading), ("minibatches", "sequences"))
    name = rng.choice(sorted(calls))
    call, names = calls[name]

    def go(wrong: bool) -> object:
        if wrong:
            return call()
        buf.clear()  # afterwards, a rollout can still be collected and learnt from
        buf.clear()
        for _ in range(buf.num_steps):
            buf.append(**step)
        buf.compute_gae(last)
        return next(buf.minibatches())

    return Subject(f"{name}, {kind}", go, {"wrong": False}, {"wrong": [Bad(True, names)]}, (buf,))


# Integer arguments of the operations, and values out of range whatever the other arguments are.
RANGES = {
    "gae": {"start": (-1, 3, BIG, -BIG), "bootstrap": (-1, 4, BIG)},
    "off_policy": {
        **{"start": (-1, 3, BIG, -BIG), "bootstrap": (-1, 4, BIG)},
        **dict.fromkeys(("rho_clip", "c_clip"), (-1.0, -math.inf, NAN)),
    },
    "append": {"slot": (-1, 3, BIG, -BIG), "pool_slot": (-1, 2, BIG)},
    "gather": {
        **{"num_steps": (-1, 4, BIG, -BIG), "start": (-1, 3, BIG, -BIG), "first": (-1, 8, BIG, -BIG)},
        **{"num_samples": (-1, 0, 11, 13, BIG), "value_offset": (-1, 29, 30, BIG, -BIG)},
    },
}
# Names of parts of an argument, from pydrone/ops/schema.py.
PARTS = ("rows", "codes", "planes", "plane", "pool", "count", "final_obs", "final_rows", "fields", "tensors")


def wrong_in_an_op(op: str, name: str, x: object) -> list[object]:
    if isinstance(x, Tensor):
        made = [*not_tensors(x, True), *other_layouts(x), x.to(torch.complex64)]
        # A longer workspace is valid, and gather's rows may belong to a longer ring.
        made += [] if name == "workspace" else [x.unsqueeze(0), x.new_zeros(())]
        return made if name in ("workspace", "rows") else [*made, torch.cat([x, x[:1]])]
    if isinstance(x, list) and x and isinstance(x[0], Tensor):
        made = []
        for i, y in enumerate(x):
            made += [x[:i] + [z] + x[i + 1 :] for z in wrong_in_an_op(op, name, y)]
        return [*made, [*x, x[0]], [*x, *x], x[:1] if len(x) > 1 else []]
    if isinstance(x, list) and x:
        return [x[1:], [*x, 0], [BIG] * len(x), [-BIG] * len(x), [-1] * len(x), "x", [0.5] * len(x), None]
    if name in RANGES[op]:
        return [*RANGES[op][name], None, "x", *([0.5] if isinstance(x, int) else [])]
    return [object()]


def an_op(rng: random.Random) -> Subject:
    op = rng.choice(sorted(ARGUMENTS))
    given = ARGUMENTS[op]()
    wrong = {name: wrong_in_an_op(op, name, x) for name, x in given.items()}
    if op == "gae":
        for name, inputs in (("advantages", ("rewards", "values", "returns")), ("returns", ("rewards", "values"))):
            wrong[name] += [given[x] for x in inputs] + [given[name][:1].expand(given[name].shape)]
    if op == "off_policy":
        for name, inputs in (("advantages", ("log_rhos", "targets")), ("targets", ("log_rhos", "values"))):
            wrong[name] += [given[x] for x in inputs] + [given[name][:1].expand(given[name].shape)]
        wrong["q_values"] += [torch.ones(given["rewards"].shape)]  # then there are no advantages
    if op == "gather":
        wrong["returns"] += [given["advantages"].double(), given["advantages"].t().contiguous().t()]
        across = given["rows"].flatten()[:40].view(torch.int32).view(5, 2)
        wrong["outputs"].append([across, given["outputs"][1]])
    names = (*given, *PARTS)
    wrong = {name: [Bad(x, names) for x in made] for name, made in wrong.items()}
    flat = [y for x in given.values() for y in (x if isinstance(x, list) else [x])]
    held = tuple(x for x in flat if isinstance(x, Tensor))

    def call(**arguments: object) -> None:
        getattr(OPS, op).default(*arguments.values())

    return Subject(f"ops.{op}", call, given, wrong, held)


SUBJECTS: dict[Callable[[random.Random], Subject], int] = {
    **{estimator: 9, append: 6, begin: 2, end: 3, compute_gae: 4, minibatches: 2, sequences: 2, constructor: 4},
    **{memory_plan: 2, load_state_dict: 3, others: 2, order: 3, an_op: 6 if NATIVE else 0},
    **dict.fromkeys((fused_update, clipped_step, learner_op), 2 if NATIVE else 0),
}

# ---------------------------------------------------------------------------------------------- cases


def described(x: object) -> str:
    if isinstance(x, Tensor):
        grad = ", requires grad" if x.requires_grad else ""
        if x.is_nested:
            return f"nested {x.dtype}"
        return f"{x.dtype} {list(x.shape)} {x.layout} {x.device}{grad}".replace("torch.", "")
    if isinstance(x, dict):
        return "{" + ", ".join(f"{k}: {described(v)}" for k, v in x.items()) + "}"
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(map(described, x)) + "]"
    text = re.sub(r" at 0x\w+", "", repr(x))
    return text if len(text) < 60 else text[:40] + "..."


def make(number: int) -> Case:
    """The case with this number, always the same."""
    rng = random.Random(number)
    torch.manual_seed(number)
    subject = rng.choices(list(SUBJECTS), SUBJECTS.values())[0](rng)
    changed = rng.sample(sorted(subject.wrong), min(len(subject.wrong), rng.choice([1, 1, 1, 2])))
    if len(ALTERNATIVES & set(changed)) > 1:
        changed = changed[:1]
    arguments, names, what = dict(subject.arguments), set(), []
    for name in changed:
        bad = rng.choice(subject.wrong[name])
        bad = bad if isinstance(bad, Bad) else Bad(bad)
        arguments[name] = bad.value
        names |= {name, *bad.names}
        what.append(f"{name}={described(bad.value)}")
    return Case(
        f"{subject.name}({', '.join(what)})",
        lambda: subject.call(**arguments),
        lambda: subject.call(**subject.arguments),
        frozenset(names),
        subject.held,
    )


def bytes_of(x: Tensor) -> bytes:
    return bytes(x.detach().contiguous().flatten().view(torch.uint8).numpy())


def snapshot(held: Iterable[object]) -> list[object]:
    seen: list[object] = []
    for x in held:
        if isinstance(x, RolloutBuffer):
            counted = [
                y for y in vars(x._ring).values() if not isinstance(y, Tensor)
            ]  # the cursor is among the tensors
            counters = (counted, x._scan.computed, x._draws.epoch, x._steps.begun, x._seed)
            seen.append((copy.deepcopy(counters), [(name, bytes_of(y)) for name, y in x._storage.tensors.items()]))
        elif isinstance(x, Tensor):
            seen.append(bytes_of(x))
    return seen


def problem(case: Case) -> str | None:
    """How pydrone mishandles a case, or None."""
    before = snapshot(case.held)
    try:
        case.wrong()
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        message = str(error)
        if type(error) is KeyError and not case.what.startswith("item("):
            return f"a KeyError: {message}"
        if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in case.names):
            return f"the error does not name {' or '.join(sorted(case.names))}: {type(error).__name__}: {message[:300]}"
    except Exception as error:
        return f"an error of another kind: {type(error).__name__}: {str(error)[:300]}"
    else:
        return "accepted"
    if snapshot(case.held) != before:
        return f"refused ({message[:200]}), and something was written"
    try:
        case.right()
    except Exception as error:
        return f"the call with the right arguments fails after it: {type(error).__name__}: {str(error)[:300]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=20000, help="number of cases")
    parser.add_argument("--sanitized", action="store_true", help="fail unless the library is built with sanitizers")
    options = parser.parse_args()
    if options.sanitized and "-fsanitize=address,undefined" not in build_info().get("flags", ""):
        parser.error(f"--sanitized: {pydrone.__file__} is not built with the sanitizers")
    start, found, subjects = time.perf_counter(), [], Counter()
    for number in range(options.first, options.first + options.cases):
        case = make(number)
        if options.cases == 1:
            print(case.what, flush=True)
        subjects[case.what.partition("(")[0].partition(",")[0]] += 1
        wrong = problem(case)
        if wrong:
            found.append(number)
            print(f"case {number}: {case.what}: {wrong}", flush=True)
    counts = ", ".join(f"{name} {count}" for name, count in subjects.most_common())
    print(f"{options.cases} cases in {time.perf_counter() - start:.0f} s: {counts}")
    print(f"{len(found)} of them handled wrongly")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
