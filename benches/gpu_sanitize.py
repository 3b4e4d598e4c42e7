"""Runs every kernel of one backend at small, odd sizes: `make gpu` runs this under compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benches/gpu_sanitize.py cuda

PyTorch's caching allocator is off, so that an access one byte outside an allocation is detected.
"""

from __future__ import annotations

import argparse
import os

# Before torch is imported: in its pool, an access out of bounds would hit a neighbour's memory unnoticed.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

import pydrone
from pydrone import RolloutBuffer
from pydrone.ops.schema import loss_workspace_size

# (num_envs, num_steps): ones, multiples of no block size, wide rows, and more than one block of each kernel.
SIZES = ((1, 1), (3, 7), (37, 20), (131, 33))
GROUPS = {"state": 17, "half": ((5,), torch.float16), "camera": ((3, 4), torch.uint8)}


def step(num_envs: int, device: str) -> dict[str, object]:
    obs = {
        "state": torch.randn(num_envs, 17, device=device),
        "half": torch.randn(num_envs, 5, device=device),
        "camera": torch.randint(0, 255, (num_envs, 3, 4), dtype=torch.uint8, device=device),
    }
    dones = torch.rand(num_envs, device=device) < 0.3
    scalars = {name: torch.randn(num_envs, device=device) for name in ("rewards", "values", "log_probs")}
    late = dones & (torch.rand(num_envs, device=device) < 0.5)
    return scalars | {
        "obs": obs,
        "actions": torch.randn(4, num_envs, device=device).t(),
        "dones": dones,
        "truncated": late,
        "final_obs": obs,
        "valid": torch.rand(num_envs, device=device) < 0.9,
    }


def value_fn(obs: dict[str, Tensor]) -> Tensor:
    return obs["state"].sum(1)


def rollouts(num_envs: int, num_steps: int, capacity: int, device: str, backend: str) -> None:
    buf = RolloutBuffer(
        num_envs,
        num_steps,
        obs=GROUPS,
        actions=4,
        capacity=capacity,
        final_obs_rows=num_envs * num_steps,
        device=device,
        backend=backend,
    )
    for _ in range(3):
        for t in range(num_steps):
            late = step(num_envs, device)
            early = {name: late.pop(name) for name in ("obs", "actions", "values", "log_probs")}
            if t % 2:
                buf.begin(**early)
                buf.end(**late)
            else:
                buf.append(**early, **late)
        buf.compute_gae(torch.randn(num_envs, device=device), value_fn=value_fn)
        assert bool(buf.advantages.isfinite().all())
        for mb in buf.minibatches(min(3, num_envs * num_steps)):
            assert bool(mb.obs["state"].isfinite().all()) and mb.indices.shape[0] == len(mb)
        buf.clear()


def captured(num_envs: int, num_steps: int, device: str, backend: str) -> None:
    """Makes the same launches as in a graph: they follow the device's counters instead of the host's."""
    buf = RolloutBuffer(num_envs, num_steps, obs=17, actions=4, final_obs_rows=0, device=device, backend=backend)
    buf._ring.capturing = lambda: True  # launches still run at once
    given = step(num_envs, device)
    given["obs"] = given["obs"]["state"]
    for name in ("truncated", "final_obs", "valid"):
        del given[name]
    for _ in range(3):
        buf.advance(num_steps, rollouts=1)
        for _ in range(num_steps):
            buf.append(**given)
        buf.compute_gae(torch.randn(num_envs, device=device))
        for mb in buf.minibatches(1, reuse=True):
            assert len(mb) == num_envs * num_steps
        buf.clear()
    buf.advance(num_steps)
    for _ in range(num_steps + 1):
        buf.append(**given)  # the last one finds the ring full and writes nothing
    assert buf._storage.cursor.tolist() == [4 * num_steps, 3 * num_steps, 1, 0, num_steps]


def functions(num_envs: int, num_steps: int, device: str, backend: str) -> None:
    """pydrone.gae in both layouts and in three dtypes, with flags in place of codes."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for time_dim in (0, 1):
            shape = (num_envs, num_steps) if time_dim else (num_steps, num_envs)
            x = torch.randn(shape, device=device).to(dtype)
            done = torch.rand(shape, device=device) < 0.2
            pydrone.gae(
                x,
                x,
                done,
                torch.randn(num_envs, device=device).to(dtype),
                truncated=done,
                timeout_bootstrap="stored_value",
                time_dim=time_dim,
                stats=True,
                backend=backend,
            )


def losses(num_envs: int, num_steps: int, device: str) -> None:
    """PPO's loss, a Triton kernel on every GPU: odd numbers of samples, dense and strided, all options."""
    size = num_envs * num_steps
    for actions in (1, 4, 17):
        matrices = [torch.randn(2 * size, 3 * actions, device=device).abs() + 0.1 for _ in range(4)]
        mean, drawn, mu, sigma = (x[::2, ::3] for x in matrices)
        scalars = [torch.randn(2 * size, device=device)[::2] for _ in range(5)]
        workspace = torch.zeros(loss_workspace_size(size, actions), dtype=torch.float64, device=device)
        moments = [torch.tensor(x, device=device) for x in (0.7, 1.9)]
        options = ((True, True, 0.2), (False, True, -1.0), (True, False, 0.2))
        for dense, with_kl, value_clip in options if actions == 4 else options[:1]:  # each is compiled
            a, b, c, d = (x.contiguous() if dense else x for x in (mean, drawn, mu, sigma))
            old_log_probs, advantages, *values = (x.contiguous() if dense else x for x in scalars)
            shapes = ((size, actions), (size,), (actions,), (4,))
            outputs = [torch.full(shape, float("nan"), device=device) for shape in shapes]
            torch.ops.pydrone.ppo_loss(
                a, torch.full((actions,), 0.8, device=device), b, old_log_probs, advantages, *values,
                *((c, d) if with_kl else (None, None)), 0.2, value_clip, 1.0, 0.01,
                *(moments if dense else (None, None)), size, *outputs, workspace,
            )  # fmt: skip
            assert all(bool(x.isfinite().all()) for x in outputs[:3]) and workspace[0] == 0
            assert bool(outputs[3][: 3 + with_kl].isfinite().all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("cuda", "triton", "cpu", "reference"))
    parser.add_argument("--quick", action="store_true", help="two sizes instead of four")
    options = parser.parse_args()
    device = "cuda" if options.backend in ("cuda", "triton") else "cpu"
    torch.manual_seed(0)
    for num_envs, num_steps in SIZES[1:3] if options.quick else SIZES:
        for capacity in (num_steps, num_steps + 3, 2 * num_steps):
            rollouts(num_envs, num_steps, capacity, device, options.backend)
        captured(num_envs, num_steps, device, options.backend)
        functions(num_envs, num_steps, device, options.backend)
        if options.backend != "cuda":  # on a GPU both backends use Triton's: test it once
            losses(num_envs, num_steps, device)
    if device == "cuda":
        # Statistics over more programs than a warp or a block has threads; two rows a warp.
        functions(4099, 5, device, options.backend)
        torch.cuda.synchronize()
    print(f"{options.backend}: every kernel ran")


if __name__ == "__main__":
    main()
