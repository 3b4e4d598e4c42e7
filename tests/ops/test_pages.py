"""Large CPU blocks: aligned, and reused once no tensor holds them."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch

from pydrone.buffer import RolloutBuffer
from pydrone.ops.pages import Recycler

CPU = torch.device("cpu")
LARGE = [((1 << 20,), torch.float32), ((3, 5), torch.int64), ((0, 2), torch.float32), ((1 << 19,), torch.uint8)]


def addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors if x.numel()]


def test_tensors_of_a_block_are_apart_and_aligned():
    tensors = Recycler().empty(LARGE, CPU)
    assert [(tuple(x.shape), x.dtype) for x in tensors] == LARGE
    for i, x in enumerate(tensors):
        x.fill_(i)
    assert all(bool((x == i).all()) for i, x in enumerate(tensors))
    assert all(address % 64 == 0 for address in addresses(tensors))
    version = tensors[0]._version
    tensors[1].add_(1)
    assert tensors[0]._version == version  # each has its own autograd version


def test_a_block_is_reused_when_its_last_tensor_is_freed():
    recycler = Recycler()
    first = recycler.empty(LARGE, CPU)
    where, kept = addresses(first), first[1].view(-1)[2:]
    del first
    gc.collect()
    second = recycler.empty(LARGE, CPU)
    assert addresses(second) != where  # a view of the first is alive
    kept.fill_(7)
    del kept
    third = recycler.empty(LARGE, CPU)
    assert addresses(third) == where


def test_a_block_saved_by_autograd_is_not_reused():
    recycler = Recycler()
    x, *_ = recycler.empty(LARGE, CPU)
    x.fill_(3)
    weight = torch.ones(1, requires_grad=True)
    loss = (x * weight).sum()
    del x, _
    for _ in range(3):
        recycler.empty(LARGE, CPU)[0].fill_(-1)
    loss.backward()
    assert weight.grad.item() == 3 * (1 << 20)


def test_it_keeps_few_blocks_of_one_size():
    recycler = Recycler()
    held = [recycler.empty(LARGE, CPU) for _ in range(5)]
    del held
    assert len(recycler._free) == Recycler.KEPT
    other = recycler.empty([((2 << 20,), torch.float32)], CPU)
    assert not recycler._free
    assert not copy.deepcopy(recycler)._free and not pickle.loads(pickle.dumps(recycler))._free
    del recycler  # its tensors outlive it
    assert other[0].fill_(1).sum() == 2 << 20


@pytest.mark.parametrize("samples", [8, 1 << 15])
def test_minibatches_do_not_share_memory_while_they_are_held(samples):
    buf = RolloutBuffer(samples, 4, obs=17, actions=4)
    ones = torch.ones(samples)
    for t in range(4):
        obs = torch.full((samples, 17), float(t))
        buf.append(obs=obs, actions=obs[:, :4], rewards=ones, dones=ones, values=ones, log_probs=ones)
    buf.compute_gae(ones)
    held = list(buf.minibatches(4, 2))
    numbers = torch.cat([mb.indices for mb in held])
    assert torch.equal(torch.cat([mb.obs[:, 0] for mb in held]), (numbers % 4).float())
    assert torch.equal(numbers.sort().values, torch.arange(4 * samples).repeat_interleave(2))
