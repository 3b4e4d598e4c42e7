"""Minibatches: each epoch a different, uniform permutation, the same on every backend; sizes and normalisation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from rollout_model import fill, gae_loop, random_step, stacked

import pydrone
from pydrone import RolloutBuffer
from pydrone.ops.dispatch import select


def ready(num_envs: int, num_steps: int, backend: str | None = None, valid=None, **options) -> RolloutBuffer:
    """A small buffer with its advantages computed. ``valid``: [N, T]."""
    buf = RolloutBuffer(num_envs, num_steps, obs=1, actions=1, backend=backend, **options)
    for t in range(num_steps):
        step = random_step(buf, ends=False)
        buf.append(**step | ({} if valid is None else {"valid": valid[:, t]}))
    buf.compute_gae(torch.zeros(num_envs))
    return buf


def order(buf: RolloutBuffer, count: int = 1, **options) -> list[int]:
    return torch.cat([mb.indices for mb in buf.minibatches(count, **options)]).tolist()


# ---------------------------------------------------------------------------------------------- permutations


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (1, 3), (5, 1), (7, 2), (1, 64), (33, 31), (500, 7)])
def test_every_epoch_is_a_bijection(shape, backend):
    samples = shape[0] * shape[1]
    buf = ready(*shape, backend)
    for count in {1, min(3, samples), min(7, samples), min(samples, 64)}:
        assert sorted(order(buf, count)) == list(range(samples))


def test_no_two_permutations_alike(backend):
    """Epochs, calls, rollouts, seeds and ranks each have their own permutations; the same seed repeats them."""
    made = {}

    def note(key, buf, epochs: int = 1) -> None:
        indices = [mb.indices for mb in buf.minibatches(1, num_epochs=epochs)]
        for epoch, x in enumerate(indices):
            assert sorted(x.tolist()) == list(range(24))
            made[(*key, epoch)] = tuple(x.tolist())

    for seed, rank in [(0, 0), (1, 0), (0, 1), (1, 1), (-1, 0), (2**32, 0), (2**63, 0), (0, 2**32)]:
        buf = ready(8, 3, backend, seed=seed, rank=rank)
        note((seed, rank, 0, "first call"), buf, 3)
        note((seed, rank, 0, "second call"), buf)
        buf.clear()
        fill(buf, ends=False)
        buf.compute_gae(torch.zeros(8))
        note((seed, rank, 1, "first call"), buf, 3)
    assert len(set(made.values())) == len(made) == 8 * 7
    again = ready(8, 3, backend, seed=1, rank=1)
    assert [tuple(mb.indices.tolist()) for mb in again.minibatches(1, num_epochs=3)] == [
        made[1, 1, 0, "first call", epoch] for epoch in range(3)
    ]


@pytest.mark.skipif(pydrone.backends()["cpu"] is not None, reason=str(pydrone.backends()["cpu"]))
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (37, 29), (11, 49), (7, 107), (1024, 100)])
def test_backends_agree_bit_for_bit(shape):
    """49 and 107: T times its rounded reciprocal is less than 1."""
    valid = torch.rand(shape) < 0.8
    valid[0, 0] = True
    for mask in (None, valid):
        buffers = []
        for backend in ("reference", "cpu"):
            torch.manual_seed(1)
            buffers.append(ready(*shape, backend, valid=mask, seed=5, rank=3, capacity=shape[1] + 1))
        count = min(3, int(valid.sum()))
        for options in ({"num_epochs": 2}, {"drop_last": True}, {"shuffle": "none"}):
            parts = [list(buf.minibatches(count, **options)) for buf in buffers]
            assert len(parts[0]) == len(parts[1])
            for x, y in zip(*parts):
                assert torch.equal(x.indices, y.indices)
                assert torch.equal(x.obs, y.obs) and torch.equal(x.values, y.values)


def indices_of(samples: int, num_steps: int, key: int, rollout: int, epoch: int = 0) -> torch.Tensor:
    """One permutation, straight from the operation."""
    out = torch.empty(samples, dtype=torch.int64)
    rows = torch.empty(num_steps, samples // num_steps, 0, dtype=torch.uint8)
    select(torch.device("cpu")).gather(
        *(rows, [], [], [], 0, None, None, None, None, num_steps, 0, samples, key, rollout, epoch, True, 0, None),
        *(None, None, out),
    )
    return out


def surprise(counts: torch.Tensor, freedom: int) -> float:
    """The chi-square statistic against equal counts, in standard deviations (Wilson and Hilferty 1931)."""
    expected = counts.double().mean()
    ratio = float(((counts - expected) ** 2 / expected).sum()) / freedom
    return (ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


LIMIT = 4.75  # p of about 1e-6

SMALL = [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (5, 1), (1, 7), (4, 2), (3, 3), (11, 1), (6, 2), (13, 1), (8, 4)]


def position_and_neighbour(permutations: torch.Tensor) -> tuple[float, float]:
    """Of permutations [K, M]: how far from uniform are the images of a position, and of a pair of neighbours."""
    m = permutations.shape[1]
    cells = torch.arange(m) * m + permutations
    position = surprise(torch.bincount(cells.flatten(), minlength=m * m), (m - 1) ** 2)
    if m < 3:
        return position, 0.0
    gap = (permutations[:, 1:] - permutations[:, :-1]) % m
    at = (m - 1) // 2  # one pair per permutation: the others depend on it
    pairs = torch.bincount(gap[:, 0], minlength=m)[1:] + torch.bincount(gap[:, at], minlength=m)[1:] * (at > 1)
    return position, surprise(pairs, m - 2)


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_small_permutations_are_uniform(shape):
    m = shape[0] * shape[1]
    draws = torch.stack([indices_of(m, shape[1], key=99, rollout=i) for i in range(3000)])
    position, neighbour = position_and_neighbour(draws)
    assert position < LIMIT and neighbour < LIMIT


def test_the_measure_finds_bad_permutations():
    """Rotations, multiples and pairwise swaps of neighbours are bijections too."""
    m, i = 13, torch.arange(3000).unsqueeze(1)
    rotated = (torch.arange(m) + i) % m
    position, neighbour = position_and_neighbour(rotated)
    assert position < LIMIT < neighbour
    kept = torch.arange(m).expand(3000, m)
    assert position_and_neighbour(kept)[0] > LIMIT
    good = torch.stack([torch.randperm(m) for _ in range(3000)])
    assert max(position_and_neighbour(good)) < LIMIT


@pytest.mark.parametrize("shape", [(8192, 1), (1, 8192), (4096, 2), (1000, 100), (8192, 100), (8191, 97)], ids=str)
def test_large_permutations_mix(shape):
    """Images of a range of positions and of neighbours, on a grid of bins; the environments in a batch."""
    m, bins = shape[0] * shape[1], 16
    for epoch in range(2):
        x = indices_of(m, shape[1], key=7, rollout=3, epoch=epoch)
        to, at = x * bins // m, torch.arange(m) * bins // m
        assert abs(surprise(torch.bincount(at * bins + to, minlength=bins**2), (bins - 1) ** 2)) < LIMIT
        pairs = to[:-1] * bins + to[1:]
        assert abs(surprise(torch.bincount(pairs[::2], minlength=bins**2), bins**2 - 1)) < LIMIT
        # Neighbours in memory, n * T + t and the next, are not neighbours in a batch.
        near = ((x[1:] - x[:-1]).abs() == 1).sum().item()
        assert near < 2 + 6 * math.sqrt(2)  # Poisson, mean 2
        if shape[1] > 1:
            quarter = torch.bincount(x[: m // 4] % shape[1], minlength=shape[1])
            assert surprise(quarter, shape[1] - 1) < LIMIT
        fixed = (x == torch.arange(m)).sum().item()
        assert fixed <= 10  # Poisson, mean 1


def test_no_two_epochs_agree_more_than_chance():
    """Each row is a permutation; epoch, rollout and key count up from zero."""
    m = 1024
    draws = [indices_of(m, 4, 0, 0, epoch) for epoch in range(8)]
    draws += [indices_of(m, 4, 0, rollout) for rollout in range(1, 8)]
    draws += [indices_of(m, 4, key, 0) for key in range(1, 8)]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert (x == y).sum() <= 12  # Poisson, mean 1


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "count, sizes", [(1, [15]), (2, [7, 8]), (4, [3, 4, 4, 4]), (7, [2] * 6 + [3]), (15, [1] * 15)]
)
def test_sizes_differ_by_one(count, sizes, backend):
    buf = ready(5, 3, backend)
    made = [mb.indices for mb in buf.minibatches(count)]
    assert sorted(map(len, made)) == sorted(sizes)
    assert sorted(torch.cat(made).tolist()) == list(range(15))
    assert [len(mb) for mb in buf.minibatches(count, drop_last=True)] == [15 // count] * count
    assert len(set(order(buf, count, drop_last=True))) == 15 // count * count


def test_unshuffled(backend):
    buf = ready(5, 3, backend)
    for options in ({}, {"num_epochs": 2}):
        assert order(buf, 4, shuffle="none", **options) == list(range(15)) * (2 if options else 1)
    assert order(buf, 4, shuffle="none", drop_last=True) == list(range(12))


def test_tensors_are_fresh_unless_reused(backend):
    buf = ready(5, 3, backend)
    assert len({mb.obs.data_ptr() for mb in list(buf.minibatches(4, num_epochs=2))}) == 8
    kept = list(buf.minibatches(4, num_epochs=2, reuse=True))
    assert len({mb.obs.data_ptr() for mb in kept}) == len({mb.advantages.data_ptr() for mb in kept}) == 1
    assert {len(mb) for mb in kept} == {3, 4}
    for mb in buf.minibatches(4, reuse=True):
        env, step = mb.indices // 3, mb.indices % 3
        assert torch.equal(mb.obs, buf.obs[env, step]) and torch.equal(mb.values, buf.values[env, step])


def test_indices_asked_for_late(backend):
    """They stay those of their minibatch after other minibatches, clear() and overwriting."""
    buf = ready(9, 4, backend)
    kept = [(mb, mb.obs.clone()) for mb in buf.minibatches(3, num_epochs=2, reuse=False)]
    obs = buf.obs.clone()
    buf.clear()
    fill(buf, ends=False)
    buf.compute_gae(torch.zeros(9))
    list(buf.minibatches(2))
    for mb, x in kept:
        assert torch.equal(mb.obs, x) and torch.equal(obs[mb.indices // 4, mb.indices % 4], x)


# ---------------------------------------------------------------------------------------------- normalisation


def normal(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return (x - x.mean()) / (x.std() + 1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_normalisation(masked, backend):
    valid = torch.rand(50, 7) < 0.7 if masked else None
    buf = ready(50, 7, backend, valid=valid)
    sample = buf.advantages if valid is None else buf.advantages[valid]
    expected = torch.zeros(50, 7, dtype=torch.float64)
    expected[torch.ones(50, 7, dtype=torch.bool) if valid is None else valid] = normal(sample.flatten())
    for mb in buf.minibatches(3):
        assert torch.allclose(mb.advantages.double(), expected[mb.indices // 7, mb.indices % 7], atol=1e-5)
        assert torch.equal(mb.returns, buf.returns[mb.indices // 7, mb.indices % 7])
    for mb in buf.minibatches(3, normalize_advantages="minibatch"):
        own = normal(buf.advantages[mb.indices // 7, mb.indices % 7])
        assert torch.allclose(mb.advantages.double(), own, atol=1e-5)
    for mb in buf.minibatches(3, normalize_advantages=False):
        assert torch.equal(mb.advantages, buf.advantages[mb.indices // 7, mb.indices % 7])


def test_written_statistics_are_what_minibatches_use(backend):
    buf = ready(10, 3, backend)
    buf.statistics.copy_(torch.tensor([30.0, 2.0, 29 * 16.0]))
    mb = next(buf.minibatches(1, shuffle="none"))
    assert torch.allclose(mb.advantages, (buf.advantages.flatten() - 2) / 4, atol=1e-6)


def test_normalising_hardly_anything(backend):
    buf = ready(1, 1, backend)
    for how in (True, "minibatch"):
        assert next(buf.minibatches(1, normalize_advantages=how)).advantages.tolist() == [0.0]
    buf = ready(4, 2, backend)
    made = [mb.advantages for mb in buf.minibatches(8, normalize_advantages="minibatch")]
    assert torch.cat(made).tolist() == [0.0] * 8


@pytest.mark.parametrize("num_envs", [48, 100])
def test_equal_advantages_give_no_nans(num_envs, backend):
    buf = RolloutBuffer(num_envs, 3, obs=1, actions=1, backend=backend)
    for _ in range(3):
        equal = {"rewards": torch.full((num_envs,), 0.1), "values": torch.zeros(num_envs)}
        buf.append(**random_step(buf, ends=False) | equal)
    buf.compute_gae(torch.zeros(num_envs), gamma=0.0)
    assert next(buf.minibatches(1)).advantages.abs().max() < 0.5


def test_truthy_normalisation_normalises(backend):
    """1 and numpy's True equal True: they must be refused or act as True."""
    buf = ready(50, 7, backend)
    try:
        made = next(buf.minibatches(1, normalize_advantages=1))
    except (TypeError, ValueError):
        return
    assert abs(made.advantages.mean()) < 1e-5 and abs(made.advantages.std() - 1) < 1e-4


