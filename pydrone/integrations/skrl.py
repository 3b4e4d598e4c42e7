"""skrl 2.1 on pydrone: the agents' ``compute_gae`` in one launch, a :class:`RandomMemory` of packed rows, and the PPO
agent's update on the fused learner.

>>> from pydrone.integrations import skrl
>>> skrl.patch()  # compute_gae of every agent, skrl.memories.torch.RandomMemory, and PPO's update
>>> memory = skrl.RandomMemory(memory_size=rollouts, num_envs=env.num_envs, device=env.device)  # or explicitly
>>> agent = skrl.PPO(...)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partialmethod
from importlib import import_module

import torch
from torch import Tensor

from pydrone.estimators import gae
from pydrone.integrations.peer import Change, Patches, require
from pydrone.ops import pages
from pydrone.ops.dispatch import select, written
from pydrone.ops.reference import normalization
from pydrone.ops.schema import SCALAR_TYPES
from pydrone.rollout.layout import of_append, pack
from pydrone.rollout.storage import field_view

require("skrl", (2, 1), (2, 2))

from skrl.agents.torch.ppo import ppo  # noqa: E402
from skrl.memories import torch as memories  # noqa: E402

from pydrone.integrations import skrl_learner  # noqa: E402
from pydrone.integrations.skrl_learner import PPO as PPO  # noqa: E402

# The modules of skrl with their own compute_gae, by its signature.
FEEDFORWARD = (
    *("agents.torch.a2c.a2c", "agents.torch.amp.amp", "agents.torch.ppo.ppo", "agents.torch.rpo.rpo"),
    *("agents.torch.trpo.trpo", "multi_agents.torch.ippo.ippo", "multi_agents.torch.mappo.mappo"),
)
RECURRENT = (
    *("agents.torch.a2c.a2c_rnn", "agents.torch.ppo.ppo_rnn"),
    *("agents.torch.rpo.rpo_rnn", "agents.torch.trpo.trpo_rnn"),
)

MOST_FIELDS = 28  # in a row, so that CUDA stores it in one launch


def compute_gae(
    *,
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    values: Tensor,
    last_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
    time_limit_bootstrap: bool = False,
) -> tuple[Tensor, Tensor]:
    """(returns, normalised advantages) [T, N, 1] of a rollout, with the signature of skrl's feed-forward agents.

    rewards, values: [T, N, 1], floating; terminated, truncated: [T, N, 1], bool; last_values: [N, 1]. A truncation is
    an end only with ``time_limit_bootstrap``: skrl has then added gamma * V(next observation) to its reward. Without
    it, the episode continues into the next one, as in skrl.
    """
    dones = terminated | truncated if time_limit_bootstrap else terminated
    return _estimate(rewards, values, dones, last_values, discount_factor, lambda_coefficient)


def compute_gae_rnn(
    *,
    rewards: Tensor,
    terminated: Tensor,
    values: Tensor,
    next_values: Tensor,
    discount_factor: float = 0.99,
    lambda_coefficient: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """:func:`compute_gae` with the signature of skrl's recurrent agents: no truncations, and other names."""
    return _estimate(rewards, values, terminated, next_values, discount_factor, lambda_coefficient)


