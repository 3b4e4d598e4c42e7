"""Padded trajectories: examples by hand, and every step of a rollout is in exactly one trajectory."""

from __future__ import annotations

import math

import pytest
import torch

from pydrone.buffer import RolloutBuffer
from pydrone.rollout.sequences import trajectories


def filled(num_envs: int, num_steps: int, ends: list[tuple[int, int]], fields=None) -> RolloutBuffer:
    """obs[n, t] = 100 n + t, and the episodes end at ``ends``."""
    buf = RolloutBuffer(num_envs, num_steps, obs=1, actions=((), torch.int64), fields=fields, seed=3)
    envs = torch.arange(num_envs)
    for t in range(num_steps):
        number = (100 * envs + t).float()
        dones = torch.tensor([(n, t) in ends for n in range(num_envs)])
        extra = {name: number.unsqueeze(1).expand(num_envs, 2) for name in fields or {}}
        buf.append(
            obs=number.unsqueeze(1),
            actions=envs,
            rewards=number,
            dones=dones,
            values=-number,
            log_probs=number,
            **extra,
        )
    buf.compute_gae(torch.zeros(num_envs))
    return buf


def test_trajectories_by_hand():
    # Environment 0 ends at steps 1 and 2, environment 1 never, environment 2 with the rollout's last step.
    ended = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    env, start, length = trajectories(ended, torch.tensor([2, 0, 1]))
    assert env.tolist() == [2, 0, 0, 0, 1]
    assert start.tolist() == [0, 0, 2, 3, 0]
    assert length.tolist() == [4, 2, 1, 1, 4]


def test_padding_masks_and_initial_states_by_hand():
    buf = filled(1, 4, [(0, 2)], fields={"state": 2})
    (batch,) = buf.sequences(hidden={"gru": "state"}, burn_in=2)
    # Steps 0 1 2, then step 3 padded with itself.
    assert batch.obs.squeeze(-1).tolist() == [[0.0, 3.0], [1.0, 3.0], [2.0, 3.0]]
    assert batch.mask.tolist() == [[True, True], [True, False], [True, False]]
    # The first trajectory continues from an earlier rollout: its first two steps only refresh the state.
    assert batch.learn.tolist() == [[False, True], [False, False], [True, False]]
    assert batch.hidden["gru"].tolist() == [[0.0, 0.0], [3.0, 3.0]]
    assert batch.fields["values"].tolist() == [[-0.0, -3.0], [-1.0, -3.0], [-2.0, -3.0]]
    assert batch.fields["actions"].dtype == torch.int64


def test_a_burn_in_for_each_environment():
    buf = filled(3, 4, [(2, 1)])
    for batch in buf.sequences(burn_in=torch.tensor([3, 0, 1]), num_minibatches=2):
        for env, start, learn in zip(batch.envs.tolist(), batch.starts.tolist(), batch.learn.t().tolist()):
            expected = {(0, 0): [0, 0, 0, 1], (1, 0): [1, 1, 1, 1], (2, 0): [0, 1, 0, 0], (2, 2): [1, 1, 0, 0]}
            assert learn == [bool(x) for x in expected[env, start]][: len(learn)]


@pytest.mark.parametrize("num_minibatches", [1, 3, 7])
def test_every_step_is_in_one_trajectory(num_minibatches):
    ends = [(0, 0), (1, 3), (1, 4), (2, 8), (4, 5), (6, 1), (6, 2), (6, 3)]
    buf = filled(7, 9, ends)
    orders = []
    for _ in range(2):
        seen, envs = [], []
        for batch in buf.sequences(num_minibatches=num_minibatches):
            seen.append(batch.obs.squeeze(-1)[batch.mask])
            envs.append(batch.envs)
            # No trajectory crosses an end.
            for n, t in ends:
                inside = (batch.obs.squeeze(-1) == 100 * n + t + 1) & batch.mask
                assert not inside[1:].any()
        expected = (100 * torch.arange(7).unsqueeze(1) + torch.arange(9)).flatten().float()
        assert torch.equal(torch.cat(seen).sort().values, expected)
        orders.append(torch.cat(envs).tolist())
    assert orders[0] != orders[1]