# ---------------------------------------------------------------------------------------------- lazy ones

FIELDS = ("obs", "actions", "values", "log_probs", "advantages", "returns")
OVERWRITTEN = "^minibatches: with reuse, a later minibatch has taken over this one's tensors"
DISCARDED = "^minibatches: the rollout was discarded while they were being read$"


def contents(mb) -> list[torch.Tensor]:
    return [mb[name].clone() for name in FIELDS]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("gathered", [False, True], ids=["not gathered", "gathered"])
def test_an_older_lazy_minibatch_does_not_overwrite_the_last(gathered, backend):
    buf = ready(5, 3, backend)
    plain = [contents(mb) for mb in copy.deepcopy(buf).minibatches(2)]
    reading = buf.minibatches(2, reuse=True, lazy=True)
    first = next(reading)
    numbers = first.indices
    if gathered:
        assert equal(contents(first), plain[0])
    last = next(reading)
    assert equal(contents(last), plain[1])
    for name in FIELDS:
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            first[name]
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        copy.deepcopy(first)
    assert equal(contents(last), plain[1]) and torch.equal(first.indices, numbers)
    assert len(first) == len(numbers) and repr(first) == f"Minibatch({len(first)} samples: {', '.join(NAMES)})"
    # place() points into the ring, so an overwritten minibatch can still be used.
    assert first.place().numbers[-2:] == [0, len(first)]


