"""A RolloutBuffer returns what was put in, for all shapes, row widths, dtypes and memory layouts; and its errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from rollout_model import (
    assert_close,
    fill,
    gae_loop,
    memory_bytes,
    random_step,
    stacked,
)

import pydrone
from pydrone import RolloutBuffer, memory
from pydrone.ops.schema import SCALAR_TYPES

# ---------------------------------------------------------------------------------------------- round trips


def check_contents(buf: RolloutBuffer, steps: list[dict], verbatim: bool = False) -> None:
    """Views and an epoch of minibatches hold what was appended, bit for bit."""
    expected = {name: stacked(steps, name) for name in ("actions", "values", "log_probs", *buf.layout.extra)}
    for group in buf.layout.obs:
        key = f"obs.{group}"
        expected[key] = stacked(steps, "obs", group if buf.layout.obs_is_mapping else None)
    for name, x in expected.items():
        x = expected[name] = x.reshape(buf.num_envs, buf.num_steps, *buf.layout.fields[name].shape)
        stored = x.to(buf.layout.fields[name].dtype)
        assert torch.equal(buf[name], stored), name
        half = stored.dtype in (torch.float16, torch.bfloat16)
        expected[name] = stored.float() if half and not verbatim else stored
    buf.compute_gae(torch.zeros(buf.num_envs))
    advantages, _ = gae_loop(
        *(stacked(steps, name).reshape(buf.num_envs, -1) for name in ("rewards", "values", "dones")),
        torch.zeros(buf.num_envs),
        0.99,
        0.95,
    )
    assert_close(buf.advantages, advantages)
    for mb in buf.minibatches(min(3, buf.num_envs * buf.num_steps), normalize_advantages=False):
        env, step = mb.indices // buf.num_steps, mb.indices % buf.num_steps
        for name, x in expected.items():
            got = mb.obs[name[4:]] if name.startswith("obs.") and buf.layout.obs_is_mapping else mb[name]
            assert got.dtype == x.dtype and torch.equal(got, x[env, step]), name
            assert got.is_contiguous()


@pytest.mark.parametrize("num_envs", [1, 2, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("width", [1, 3, 4, 17, 48, 187])
def test_sizes(num_envs, width, backend):
    buf = RolloutBuffer(num_envs, 3, obs=width, actions=4, fields={"mu": 4, "std": 4}, backend=backend)
    check_contents(buf, fill(buf))


@pytest.mark.parametrize("widths", [(1,), (2, 1), (5, 7), (24, 13, 3), (33,), (16, 16)], ids=str)
def test_odd_bytes(widths, backend):
    """uint8, bool and int16 fields that end at any byte: copies of whole words must not write beyond them."""
    fields = {f"b{i}": (w, torch.uint8) for i, w in enumerate(widths)}
    fields |= {"flag": ((), torch.bool), "short": (3, torch.int16), "mask": (widths[0], torch.bool)}
    buf = RolloutBuffer(
        37, 4, obs=((widths[-1],), torch.uint8), actions=((), torch.int8), fields=fields, backend=backend
    )
    check_contents(buf, fill(buf))
    buf.clear()
    check_contents(buf, fill(buf))


GROUPS = {"camera": ((3, 8, 8), torch.uint8), "state": 17, "wide": ((2, 3), torch.float64), "low": (7, torch.bfloat16)}
FIELDS = {
    "mu": 4,
    "cost": (),
    "count": ((), torch.int64),
    "grid": ((2, 2), torch.int32),
    "alive": ((3,), torch.bool),
    "code": (5, torch.int8),
    "thin": (3, torch.float16),
    "scalar": ((), torch.float64),
}


@pytest.mark.parametrize("actions", [4, (2, 3), ((), torch.int64), ((2,), torch.int32), ()], ids=str)
@pytest.mark.parametrize("num_envs", [1, 33])
def test_groups_and_fields(actions, num_envs, backend):
    buf = RolloutBuffer(num_envs, 5, obs=GROUPS, actions=actions, fields=FIELDS, backend=backend)
    check_contents(buf, fill(buf))


@pytest.mark.parametrize("verbatim", [False, True])
def test_every_dtype_comes_out_as_it_went_in(verbatim, backend):
    """Of groups, of actions and of fields, an empty group among them; half precision if asked for."""
    for dtype in SCALAR_TYPES:
        specs, fields = {"wide": ((17,), dtype), "image": ((2, 3), dtype), "one": ((), dtype)}, {"extra": (3, dtype)}
        if verbatim:
            specs, fields = specs | {"none": ((0,), dtype)}, fields | {"nothing": ((2, 0), dtype)}
        buf = RolloutBuffer(5, 3, specs, ((2,), dtype), fields=fields, backend=backend, verbatim=verbatim)
        check_contents(buf, fill(buf), verbatim)


def test_verbatim_covers_the_pool_and_copies(backend):
    """The final observations go through the same networks; the choice is part of a copied buffer."""
    buf = RolloutBuffer(3, 1, obs=((2,), torch.bfloat16), actions=1, backend=backend, verbatim=True)
    ends, zeros, seen = torch.ones(3), torch.zeros(3), []
    step = random_step(buf) | {"dones": ends, "truncated": ends, "final_obs": torch.ones(3, 2, dtype=torch.bfloat16)}
    buf.append(**step)
    buf.compute_gae(zeros, value_fn=lambda obs: seen.append(obs.dtype) or zeros)
    assert seen == [torch.bfloat16]
    for other in (buf, copy.deepcopy(buf), pickle.loads(pickle.dumps(buf))):
        assert next(other.minibatches(1)).obs.dtype == torch.bfloat16
    reused = next(buf.minibatches(1, reuse=True))
    assert reused.obs.dtype == torch.bfloat16
    assert buf.nbytes == memory.plan(3, 1, ((2,), torch.bfloat16), 1, reused_minibatch=3, verbatim=True).nbytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage(dtype, backend):
    buf = RolloutBuffer(33, 4, obs={"a": 17, "b": (2, 3), "c": ((4,), torch.float32)}, actions=4, obs_dtype=dtype)
    assert buf.layout.fields["obs.a"].dtype == buf.layout.fields["obs.b"].dtype == dtype
    assert buf.layout.fields["obs.c"].dtype == torch.float32  # a field's own dtype takes precedence
    buf = RolloutBuffer(33, 4, obs=17, actions=4, obs_dtype=dtype, backend=backend)
    steps = [random_step(buf) for _ in range(4)]
    for step in steps:
        step["obs"] = torch.randn(33, 17) * 100
        buf.append(**step)
    assert buf.obs.dtype == dtype
    check_contents(buf, steps)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_rows_longer_than_a_block(num_envs, backend):
    """Image rows of 27,648 uint8, next to a float group and one in half precision."""
    groups = {"camera": ((3, 96, 96), torch.uint8), "state": 3, "low": ((70, 70), torch.float16)}
    buf = RolloutBuffer(num_envs, 3, obs=groups, actions=1, capacity=4, backend=backend)
    assert buf.layout.row_bytes > 16384
    check_contents(buf, fill(buf))
    buf.clear()
    check_contents(buf, fill(buf))  # wraps


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x.t().contiguous().t()


def inner_gaps(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x.roll(1, 0)], -1)[..., 0]


def row_gaps(x: torch.Tensor) -> torch.Tensor:
    other = x.roll(1, 0)
    return torch.stack([x, other], 1)[:, 0] if x.dim() == 1 else torch.cat([x, other], 1)[:, : x.shape[1]]


def same_for_all_envs(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape)


def same_inside(x: torch.Tensor) -> torch.Tensor:
    return x[(slice(None), *(slice(0, 1) for _ in x.shape[1:]))].expand(x.shape)


def column(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(1) if x.dim() == 1 else x


ARRANGE = {f.__name__: f for f in (channels_last, inner_gaps, row_gaps, same_for_all_envs, same_inside, column)}
ARRANGE["every_third"] = lambda x: torch.stack([x.roll(1, 0), x, x.roll(2, 0)], 1).flatten(0, 1)[1::3]
ARRANGE["unaligned"] = lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("how", ARRANGE)
@pytest.mark.parametrize("num_envs", [1, 35])
def test_sources_of_any_strides(how, num_envs, backend):
    buf = RolloutBuffer(num_envs, 2, obs=GROUPS, actions=((2,), torch.int64), fields=FIELDS, backend=backend)
    steps = []
    for _ in range(2):
        step = random_step(buf)
        for name, x in step.items():
            arrange = ARRANGE[how] if how != "channels_last" or name == "obs" else lambda y: y
            step[name] = {k: arrange(y) for k, y in x.items()} if name == "obs" else arrange(x)
        steps.append(step)
        buf.append(**step)
    check_contents(buf, steps)


def test_conversion_of_floats(backend):
    """float64 and half sources are rounded to the stored dtype as PyTorch rounds them."""
    for source in (torch.float64, torch.float16, torch.bfloat16):
        groups = {"a": 17, "h": (5, torch.float16), "b": (5, torch.bfloat16), "d": (3, torch.float64)}
        buf = RolloutBuffer(35, 2, obs=groups, actions=4, fields={"mu": 4}, backend=backend)
        steps = [random_step(buf) for _ in range(2)]
        for step in steps:
            step["obs"] = {name: torch.randn(x.shape).to(source) for name, x in step["obs"].items()}
            for name in ("actions", "mu", "values", "log_probs", "rewards"):
                step[name] = step[name].to(source)
            buf.append(**step)
        for name in ("actions", "mu", "values", "log_probs"):
            assert torch.equal(buf[name], stacked(steps, name).float())
        assert torch.equal(buf.rewards, stacked(steps, "rewards").float())
        assert torch.equal(buf.values, buf["values"])
        for name in groups:
            assert torch.equal(buf.obs[name], stacked(steps, "obs", name).to(buf.obs[name].dtype))


def test_scalars_as_columns_and_flags_of_any_dtype(backend):
    buf = RolloutBuffer(70, 6, obs=3, actions=1, final_obs_rows=0, backend=backend)
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16, torch.float64]
    codes = []
    for dtype in dtypes:
        step = random_step(buf)
        code = torch.randint(0, 4, (70,))
        flags = {"dones": code > 0, "truncated": code == 2, "valid": code != 3}
        two = 1 if dtype == torch.bool else 2
        step |= {name: (x.to(dtype) * two).unsqueeze(1) for name, x in flags.items()}
        step |= {name: step[name].unsqueeze(1) for name in ("rewards", "values", "log_probs")}
        buf.append(**step)
        codes.append(code)
    assert torch.equal(buf.dones, torch.stack(codes, 1).byte())


def test_inputs_that_require_grad_leave_no_graph(backend):
    """Appended twice: a plane that had joined a graph would reject the second step, or keep its graph."""
    buf = RolloutBuffer(8, 2, obs=3, actions=2, backend=backend)
    for _ in range(2):
        step = random_step(buf)
        wanted = ("obs", "actions", "values", "log_probs", "rewards")
        step |= {name: step[name].clone().requires_grad_() * 1 for name in wanted}
        buf.append(**step)
    assert not any(x.requires_grad for x in buf._storage.tensors.values())
    assert not buf.values.requires_grad and not buf.rewards.requires_grad and not buf.obs.requires_grad


# ---------------------------------------------------------------------------------------------- errors

STEP = {"obs": torch.zeros(4, 3), "actions": torch.zeros(4, dtype=torch.int64), "rewards": torch.zeros(4)}
STEP |= {"dones": torch.zeros(4), "values": torch.zeros(4), "log_probs": torch.zeros(4), "mu": torch.zeros(4, 2)}

FLOAT8 = torch.zeros(4, 3, dtype=torch.float8_e5m2)

BAD_STEPS = [
    ({"obs": torch.zeros(5, 3)}, ValueError, r"^obs: expected shape \[4, 3\], got \[5, 3\]$"),
    ({"obs": torch.zeros(3, 4)}, ValueError, r"^obs: expected shape \[4, 3\], got \[3, 4\]$"),
    ({"obs": torch.zeros(12)}, ValueError, r"^obs: expected shape \[4, 3\], got \[12\]$"),
    ({"obs": torch.zeros(4, 3, 1)}, ValueError, r"^obs: expected shape \[4, 3\], got \[4, 3, 1\]$"),
    ({"obs": {"obs": torch.zeros(4, 3)}}, TypeError, r"^obs: expected a tensor, got dict$"),
    ({"obs": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, r"^obs: expected dtype torch.float32, got torch.int32$"),
    ({"obs": torch.zeros(4, 3).to_sparse()}, TypeError, r"^obs: expected a strided tensor"),
    ({"obs": torch.zeros(4, 3, device="meta")}, ValueError, r"^obs: expected device cpu, got meta$"),
    ({"actions": torch.zeros(4)}, TypeError, r"^actions: expected dtype torch.int64, got torch.float32$"),
    ({"actions": torch.zeros(4).int()}, TypeError, r"^actions: expected dtype torch.int64, got torch.int32$"),
    ({"actions": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"^actions: expected shape \[4\], got \[4, 2\]$"),
    ({"rewards": torch.zeros(4).long()}, TypeError, r"^rewards: expected a floating dtype, got torch.int64$"),
    ({"rewards": torch.zeros(1, 4)}, ValueError, r"^rewards: expected shape \[4\] or \[4, 1\], got \[1, 4\]$"),
    ({"rewards": 0.0}, TypeError, r"^rewards: expected a tensor, got float$"),
    ({"rewards": torch.zeros(4, device="meta")}, ValueError, r"^rewards: expected device cpu, got meta$"),
    ({"dones": torch.zeros(5)}, ValueError, r"^dones: expected shape \[4\] or \[4, 1\], got \[5\]$"),
    ({"dones": torch.zeros(4, dtype=torch.complex64)}, TypeError, r"^dones: expected a real dtype"),
    ({"dones": FLOAT8[:, 0]}, TypeError, r"^dones: expected one of torch.uint8, .*, got torch.float8_e5m2$"),
    ({"rewards": FLOAT8[:, 0]}, TypeError, r"^rewards: expected one of torch.float16, .*, got torch.float8_e5m2$"),
    ({"obs": FLOAT8}, TypeError, r"^obs: expected dtype torch.float32, got torch.float8_e5m2$"),
    ({"values": torch.zeros(4, 1, 1)}, ValueError, r"^values: expected shape \[4\], got \[4, 1, 1\]$"),
    ({"values": torch.zeros(4, 2)}, ValueError, r"^values: expected shape \[4\], got \[4, 2\]$"),
    ({"values": torch.zeros(4, dtype=torch.int64)}, TypeError, r"^values: expected dtype torch.float32"),
    ({"log_probs": torch.zeros(())}, ValueError, r"^log_probs: expected shape \[4\], got \[\]$"),
    ({"truncated": torch.zeros(3)}, ValueError, r"^truncated: expected shape \[4\]"),
    ({"valid": torch.zeros(3)}, ValueError, r"^valid: expected shape \[4\]"),
    ({"mu": torch.zeros(4, 3)}, ValueError, r"^mu: expected shape \[4, 2\], got \[4, 3\]$"),
    ({"mu": torch.zeros(4, 2, 1)}, ValueError, r"^mu: expected shape \[4, 2\], got \[4, 2, 1\]$"),
    ({"sigma": torch.zeros(4, 2)}, TypeError, r"^sigma: not a field of this buffer; it has mu$"),
    ({"final_obs": torch.zeros(4, 3)}, ValueError, r"^final_obs: expected truncated with it, got None$"),
    ({"final_obs": torch.zeros(4, 2), "truncated": torch.ones(4)}, ValueError, r"^final_obs: expected shape \[4, 3\]"),
    ({"final_obs": {"a": 1}, "truncated": torch.ones(4)}, TypeError, r"^final_obs: expected a tensor, got dict$"),
    ({"mu": None}, TypeError, r"^mu: expected a tensor, got NoneType$"),
]


@pytest.mark.parametrize("change, error, message", BAD_STEPS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_refused_step_leaves_everything_as_it_was(change, error, message, backend):
    buf = RolloutBuffer(4, 2, obs=3, actions=((), torch.int64), fields={"mu": 2}, backend=backend)
    buf.append(**{name: torch.ones_like(x) for name, x in STEP.items()})
    before = memory_bytes(buf)
    with pytest.raises(error, match=message):
        buf.append(**STEP | change)
    assert memory_bytes(buf) == before and len(buf) == 1
    buf.append(**STEP)
    buf.compute_gae(torch.zeros(4))  # needs no bootstrap: the refused `truncated` left no trace


def test_pictures_turned_round():
    """The operations check a field's number of elements; Python checks the order of its dimensions."""
    buf = RolloutBuffer(4, 2, obs=(2, 3), actions=1, max_episode_length=2)
    turned, right = torch.zeros(4, 3, 2), torch.zeros(4, 2, 3)
    step = {name: torch.zeros(4) for name in ("rewards", "dones", "values", "log_probs")}
    step |= {"actions": torch.zeros(4, 1), "truncated": torch.ones(4)}
    for change in ({"obs": turned, "final_obs": right}, {"obs": right, "final_obs": turned}):
        with pytest.raises(ValueError, match=r"obs: expected shape \[4, 2, 3\], got \[4, 3, 2\]$"):
            buf.append(**step, **change)
    buf.append(**step, obs=right, final_obs=right)
    assert len(buf) == 1