def test_initial_states_are_those_of_their_own_environment_and_step():
    buf = filled(5, 6, [(0, 2), (3, 1), (3, 4)], fields={"state": 2})
    given = 100 * torch.arange(5.0).unsqueeze(1) + torch.arange(6.0)
    for batch in buf.sequences(hidden={"field": "state", "given": given}, num_minibatches=2):
        expected = 100.0 * batch.envs + batch.starts
        assert torch.equal(batch.hidden["given"], expected)
        assert torch.equal(batch.hidden["field"], expected.unsqueeze(1).expand(-1, 2))


def test_an_invalid_step_is_included_but_masked_out():
    # NEXT_STEP: the step after the end is a reset step and a trajectory of its own.
    buf = RolloutBuffer(1, 4, obs=1, actions=1, fields={"state": 2, "flag": ((), torch.bool)})
    for t in range(4):
        one = torch.full((1,), math.nan if t == 2 else float(t))
        buf.append(
            obs=one.unsqueeze(1),
            actions=one.unsqueeze(1),
            rewards=one,
            dones=one == 1,
            values=one,
            log_probs=one,
            valid=torch.tensor([t != 2]),
            state=one.expand(2).unsqueeze(0),
            flag=torch.tensor([True]),
        )
    buf.compute_gae(torch.zeros(1))
    (batch,) = buf.sequences({"gru": "state"})
    # What stands in it, NaN here, is zero.
    assert batch.obs.squeeze(-1).tolist() == [[0, 0, 3], [1, 0, 3]]
    assert batch.hidden["gru"][:, 0].tolist() == [0, 0, 3]
    assert batch.fields["flag"].tolist() == [[True, False, True]] * 2
    assert all(x.isfinite().all() for x in batch.fields.values())
    assert batch.starts.tolist() == [0, 2, 3]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.learn.tolist() == [[True, False, True], [True, False, False]]


def test_advantages_are_normalised_as_in_minibatches():
    buf = filled(5, 6, [(1, 2), (3, 3)])
    (batch,) = buf.sequences()
    (mb,) = buf.minibatches(1, shuffle="none")
    ours = torch.zeros(5, 6)
    offset = torch.arange(len(batch.mask)).unsqueeze(1)
    ours[batch.envs.expand_as(batch.mask)[batch.mask], (batch.starts + offset)[batch.mask]] = batch.fields[
        "advantages"
    ][batch.mask]
    assert torch.allclose(ours.flatten(), mb.advantages, atol=1e-6)


def test_errors():
    buf = filled(2, 3, [])
    with pytest.raises(ValueError, match=r"burn_in: expected an int of at least 0, got -1"):
        buf.sequences(burn_in=-1)
    with pytest.raises(ValueError, match=r"burn_in: expected shape \[2\] or \[2, 1\], got \[3\]"):
        buf.sequences(burn_in=torch.ones(3))
    with pytest.raises(ValueError, match=r"num_minibatches: expected at most one per environment, 2, got 3"):
        buf.sequences(num_minibatches=3)
    with pytest.raises(ValueError, match=r"hidden\['h'\]: expected shape \[2, 3, ...\], got \[3, 2\]"):
        buf.sequences(hidden={"h": torch.zeros(3, 2)})
    buf.clear()
    with pytest.raises(RuntimeError, match=r"sequences: expected compute_gae\(\) before it"):
        buf.sequences()


@pytest.mark.parametrize("discard", [lambda buf: buf.clear(), lambda buf: buf.load_state_dict(buf.state_dict())])
def test_a_rollout_discarded_meanwhile_is_an_error(discard):
    """Also if another rollout with the same number replaced it."""
    buf = filled(4, 3, [])
    batches = buf.sequences(num_minibatches=2)
    next(batches)
    discard(buf)
    with pytest.raises(RuntimeError, match="sequences: the rollout was discarded"):
        next(batches)
