"""Reference models for the tests: GAE as a float64 loop and the ring as a list of dicts. They share no code with
pydrone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pydrone import RolloutBuffer


def array(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.detach().double().numpy()


def gae_loop(
    rewards: Tensor,
    values: Tensor,
    dones: Tensor,
    last_values: Tensor,
    gamma: float,
    lam: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
    timeout_bootstrap: str | None = None,
    valid: Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """GAE by its definition, one sample at a time in float64: [N, T] in, (advantages, returns) out."""
    r, v, last = array(rewards), array(values), array(last_values).reshape(-1)
    done, late, counts, final = array(dones), array(truncated), array(valid), array(final_values)
    num_envs, num_steps = r.shape
    advantages = np.zeros_like(r)
    for n in range(num_envs):
        following = 0.0
        for t in range(num_steps - 1, -1, -1):
            after = last[n] if t == num_steps - 1 else v[n, t + 1]
            timed_out = late is not None and late[n, t] != 0
            if counts is not None and counts[n, t] == 0:
                advantage = 0.0
            elif timed_out:
                bootstrap = {"stored_value": v[n, t], "next_value": after}.get(timeout_bootstrap)
                bootstrap = final[n, t] if bootstrap is None else bootstrap
                advantage = r[n, t] + gamma * bootstrap - v[n, t]
            elif done[n, t] != 0:
                advantage = r[n, t] - v[n, t]
            else:
                advantage = r[n, t] + gamma * after - v[n, t] + gamma * lam * following
            advantages[n, t] = following = advantage
    return advantages, advantages + v


def assert_close(actual: Tensor, expected: np.ndarray | Tensor, tolerance: float = 1e-5) -> None:
    """|difference| <= tolerance * max|expected|: relative to the largest element, not to each one."""
    expected = expected.double().numpy() if isinstance(expected, Tensor) else expected
    assert tuple(actual.shape) == expected.shape
    actual = actual.detach().double().numpy()
    assert np.isfinite(actual).all()
    if expected.size:
        worst = np.abs(actual - expected).max()
        assert worst <= tolerance * max(np.abs(expected).max(), 1e-30), f"off by {worst}"


def rollout(num_envs: int, num_steps: int, ends: float = 0.15, seed: int = 0) -> dict[str, Tensor]:
    """Random [N, T] arguments for pydrone.gae: a third of the ends are time-outs, one step in twenty is invalid."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g)

    kind = torch.rand(num_envs, num_steps, generator=g)
    return {
        "rewards": normal(num_envs, num_steps),
        "values": normal(num_envs, num_steps) * 3,
        "dones": kind < ends,
        "truncated": kind < ends / 3,
        "valid": torch.rand(num_envs, num_steps, generator=g) > 0.05,
        "last_values": normal(num_envs) * 3,
        "final_values": normal(num_envs, num_steps) * 3,
    }


# Steps whose episodes end by a termination only, if at all: a kernel may take such a row another way.
TERMINAL = {"no row": slice(0, 0), "every other row": slice(None, None, 2), "every row": slice(None)}


def terminal(data: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """``data``, with no truncated and no invalid step in the steps of ``TERMINAL``."""
    changed = {"truncated": data["truncated"].clone(), "valid": data["valid"].clone()}
    changed["truncated"][:, TERMINAL[which]] = False
    changed["valid"][:, TERMINAL[which]] = True
    return data | changed


def in_float64(data: dict[str, object]) -> dict[str, object]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in data.items()}


SCALARS = ("rewards", "values", "log_probs")


def random_like(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator | None = None) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=g).to(dtype)
    low = 0 if dtype == torch.uint8 else -100
    return torch.randint(low, 120, shape, generator=g).to(dtype)


def random_step(buf: RolloutBuffer, ends: bool = True, g: torch.Generator | None = None) -> dict[str, object]:
    """Arguments of append for one step of ``buf``: every field is random, one environment in five ends."""
    n, layout = buf.num_envs, buf.layout
    obs = {name: random_like((n, *shape), dtype, g) for name, (shape, dtype) in layout.obs.items()}
    step: dict[str, object] = {"obs": obs if layout.obs_is_mapping else obs["obs"]}
    for name in ("actions", *layout.extra):
        step[name] = random_like((n, *layout.fields[name].shape), layout.fields[name].dtype, g)
    step |= {name: torch.randn(n, generator=g) for name in SCALARS}
    step["dones"] = torch.rand(n, generator=g) < 0.2 if ends else torch.zeros(n, dtype=torch.bool)
    return step


def fill(buf: RolloutBuffer, steps: int | None = None, **options) -> list[dict[str, object]]:
    """Appends ``steps`` random steps (None: a whole rollout) and returns them."""
    made = [random_step(buf, **options) for _ in range(buf.num_steps if steps is None else steps)]
    for step in made:
        buf.append(**step)
    return made


def stacked(steps: list[dict], name: str, group: str | None = None) -> Tensor:
    """One field of ``steps``, stacked to [N, T, ...]."""
    return torch.stack([step[name] if group is None else step[name][group] for step in steps], 1)


def memory_bytes(buf: RolloutBuffer) -> dict[str, bytes]:
    """Every byte the buffer holds."""
    return {name: x.contiguous().view(torch.uint8).numpy().tobytes() for name, x in buf._storage.tensors.items()}


class RingModel:
    """The ring as a list: the steps of the rollouts not yet discarded, oldest first."""

    def __init__(self, num_steps: int, capacity: int) -> None:
        self.num_steps, self.capacity, self.steps, self.first = num_steps, capacity, [], 0

    def append(self, step: dict) -> bool:
        """Returns whether there was room."""
        if len(self.steps) == self.capacity:
            return False
        self.steps.append(step)
        return True

    def clear(self) -> None:
        gone = self.num_steps if len(self.steps) >= self.num_steps else 0
        if gone:
            self.first += gone
            del self.steps[:gone]
        else:
            self.steps.clear()

    @property
    def oldest(self) -> list[dict]:
        return self.steps[: self.num_steps]

    @property
    def wraps(self) -> bool:
        return self.first % self.capacity + len(self.oldest) > self.capacity
