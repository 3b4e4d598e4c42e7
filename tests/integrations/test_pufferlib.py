"""pydrone under PufferLib 3: against values by hand, and against its kernel's loop, its own where it is installed."""

from __future__ import annotations

import importlib
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, tensor

STAND_IN = '''
def compute_puff_advantage(values, rewards, terminals, ratio, advantages, gamma, lam, rho_clip, c_clip):
    """What PufferLib 3's kernel computes, one number at a time: fminf drops a NaN."""
    for n in range(len(values)):
        last = 0.0
        for t in reversed(range(values.shape[1] - 1)):
            on = 1.0 - float(terminals[n, t + 1])
            rho, c = (min(clip, float(ratio[n, t])) for clip in (rho_clip, c_clip))
            following = float(rewards[n, t + 1]) + gamma * float(values[n, t + 1]) * on
            last = rho * (following - float(values[n, t])) + gamma * lam * c * last * on
            advantages[n, t] = last
    return advantages
'''


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """The integration; where PufferLib is not installed, over a package of its name with that one function."""
    if find_spec("pufferlib") is None:
        package = tmp_path / "pufferlib"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "pufferl.py").write_text(STAND_IN)
        about = tmp_path / "pufferlib-3.0.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pufferlib\nVersion: 3.0.0\n")
        monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    module = importlib.import_module("pydrone.integrations.pufferlib")
    yield module
    module.unpatch()
    if find_spec("pufferlib") is not None and str(tmp_path) in str(find_spec("pufferlib").origin):
        for name in ("pufferlib", "pufferlib.pufferl", "pydrone.integrations.pufferlib"):
            sys.modules.pop(name, None)


def arguments(num_envs: int, num_steps: int) -> list[Tensor]:
    values, rewards = torch.randn(2, num_envs, num_steps)
    ended = (torch.rand(num_envs, num_steps) < 0.2).float()
    return [values, rewards, ended, torch.randn(num_envs, num_steps).exp()]


def test_by_hand(ours):
    """gamma = lambda = 1/2, rho_clip 1, c_clip 2. Steps 0 and 1 have the rewards and flags of 1 and 2; 3 is not read.

    x1 = 1 (3 + 6/2 - 4) = 2;  x0 = 1 (1 + 4/2 - 2) + 1/4 * min(2, 4) x1 = 2.  With an end after 1: x1 = 3 - 4 = -1, and
    x0 = 1 - 1/2.
    """
    values, ratio = tensor([[2.0, 4, 6]]), tensor([[4.0, 1, math.nan]])
    for flags, expected in (([1, 0, 0], [2, 2, 9]), ([0, 0, 1], [1 / 2, -1, 9])):
        out = tensor([[0.0, 0, 9]])
        given = values, tensor([[math.nan, 1, 3]]), tensor([flags]).float(), ratio
        assert ours.compute_puff_advantage(*given, out, 0.5, 0.5, 1.0, 2.0) is out
        assert out.tolist()[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 9), (64, 33)])
@pytest.mark.parametrize("clips", [(1.0, 1.0), (3.0, 0.5), (math.inf, math.inf)])
def test_patched_it_computes_what_it_did(ours, shape, clips):
    from pufferlib import pufferl

    theirs, given = pufferl.compute_puff_advantage, arguments(*shape)
    ours.patch()
    ours.patch()
    assert pufferl.compute_puff_advantage is ours.compute_puff_advantage
    expected, got = (
        run(*given, torch.full(shape, 7.0), 0.97, 0.9, *clips) for run in (theirs, ours.pufferl.compute_puff_advantage)
    )
    assert (expected - got).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert (got[:, -1] == 7).all()
    ours.unpatch()
    assert pufferl.compute_puff_advantage is theirs


def test_a_trainers_tensors_keep_their_graph(ours):
    """The trainer computes advantages of values that it will differentiate."""
    values, *rest = arguments(4, 6)
    leaf = values.clone().requires_grad_()
    out = ours.compute_puff_advantage(leaf * 1, *rest, torch.zeros(4, 6), 0.97, 0.9, 1.0, 1.0)
    assert not out.requires_grad and out[:, :-1].abs().min() > 0


def test_another_version_is_refused(tmp_path):
    if find_spec("pufferlib") is not None:
        pytest.skip("PufferLib is installed")
    with pytest.raises(
        ImportError, match=r"^pufferlib is not installed; pydrone supports pufferlib from 3 to before 4$"
    ):
        importlib.import_module("pydrone.integrations.pufferlib")