@pytest.mark.parametrize("num_envs", [1, 64])
def test_a_view_of_the_step_that_is_written_is_refused(num_envs, backend):
    """With a view kept from an earlier rollout, the copy would read what it had just overwritten."""
    buf = RolloutBuffer(num_envs, 2, obs=24, actions=24, max_episode_length=2, backend=backend)
    step = {name: torch.rand(num_envs) for name in ("rewards", "dones", "values", "log_probs")}
    step |= {"obs": torch.rand(num_envs, 24), "actions": torch.rand(num_envs, 24)}
    for _ in range(2):
        buf.append(**step)
    obs, actions, values, rewards = buf.obs[:, 0], buf.actions[:, 0], buf.values[:, 0], buf.rewards[:, 0]
    buf.clear()
    before = memory_bytes(buf)
    changes = [{"obs": actions, "actions": obs}, {"rewards": values}, {"values": rewards}, {"log_probs": values}]
    changes.append({"truncated": torch.ones(num_envs), "final_obs": obs})
    for change in changes:
        if buf._storage.ops.checks:
            with pytest.raises(
                RuntimeError, match="expected memory of its own, got a view of the step that is written"
            ):
                buf.append(**step | change)
            assert memory_bytes(buf) == before and len(buf) == 0
    buf.append(**step)
    kept = buf.obs[:, 0].clone()
    buf.append(**step | {"obs": buf.obs[:, 0], "values": buf.values[:, 0], "rewards": buf.values[:, 0]})  # another's
    assert torch.equal(buf.obs[:, 1], kept)
    assert torch.equal(buf.values[:, 1], step["values"]) and torch.equal(buf.rewards[:, 1], step["values"])