@pytest.mark.parametrize("other", [{"lazy": True}, {}], ids=["lazy", "not lazy"])
def test_two_iterators_over_the_same_tensors(other, backend):
    """The most recent minibatch of either owns the tensors; other sizes, or no reuse, mean other tensors."""
    buf = ready(6, 3, backend)
    one, two = buf.minibatches(2, reuse=True, lazy=True), buf.minibatches(2, reuse=True, **other)
    first, second = next(one), next(two)
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        first.obs  # noqa: B018
    expected = buf.obs[second.indices // 3, second.indices % 3]
    assert torch.equal(second.obs, expected)
    apart = [next(buf.minibatches(3, reuse=True, lazy=True)), next(buf.minibatches(2, lazy=True))]
    for mb in apart:
        assert torch.equal(mb.obs, buf.obs[mb.indices // 3, mb.indices % 3])
    assert torch.equal(second.obs, expected) and equal([x.obs for x in apart], [x.obs for x in apart])
    third = next(one)
    assert torch.equal(third.obs, buf.obs[third.indices // 3, third.indices % 3])
    if other:
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            second.obs  # noqa: B018


def again(buf: RolloutBuffer) -> None:
    """Collects another rollout with the same number."""
    fill(buf, ends=False)
    buf.compute_gae(torch.zeros(buf.num_envs))


def loaded(buf: RolloutBuffer) -> None:
    other = ready(buf.num_envs, buf.num_steps, capacity=buf.capacity, seed=5)
    assert other._ring.rollout == buf._ring.rollout
    buf.load_state_dict(other.state_dict())


def rewound(buf: RolloutBuffer) -> None:
    buf.load_state_dict(RolloutBuffer(buf.num_envs, buf.num_steps, 1, 1, capacity=buf.capacity).state_dict())
    again(buf)


def advanced(buf: RolloutBuffer) -> None:
    buf.advance(0, rollouts=1)
    again(buf)


@pytest.mark.parametrize("discard", [loaded, rewound, advanced, lambda buf: buf.clear()])
def test_a_lazy_minibatch_of_another_rollout(discard, backend):
    buf = ready(5, 3, backend, capacity=6)
    reading, begun = buf.minibatches(3, lazy=True), buf.minibatches(3)
    kept, late = next(reading), next(reading)
    before, numbers = contents(kept), late.indices
    discard(buf)
    for use in (late.place, kept.place, lambda: late.obs, lambda: late["returns"], lambda: copy.deepcopy(late)):
        with pytest.raises(RuntimeError, match=DISCARDED):
            use()
    for iterator in (reading, begun):
        with pytest.raises(RuntimeError, match=DISCARDED):
            next(iterator)
    # Gathered data belongs to the minibatch, and so do its indices.
    assert equal(contents(kept), before) and torch.equal(late.indices, numbers)


def test_a_lazy_minibatch_of_other_advantages(backend):
    buf = ready(5, 3, backend)
    mb = next(buf.minibatches(2, lazy=True))
    buf.compute_gae(torch.ones(5))
    for use in (mb.place, lambda: mb.obs):
        with pytest.raises(RuntimeError, match=r"^minibatches: compute_gae\(\) has renewed the advantages"):
            use()


def test_a_lazy_minibatch_while_the_next_rollout_is_collected(backend):
    """Eager or by replays, the minibatch's own rollout is still there."""
    buf = ready(5, 3, backend, capacity=6)
    expected = [contents(mb) for mb in copy.deepcopy(buf).minibatches(3)]
    found = []
    for mb in buf.minibatches(3, lazy=True):
        buf.append(**random_step(buf))
        buf.advance(0)
        mb.place()
        found.append(contents(mb))
    assert all(map(equal, found, expected)) and len(found) == 3


NAMES = ("obs.obs", "actions", "log_probs", "values", "advantages", "returns")


def test_what_does_not_gather_a_lazy_minibatch(backend):
    buf = ready(5, 3, backend)
    plain = next(copy.deepcopy(buf).minibatches(2))
    mb = next(buf.minibatches(2, lazy=True))
    assert repr(mb) == repr(plain) and len(mb) == len(plain) and torch.equal(mb.indices, plain.indices)
    with pytest.raises(KeyError, match=r"sigma: not in this minibatch; it has obs\.obs, actions"):
        mb["sigma"]
    assert mb._gathered is None
    buf.clear()
    assert repr(mb) == repr(plain)  # a debugger may call it at any time


@pytest.mark.parametrize("lazy", [False, True])
def test_copies(lazy, backend):
    """A deep copy has its own tensors; a shallow copy of a lazy, reused minibatch is overwritten together with it."""
    buf = ready(5, 3, backend)
    expected = contents(next(copy.deepcopy(buf).minibatches(2)))
    reading = buf.minibatches(2, reuse=True, lazy=lazy)
    mb = next(reading)
    deep, shallow = copy.deepcopy(mb), copy.copy(mb)
    assert type(deep) is pydrone.buffer.Minibatch and equal(contents(shallow), expected)
    assert deep.obs.data_ptr() != mb.obs.data_ptr() == shallow.obs.data_ptr() and repr(deep) == repr(mb)
    numbers = deep.indices
    next(reading).obs  # noqa: B018
    buf.clear()
    assert equal(contents(deep), expected) and torch.equal(deep.indices, numbers) and len(deep) == len(numbers)
    if lazy:
        with pytest.raises(RuntimeError, match=OVERWRITTEN):
            shallow.obs  # noqa: B018


def test_indices_after_another_seed_was_loaded(backend):
    buf = ready(5, 3, backend)
    made = [next(buf.minibatches(2, lazy=lazy)) for lazy in (False, True)]
    before = [mb.indices for mb in made]
    buf.load_state_dict(ready(5, 3, backend, seed=9).state_dict())
    assert equal([mb.indices for mb in made], before)


def test_what_is_captured_is_read_by_the_devices_counters():
    """Which lag behind the host's after advance() reports a clear(). Outside, a lazy minibatch would follow those."""
    buf = ready(5, 3, capacity=6)
    buf.advance(3, rollouts=1)
    with buf.as_captured():
        for _ in range(3):
            buf.append(**random_step(buf))
        buf.compute_gae(torch.zeros(5))
        plain, lazy = ([contents(mb) for mb in buf.minibatches(2, shuffle="none", lazy=x)] for x in (False, True))
        (drawn,) = buf.minibatches(1, lazy=True)
    assert all(map(equal, plain, lazy)) and drawn.place
    with pytest.raises(RuntimeError, match="expected to be read in the capture"):
        _ = drawn.obs
    with pytest.raises(RuntimeError, match="expected to be read in the capture"):
        drawn.place()


# ---------------------------------------------------------------------------------------------- valid, errors


def test_only_valid_samples(backend):
    valid = torch.rand(20, 6) < 0.5
    buf = ready(20, 6, backend, valid=valid)
    numbers = valid.flatten().nonzero().squeeze(1).tolist()
    assert buf.statistics[0] == len(numbers)
    drawn = [order(buf, 3) for _ in range(2)]
    assert drawn[0] != drawn[1] and all(sorted(x) == numbers for x in drawn)
    assert order(buf, 3, shuffle="none") == numbers
    assert len(order(buf, 7, drop_last=True)) == len(numbers) // 7 * 7
    # The next rollout has no reset steps: all samples are valid again.
    buf.clear()
    steps = fill(buf, ends=False)
    buf.compute_gae(torch.zeros(20))
    assert sorted(order(buf, 3)) == list(range(120))
    expected = gae_loop(*(stacked(steps, x) for x in ("rewards", "values", "dones")), torch.zeros(20), 0.99, 0.95)[0]
    assert buf.statistics[1].item() == pytest.approx(expected.mean(), rel=1e-5)


def test_errors(backend):
    buf = ready(2, 3, backend)
    cases = [
        ({"num_minibatches": 0}, ValueError, "^num_minibatches: expected at least 1, got 0$"),
        ({"num_minibatches": 2.0}, TypeError, "^num_minibatches: expected an int, got float$"),
        ({"num_minibatches": 7}, ValueError, "^num_minibatches: expected at most one per sample, 6, got 7$"),
        ({"num_epochs": 0}, ValueError, "^num_epochs: expected at least 1, got 0$"),
        ({"shuffle": "envs"}, ValueError, "^shuffle: expected 'full' or 'none', got 'envs'$"),
        ({"shuffle": True}, ValueError, "^shuffle: expected 'full' or 'none', got True$"),
        ({"normalize_advantages": "batch"}, ValueError, "^normalize_advantages: expected a bool or 'mini"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):  # at the call, not at the first minibatch
            buf.minibatches(**change)
    reading = buf.minibatches(2, num_epochs=2)
    next(reading)
    buf.clear()
    with pytest.raises(RuntimeError, match=r"^minibatches: the rollout was discarded while they were being read$"):
        next(reading)
    with pytest.raises(RuntimeError, match=r"^minibatches: expected compute_gae\(\) before it$"):
        buf.minibatches()


def test_a_minibatch_by_name(backend):
    buf = RolloutBuffer(4, 2, obs={"a": 2, "b": 3}, actions=2, fields={"mu": 2}, backend=backend)
    fill(buf)
    buf.compute_gae(torch.zeros(4))
    mb = next(buf.minibatches(1))
    assert mb.obs.keys() == {"a", "b"} == mb["obs"].keys()
    assert mb["mu"].shape == (8, 2) and mb["actions"] is mb.actions and mb["returns"] is mb.returns
    with pytest.raises(KeyError, match=r"sigma: not in this minibatch; it has .*mu"):
        mb["sigma"]
    assert "8 samples" in repr(mb)
