"""Several processes that train one policy: this process's rank, and the messages between them.

``torchrun --nproc-per-node=K -m pydrone train ...`` starts them; :func:`join` forms their group, NCCL on GPUs and gloo
on CPUs. With one process nothing here calls torch.distributed. What is sent when: docs/scaling.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydrone.rollout.draws import mix_seed


class PeerLost(RuntimeError):
    """A message could not be exchanged: another process has ended or is unreachable."""


class Ranks:
    """This process and the others that train one policy with it.

    All ranks must call the methods that send, in the same order.

    Args:
        group: torch.distributed's, ``torch.distributed.group.WORLD`` say; None: this process alone.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else torch.distributed.get_rank(group)
        self.world_size = 1 if group is None else torch.distributed.get_world_size(group)

    @classmethod
    def found(cls) -> Ranks:
        """The ranks of the initialised process group, else this process alone."""
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        return cls(torch.distributed.group.WORLD) if there else ALONE

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def seed(self, seed: int) -> int:
        """This rank's own seed, of 31 bits; the first rank's is ``seed`` itself."""
        return mix_seed(seed, self.rank) & 0x7FFFFFFF if self.rank else seed

    def sum_(self, x: Tensor) -> Tensor:
        """Sums ``x`` over all ranks, in place; bitwise equal on all of them."""
        if self.several:
            with self._sending():
                torch.distributed.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[K, *x.shape]: each rank's ``x``, of one shape, in the order of the ranks."""
        if not self.several:
            return x.unsqueeze(0)
        rows = x.new_empty(self.world_size, *x.shape)
        # Its new name from torch 2.13 on.
        all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
        with self._sending():
            all_gather(rows.view(-1), x.contiguous().view(-1), group=self.group)
        return rows

    def moments(self, count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The moments of all ranks' samples together, in one message. count: scalar; mean, m2: [...]; float64."""
        if not self.several:
            return count, mean, m2
        rows = self.gather(torch.cat((count.reshape(1), mean.flatten(), m2.flatten())))
        means, m2s = (x.reshape(-1, *mean.shape) for x in rows[:, 1:].split(mean.numel(), dim=1))
        return merge_moments(rows[:, 0], means, m2s)

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites every rank's ``tensors`` with the first rank's."""
        if self.several:
            with self._sending(), torch.no_grad():
                for x in tensors:
                    torch.distributed.broadcast(x, group=self.group, group_src=0)

    def gather_objects(self, x: Any) -> list[Any]:
        """Each rank's ``x``, sent as a pickle: for small or rare messages."""
        if not self.several:
            return [x]
        found: list[Any] = [None] * self.world_size
        with self._sending():
            torch.distributed.all_gather_object(found, x, group=self.group)
        return found

    def to_first(self, x: Any) -> list[Any]:
        """On the first rank each rank's ``x``, the others' tensors on the CPU; on other ranks ``[x]``."""
        if not self.several:
            return [x]
        sent = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, x)
        found = [None] * self.world_size if self.rank == 0 else None
        with self._sending():
            torch.distributed.gather_object(sent, found, group=self.group, group_dst=0)
        return [x] if found is None else [x, *found[1:]]

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError on every rank if the settings of one differ from the first's."""
        first, *others = self.gather_objects(dict(settings))
        for rank, theirs in enumerate(others, 1):
            for name, x in first.items():
                if theirs.get(name) != x:
                    raise ValueError(
                        f"{name}: expected the same on every rank, got {x!r} on rank 0 and {theirs.get(name)!r} on "
                        f"rank {rank}"
                    )

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerLost(
                f"rank {self.rank} of {self.world_size} cannot go on, another has ended or is out of reach: "
                f"{str(error).split('. ')[0]}"
            ) from error


#: One process.
ALONE = Ranks()


class MeanGradients:
    """Averages the ranks' gradients and a few figures, weighted by their samples, with one all-reduce.

    Args:
        parameters: their ``.grad`` is averaged.
        figures: number of figures.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter], figures: int) -> None:
        self.ranks, self.parameters = ranks, list(parameters)
        like = self.parameters[0]
        # The gradients, the figures, the number of samples.
        sizes = [*(x.numel() for x in self.parameters), figures, 1]
        self.message = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        *parts, self._figures, self._count = self.message.split(sizes)
        self._parts = [part.view_as(x) for part, x in zip(parts, self.parameters)]

    @torch.no_grad()
    def __call__(self, figures: Tensor, count: int) -> Tensor:
        """Writes the mean gradients to ``.grad`` and returns the mean figures. count: this rank's samples, may be 0."""
        for x in self.parameters:
            if x.grad is None and x.requires_grad:
                x.grad = torch.zeros_like(x)
        given = [(part, x.grad) for part, x in zip(self._parts, self.parameters) if x.grad is not None]
        parts, grads = [part for part, _ in given], [grad for _, grad in given]
        torch._foreach_copy_(parts, grads)
        self._figures.copy_(figures)
        if count:
            self.message.mul_(count)
        else:
            self.message.zero_()  # no samples, whose mean is NaN
        self._count.fill_(count)
        self.ranks.sum_(self.message)
        self.message[:-1].div_(self._count.clamp_min(1))
        torch._foreach_copy_(grads, parts)
        return self._figures.clone()


def merge_moments(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, M2) of all samples from those of K parts, count [K], mean and m2 [K, ...], all float64.

    Chan, Golub and LeVeque (1979), all parts at once: M2 = sum of M2_k + n_k (mean_k - mean)^2. The mean of a part
    without samples is ignored.
    """
    n = count.reshape(-1, *[1] * (mean.dim() - 1))
    mean, m2 = torch.where(n > 0, mean, 0), torch.where(n > 0, m2, 0)
    total = count.sum()
    merged = (n * mean).sum(0) / total.clamp_min(1)
    return total, merged, (m2 + n * (mean - merged).square()).sum(0)


class Launch:
    """The environment variables of torchrun: ``rank`` of ``world_size``, and ``local_rank`` on this machine.

    Raises ValueError where they are incomplete.
    """

    def __init__(self) -> None:
        self.world_size = max(1, _number("WORLD_SIZE"))
        self.rank, self.local_rank = 0, 0
        if self.world_size > 1:
            if "RANK" not in os.environ:
                raise ValueError(
                    f"RANK: expected a number below WORLD_SIZE={self.world_size}, as torchrun sets; not set"
                )
            self.rank, self.local_rank = _number("RANK"), _number("LOCAL_RANK")
            if self.rank >= self.world_size:
                raise ValueError(f"RANK: expected a number below WORLD_SIZE={self.world_size}, got {self.rank}")


def _number(name: str) -> int:
    given = os.environ.get(name, "0")
    if not given.isdecimal():
        raise ValueError(f"{name}: expected a number, as torchrun sets, got {given!r}")
    return int(given)


def join(launch: Launch, device: torch.device) -> Ranks:
    """Forms a group with the other processes that torchrun started, if any; waits for them."""
    if launch.world_size == 1:
        return ALONE
    if not torch.distributed.is_available():
        raise ValueError("this PyTorch is built without torch.distributed, which several processes need")
    # gloo sends host tensors, such as parts of a checkpoint.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=launch.rank, world_size=launch.world_size)
    return Ranks(torch.distributed.group.WORLD)


def leave(ranks: Ranks) -> None:
    """Destroys the group once every rank is done; not to be called where this rank failed.

    Raises PeerLost where another rank has failed.
    """
    if ranks.several:
        ranks.gather_objects(None)
        torch.distributed.destroy_process_group()