def _estimate(rewards, values, dones, last_values, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages, returns, statistics = gae(
        rewards, values, dones, last_values, gamma=gamma, lam=lam, time_dim=0, stats=True
    )
    mean, scale = normalization(statistics)
    advantages = advantages.sub_(mean).mul_(scale)
    return returns.to(torch.result_type(rewards, values)), advantages.to(rewards.dtype)


class _Rows:
    """Tensors [T, N, ...] of a memory, packed into one row of bytes per sample."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.fields, row_bytes = pack({name: (tuple(x.shape[2:]), x.dtype) for name, x in tensors.items()})
        like = next(iter(tensors.values()))
        with torch.inference_mode(False):
            (self.rows,) = pages.together([((*like.shape[:2], row_bytes), torch.uint8)], like.device)
            self._whole = of_append([self.fields[name] for name in tensors], 0, [])
        self.rows.zero_()
        for name, x in tensors.items():
            self.view(name).copy_(x)
        self._step = {name: (x.shape[1:], x.dtype) for name, x in tensors.items()}
        self._recycler = pages.Recycler()

    def view(self, name: str) -> Tensor:
        return field_view(self.rows, self.fields[name])

    def _described(self, names: Collection[str]) -> tuple[list[int], list[int]]:
        return [self.fields[x].offset for x in names], [SCALAR_TYPES[self.fields[x].dtype] for x in names]

    def append(self, slot: int, step: Mapping[str, object]) -> bool:
        """Stores a step in one launch and returns True; returns False if the step lacks a field of the row."""
        sources, device = [], self.rows.device
        for name, (shape, dtype) in self._step.items():
            x = step.get(name)
            if not isinstance(x, Tensor) or x.shape != shape or x.device != device:
                return False
            if x.dtype is not dtype and not (x.is_floating_point() and dtype.is_floating_point):
                x = x.to(dtype)  # discrete actions, which skrl stores as floats
            sources.append(x.detach() if x.requires_grad else x)
        flags = (None, None, None)
        select(device).append([self.rows], sources, self._whole, *flags, slot, 0, None, True)
        written(self.rows)
        return True

    def take(self, names: Sequence[str], samples: int, index: Tensor | None) -> dict[str, Tensor]:
        """The samples ``index`` (numbers t * N + n), or all, environment by environment; [samples, ...] by name."""
        if not names:
            return {}
        rows, steps = self.rows, self.rows.shape[0]
        if index is not None:
            rows, steps = rows.view(1, -1, rows.shape[2]), 1
        with torch.inference_mode(False):
            fields = [self.fields[name] for name in names]
            wanted = [((samples, *field.shape), field.dtype) for field in fields]
            outputs = self._recycler.empty(wanted, rows.device)
        order = (index, steps, 0, samples, 0, 0, 0, False, 0)
        described = self._described(names)
        select(rows.device).gather(rows, *described, outputs, 0, None, None, None, *order, None, None, None, None)
        return dict(zip(names, outputs))

    def permuted(self, size: int, count: int) -> Tensor:
        """The first ``count`` of a random permutation of [0, size), int64, computed on the device."""
        key = int(torch.randint(2**63 - 1, ()))  # from the generator that skrl's set_seed seeds
        index = torch.empty(count, dtype=torch.int64, device=self.rows.device)
        rows = self.rows.view(1, -1, self.rows.shape[2])[:, :size]
        order = (None, 1, 0, size, key, 0, 0, True, 0)
        select(rows.device).gather(rows, [], [], [], 0, None, None, None, *order, None, None, None, index)
        return index


class RandomMemory(memories.RandomMemory):
    """skrl's memory with the tensors of a sample packed into one row, so that a minibatch is gathered in one launch.

    The first use determines the rows: the tensors passed to the first ``add_samples`` form one row, so that a step is
    stored in one launch, and the others (returns and advantages) form another. If the first use is not
    ``add_samples``, all tensors form one row, and steps that lack some of them are copied as skrl does. The tensors by
    name are views, read and written like skrl's own but not contiguous. A tensor created after the first use is not
    packed.

    Args:
        shuffle: "full": ``sample`` draws a permutation on the device, keyed by one number from torch's generator;
            "skrl": skrl's own randperm on the host, for the same minibatches as without pydrone.
        **arguments: those of ``skrl.memories.torch.RandomMemory``.

    Raises:
        ValueError: another ``shuffle``. ``sample_by_index`` raises TypeError or IndexError for invalid indexes;
            indexes on a GPU are not checked, since that would synchronise, but reads stay in bounds.
    """

    def __init__(self, *, shuffle: str = "full", **arguments) -> None:
        super().__init__(**arguments)
        self._shuffle = _checked_shuffle(shuffle)
        self._blocks: list[_Rows] | None = None

    def create_tensor(self, name: str, **arguments) -> bool:
        """As in skrl, but memory is only allocated at the first use."""
        created = super().create_tensor(name, **arguments)
        if created and self._blocks is None and self.tensors[name].dtype in SCALAR_TYPES:
            blank = self.tensors[name].flatten()[:1].clone()  # NaN or zero, as all of it
            self._place(name, blank.expand(self.tensors[name].numel()).view(self.tensors[name].shape))
        return created

    def _place(self, name: str, x: Tensor) -> None:
        """Makes ``x`` [T, N, ...] the tensor ``name``, everywhere skrl keeps it."""
        self.tensors[name], self.tensors_view[name] = x, x.view(-1, *x.shape[2:])
        setattr(self, f"_tensor_{name}", x)

    def _lay_out(self, added: Collection[str] = ()) -> None:
        if self._blocks is not None:
            return
        packed = [name for name, x in self.tensors.items() if x.dtype in SCALAR_TYPES]
        groups = ([name for name in packed if name in added], [name for name in packed if name not in added])
        parts = [group[i : i + MOST_FIELDS] for group in groups for i in range(0, len(group), MOST_FIELDS)]
        self._blocks = [_Rows({name: self.tensors[name] for name in part}) for part in parts]
        for block in self._blocks:
            for name in block.fields:
                self._place(name, block.view(name))

    def __getstate__(self) -> dict[str, object]:
        """All but the views of the rows: copied or pickled apart from the rows, they would no longer be views."""
        packed = {name for block in self._blocks or () for name in block.fields}
        state = {**self.__dict__, "tensors": {name: None if name in packed else x for name, x in self.tensors.items()}}
        for name, x in self.tensors.items():
            if state[f"_tensor_{name}"] is x:  # load() puts another there
                del state[f"_tensor_{name}"]
        del state["tensors_view"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, tensors={}, tensors_view={})
        views = {name: block.view(name) for block in self._blocks or () for name in block.fields}
        for name, x in state["tensors"].items():
            self._place(name, views.get(name, x))
        self.__dict__.update((key, x) for key, x in state.items() if key.startswith("_tensor_"))

    def save(self, directory: str = "", *, format: str = "pt") -> None:
        """As in skrl. ``torch.save`` takes no views of different dtypes of the same memory: it gets copies."""
        views = self.tensors
        self.tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in views.items()}
        try:
            super().save(directory, format=format)
        finally:
            self.tensors = views

    def share_memory(self) -> None:
        self._lay_out()
        super().share_memory()

    def get_tensor_by_name(self, name: str) -> Tensor:
        self._lay_out()
        return super().get_tensor_by_name(name)

    def set_tensor_by_name(self, name: str, tensor: Tensor) -> None:
        self._lay_out()
        super().set_tensor_by_name(name, tensor)

    def add_samples(self, **tensors: Tensor | None) -> None:
        """As in skrl; a step of all environments takes one launch for each row that it fills."""
        if self._blocks is None:
            self._lay_out([name for name, x in tensors.items() if x is not None])
        first = tensors.get("observations", next(iter(tensors.values()), None))
        if isinstance(first, Tensor) and first.dim() == 2 and first.shape[0] == self.num_envs:
            for block in self._blocks:
                if block.append(self.memory_index, tensors):
                    tensors = {name: x for name, x in tensors.items() if name not in block.fields}
            # skrl stores the rest and advances its indices by the shape of the first; "" is the name of no tensor.
            tensors = {"": first, **tensors}
        super().add_samples(**tensors)

    def sample(
        self, names: list[str], *, batch_size: int, mini_batches: int = 1, sequence_length: int = 1
    ) -> list[list[Tensor | None]]:
        """As in skrl; ``sampling_indexes`` are on the device of the memory unless ``shuffle`` is "skrl"."""
        self._lay_out()
        if self._shuffle == "skrl" or self._replacement or not self._blocks:
            return super().sample(
                names, batch_size=batch_size, mini_batches=mini_batches, sequence_length=sequence_length
            )
        starts = len(self) - (sequence_length - 1) * self.num_envs
        if starts < 0:
            raise ValueError(f"sequence_length: expected at most the steps stored, got {sequence_length}")
        index = self._blocks[0].permuted(starts, min(batch_size, starts))
        if sequence_length > 1:
            steps = torch.arange(sequence_length, device=index.device) * self.num_envs
            index = (index.unsqueeze(1) + steps).flatten()
        self.sampling_indexes = index
        return self.sample_by_index(names, indexes=index, mini_batches=mini_batches)

    def sample_by_index(self, names: list[str], *, indexes, mini_batches: int = 1) -> list[list[Tensor | None]]:
        """As in skrl."""
        self._lay_out()
        if not self._packed(names):
            return super().sample_by_index(names, indexes=indexes, mini_batches=mini_batches)
        index = torch.as_tensor(indexes) if len(indexes) else torch.empty(0, dtype=torch.int64)
        if index.dim() != 1 or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
            raise TypeError(f"indexes: expected a list of integers, got shape {list(index.shape)}, {index.dtype}")
        if index.device.type == "cpu" and index.numel():
            samples, (low, high) = self.memory_size * self.num_envs, torch.aminmax(index)
            if low < 0 or high >= samples:
                raise IndexError(f"indexes: expected 0 to {samples - 1}, got {int(low)} to {int(high)}")
        return self._take(names, mini_batches, index.numel(), index.to(self.device, torch.int64).contiguous())

    def sample_all(
        self, names: list[str], *, mini_batches: int = 1, sequence_length: int = 1
    ) -> list[list[Tensor | None]]:
        """As in skrl: sequences are copies, environment by environment; otherwise views in the order of the memory."""
        self._lay_out()
        if sequence_length > 1 and self._packed(names):
            return self._take(names, mini_batches, self.memory_size * self.num_envs, None)
        return super().sample_all(names, mini_batches=mini_batches, sequence_length=sequence_length)

    def _packed(self, names: Collection[str]) -> bool:
        return not any(x in self.tensors and not any(x in block.fields for block in self._blocks) for x in names)

    def _take(self, names: list[str], parts: int, samples: int, index: Tensor | None) -> list[list[Tensor | None]]:
        """All minibatches, in one launch for each row; skrl returns them together."""
        found, parts = {}, max(parts, 1)
        for block in self._blocks:
            columns = block.take([name for name in dict.fromkeys(names) if name in block.fields], samples, index)
            found |= {name: x.tensor_split(parts) for name, x in columns.items()}
        return [[found[name][i] if name in found else None for name in names] for i in range(parts)]


class _OwnOrder(RandomMemory):
    """:class:`RandomMemory` for :func:`patch` with ``shuffle="skrl"``."""

    __init__ = partialmethod(RandomMemory.__init__, shuffle="skrl")


_patches = Patches()


def patch(shuffle: str = "full", learner: str = "fused") -> None:
    """Makes every agent of skrl use pydrone, for code that cannot be edited; :func:`unpatch` undoes it.

    Replaces ``compute_gae`` in all modules that have one, ``skrl.memories.torch.RandomMemory`` by
    :class:`RandomMemory`, for skrl's Runner and for later imports, and the update of skrl's PPO agent by
    :func:`pydrone.integrations.skrl_learner.update`. Calling it again has no effect.

    Args:
        shuffle: default of the memory.
        learner: "skrl": the PPO agent keeps skrl's update.
    """
    if learner not in ("fused", "skrl"):
        raise ValueError(f"learner: expected 'fused' or 'skrl', got {learner!r}")
    memory = RandomMemory if _checked_shuffle(shuffle) == "full" else _OwnOrder
    changes = [Change(memories, "RandomMemory", memory)]
    for modules, function in ((FEEDFORWARD, compute_gae), (RECURRENT, compute_gae_rnn)):
        changes += [Change(import_module(f"skrl.{name}"), "compute_gae", function) for name in modules]
    if learner == "fused":
        changes.append(Change(ppo.PPO, "update", skrl_learner.update))
    _patches.install(changes)


def unpatch() -> None:
    """Restores what :func:`patch` replaced; existing memories are unchanged."""
    _patches.remove()


def _checked_shuffle(shuffle: str) -> str:
    if shuffle not in ("full", "skrl"):
        raise ValueError(f"shuffle: expected 'full' or 'skrl', got {shuffle!r}")
    return shuffle