def test_a_view_over_a_step_of_which_no_row_is_written_is_taken(backend):
    """end() after slot() writes no row, so a final observation may be a view of the ring that overlaps the step."""
    buf = RolloutBuffer(2, 2, obs=3, actions=1, max_episode_length=2, backend=backend)
    zeros, ones = torch.zeros(2), torch.ones(2)
    buf.append(
        obs=torch.rand(2, 3), actions=torch.zeros(2, 1), rewards=zeros, dones=zeros, values=zeros, log_probs=zeros
    )
    buf.slot()["obs"].copy_(torch.rand(2, 3))
    over = buf._storage.views["obs.obs"].transpose(0, 1)[0]  # the first environment's two steps
    buf.end(rewards=zeros, dones=ones, truncated=ones, final_obs=over)
    seen = []
    buf.compute_gae(zeros, value_fn=lambda obs: seen.append(obs.clone()) or zeros)
    assert torch.equal(seen[0].sort(0).values, over.sort(0).values)


def test_missing_arguments():
    buf = RolloutBuffer(4, 2, obs=3, actions=((), torch.int64), fields={"mu": 2})
    with pytest.raises(TypeError, match=r"^mu: expected a tensor for this field, got none$"):
        buf.append(**{name: x for name, x in STEP.items() if name != "mu"})
    with pytest.raises(TypeError, match=r"'rewards'"):
        buf.append(**{name: x for name, x in STEP.items() if name != "rewards"})
    with pytest.raises(ValueError, match=r"^obs: expected the groups \['a', 'b'\], got \['a'\]$"):
        RolloutBuffer(4, 2, obs={"a": 1, "b": 2}, actions=1).begin(
            obs={"a": torch.zeros(4, 1)}, actions=torch.zeros(4, 1), values=torch.zeros(4), log_probs=torch.zeros(4)
        )
    with pytest.raises(KeyError, match=r"sigma: not a field of this buffer; it has obs, .*mu"):
        buf["sigma"]
    with pytest.raises(KeyError):
        buf["final_row"]


