"""An exponential moving average of a policy's weights, beside the weights that learn.

Single iterations leave a policy a little to one side or the other of where it is going; the average of the last ones is
steadier (Polyak and Juditsky, 1992). PyTorch's own ``torch.optim.swa_utils.AveragedModel`` waits for the device in
every update and holds a second policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """sum_k decay^(n-k) weights_k / sum_k decay^(n-k) over the n iterations so far: Adam's correction of the start.

    Args:
        policy: whose parameters are averaged. Running statistics are not: they are averages already.
        decay: per iteration, from 0 up to but not including 1.
    """

    def __init__(self, policy: nn.Module, decay: float) -> None:
        self._decay = decay
        self._own = {name: x.detach() for name, x in policy.named_parameters()}
        self._sums = {name: torch.zeros_like(x) for name, x in self._own.items()}
        one = next(iter(self._own.values())).new_ones(())
        # The last number is the sum of the factors, averaged like a weight that is always 1.
        self._total = torch.zeros_like(one)
        self._pairs = [*self._sums.values(), self._total], [*self._own.values(), one]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are now. One launch on CUDA, which a graph can capture."""
        torch._foreach_lerp_(*self._pairs, 1 - self._decay)

    def state_dict(self) -> dict[str, Any]:
        """The sums by the parameters' names, and the sum of the factors; not copied."""
        return {"sums": self._sums, "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a ``state_dict`` of a policy with the same parameters."""
        if state["sums"].keys() != self._sums.keys():
            raise KeyError(f"expected the averages of {', '.join(self._sums)}")
        for name, x in self._sums.items():
            x.copy_(state["sums"][name])
        self._total.copy_(state["total"])


def deployed(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint to fly, evaluate and export: the averaged ones where it has them.

    Of the same form as ``state["policy"]``. ``state`` as of :meth:`pydrone.ppo.trainer.Trainer.state_dict`.
    """
    weights, average = dict(state["policy"]), state.get("average")
    if average is not None and average["total"] > 0:  # 0 before the first iteration
        weights |= {name: x / average["total"] for name, x in average["sums"].items()}
    return weights