CONSTRUCTOR = [
    ({"num_envs": 0}, ValueError, "^num_envs: expected at least 1, got 0$"),
    ({"num_envs": 4.0}, TypeError, "^num_envs: expected an int, got float$"),
    ({"num_steps": True}, TypeError, "^num_steps: expected an int, got bool$"),
    ({"num_envs": 2**20, "num_steps": 2**11}, ValueError, r"^num_envs: .*2\*\*31"),
    ({"capacity": 1}, ValueError, "^capacity: expected at least num_steps, 2, got 1$"),
    ({"capacity": 2.5}, TypeError, "^capacity: expected an int, got float$"),
    ({"obs": 0}, ValueError, "^obs: expected a positive int, a shape or"),
    ({"obs": (3, -1)}, ValueError, "^obs: expected a positive int, a shape or"),
    ({"obs": "17"}, ValueError, "^obs: "),
    ({"obs": {}}, ValueError, "^obs: expected at least one group"),
    ({"obs": {"a": (3, torch.complex64)}}, TypeError, r"^obs\['a'\]: expected a dtype of"),
    ({"verbatim": "no"}, TypeError, "^verbatim: expected a bool, got str$"),
    ({"obs_dtype": torch.float64}, TypeError, "^obs_dtype: expected float32, float16 or bfloat16, got torch.float64$"),
    ({"actions": None}, ValueError, "^actions: expected a positive int"),
    ({"fields": {"values": 1}}, ValueError, "^fields: 'values' is no name for a field"),
    ({"fields": {"final_row": 3}}, ValueError, "^fields: 'final_row' is no name for a field"),
    ({"fields": {"self": 3}}, ValueError, "^fields: 'self' is no name for a field"),
    ({"fields": {"a b": 1}}, ValueError, "^fields: 'a b' is no name for a field"),
    ({"fields": {"mu": 0}}, ValueError, r"^fields\['mu'\]: expected a positive int"),
    ({"final_obs_rows": -1}, ValueError, "^final_obs_rows: expected an int of at least 0, or None, got -1$"),
    ({"max_episode_length": 0}, ValueError, "^max_episode_length: expected at least 1, got 0$"),
    ({"backend": "tpu"}, ValueError, "^backend: expected one of .*got 'tpu'$"),
]


@pytest.mark.parametrize("change, error, message", CONSTRUCTOR, ids=lambda x: x if isinstance(x, str) else "")
def test_constructor_errors(change, error, message):
    with pytest.raises(error, match=message):
        RolloutBuffer(**{"num_envs": 4, "num_steps": 2, "obs": 3, "actions": 1} | change)


def test_compute_gae_errors(backend):
    buf = RolloutBuffer(4, 2, obs=3, actions=1, capacity=3, backend=backend)
    fill(buf, 1)
    last = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"^compute_gae: expected a rollout of 2 steps, 1 are stored$"):
        buf.compute_gae(last)
    buf.append(**random_step(buf) | {"truncated": torch.zeros(4)})
    for name in ("advantages", "returns", "statistics"):
        with pytest.raises(RuntimeError, match=rf"^{name}: expected compute_gae\(\) before it$"):
            getattr(buf, name)
    before = memory_bytes(buf)
    cases = [
        ({}, ValueError, "^truncated: expected a bootstrap.* final_values, value_fn, timeout_bootstrap"),
        ({"value_fn": len, "final_values": last}, ValueError, "^value_fn: expected one bootstrap.*final_values and"),
        (
            {"value_fn": len, "timeout_bootstrap": "next_value"},
            ValueError,
            "^timeout_bootstrap: expected one bootstrap",
        ),
        ({"timeout_bootstrap": "x"}, ValueError, "^timeout_bootstrap: expected None, .*got 'x'"),
        ({"final_values": torch.zeros(2, 4)}, ValueError, r"^final_values: expected shape \[4, 2\], got \[2, 4\]$"),
        ({"final_values": torch.zeros(4, 2).long()}, TypeError, r"^final_values: expected a floating dtype"),
        ({"gamma": float("nan"), "timeout_bootstrap": "next_value"}, ValueError, "^gamma: expected a number in"),
        ({"lam": 2, "timeout_bootstrap": "next_value"}, ValueError, "^lam: expected a number in"),
        ({"last_values": torch.zeros(3), "timeout_bootstrap": "next_value"}, ValueError, r"^last_values: expected"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            buf.compute_gae(**{"last_values": last} | change)
        assert memory_bytes(buf) == before
    with pytest.raises(RuntimeError, match=r"^minibatches: expected compute_gae"):
        buf.minibatches()
    buf.compute_gae(last, timeout_bootstrap="next_value")
    assert buf.statistics[0] == 8


def test_every_public_name_works_as_an_item(backend):
    buf = RolloutBuffer(2, 1, obs=3, actions=2, fields={"mu": 2}, backend=backend)
    ones = torch.ones(2)
    buf.append(
        obs=torch.ones(2, 3),
        actions=torch.ones(2, 2),
        rewards=ones,
        dones=ones,
        values=ones,
        log_probs=ones,
        mu=torch.ones(2, 2),
    )
    buf.compute_gae(ones.requires_grad_())  # last values that require grad are detached
    for name in ("obs", "actions", "log_probs", "values", "rewards", "dones", "truncated", "advantages", "returns"):
        assert torch.equal(buf[name], getattr(buf, name))
    assert torch.equal(buf["mu"], torch.ones(2, 1, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "foo"}, ValueError, "^device: expected a device that PyTorch knows, got 'foo'"),
        ({"seed": 1.5}, TypeError, "^seed: expected an int, got float"),
        ({"rank": None}, TypeError, "^rank: expected an int, got NoneType"),
        ({"fields": ["a"]}, TypeError, "^fields: expected a mapping"),
        ({"obs": {0: 3}}, TypeError, "^obs: expected names of groups as str, got 0"),
        pytest.param(
            {"device": "cuda"},
            ValueError,
            "^device: expected one that this PyTorch can use, got 'cuda'",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_more_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        RolloutBuffer(**{"num_envs": 2, "num_steps": 1, "obs": 3, "actions": 2, **arguments})


@pytest.mark.parametrize("column", ["none", "log_probs", "values", "both"])
def test_scalars_as_columns_take_the_short_way(column, monkeypatch):
    """rsl_rl has values [N, 1]: Python does not repeat the checks of the operation."""
    reason = pydrone.backends()["cpu"]
    if reason is not None:
        pytest.skip(f"cpu: {reason}")
    buf = RolloutBuffer(3, 2, obs=2, actions=1)
    monkeypatch.setattr(buf._steps.sources, "row", lambda given: pytest.fail("checked argument by argument"))
    step = {name: torch.arange(3.0) + i for i, name in enumerate(("rewards", "dones", "values", "log_probs"))}
    for name in ("values", "log_probs"):
        if column in (name, "both"):
            step[name] = step[name].unsqueeze(1)
    for _ in range(2):
        buf.append(obs=torch.zeros(3, 2), actions=torch.zeros(3, 1), **step)
    assert buf.values.tolist() == [[2, 2], [3, 3], [4, 4]]
    assert buf.log_probs.tolist() == [[3, 3], [4, 4], [5, 5]]
