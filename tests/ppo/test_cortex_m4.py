"""An exported policy on a Cortex-M4F in qemu: its actions, and what it takes. docs/export.md quotes the figures."""

from __future__ import annotations

import cortex_m4
import pytest
import torch

from pydrone.ppo import export
from pydrone.ppo.policy.actor_critic import ActorCritic

pytestmark = pytest.mark.slow

# Hidden layers, weights: most bytes of flash, bytes of stack, instructions of a call.
NETWORKS = {
    ((128, 128), "float32"): (82_000, 1_200, 90_000),
    ((128, 128), "float16"): (43_000, 1_200, 130_000),
    ((32, 32, 32), "float32"): (15_000, 450, 20_000),
    ((32, 32, 32), "float16"): (9_000, 450, 25_000),
}
# Of the Crazyflie's firmware, which the processor's half-precision conversions go with.
FLAGS = ("-Os", "-fno-math-errno", "-mfp16-format=ieee")


@pytest.mark.parametrize(("hidden", "weights"), NETWORKS, ids=str)
def test_actions_memory_and_instructions(hidden, weights, tmp_path, record_property):
    cortex_m4.need_tools()
    torch.manual_seed(0)
    own = ActorCritic(17, 4, hidden)
    path = export.save(own, tmp_path / "policy.h", "c", (-1.0, 1.0), weights=weights).path
    if weights == "float16":
        for x in own.actor.parameters():
            x.data = x.data.half().float() if x.dim() == 2 else x.data
    obs = torch.randn(16, 17)
    found = cortex_m4.measure(path, obs, tmp_path, *FLAGS)
    assert found.self_test == 0
    torch.testing.assert_close(found.actions, own.mean(obs).detach().clamp(-1, 1), rtol=0, atol=1e-6)
    print(f"\n{hidden} {weights}: {found._replace(actions=())}")
    flash, stack, instructions = NETWORKS[hidden, weights]
    products = sum(x.numel() for x in own.actor.parameters() if x.dim() == 2)
    assert products * (4 if weights == "float32" else 2) < found.flash < flash
    assert found.ram == 0 and 8 * max(hidden) < found.stack < stack
    assert 2 * products < found.instructions < instructions


def test_without_the_processors_conversions(tmp_path):
    """The header's own conversion of float16."""
    cortex_m4.need_tools()
    path = export.save(ActorCritic(17, 4, (8,)), tmp_path / "policy.h", "c", (-1.0, 1.0), weights="float16").path
    obs = torch.randn(16, 17)
    own, other = (cortex_m4.measure(path, obs, tmp_path, "-O2", *x) for x in ((), ("-mfp16-format=ieee",)))
    assert own.self_test == other.self_test == 0 and torch.equal(own.actions, other.actions)
    assert own.instructions > other.instructions


def test_instructions_are_counted_to_two(tmp_path):
    cortex_m4.need_tools()
    path = export.save(ActorCritic(17, 4, (4,)), tmp_path / "policy.h", "c", (-1.0, 1.0)).path
    found = [cortex_m4.measure(path, torch.zeros(1, 17), tmp_path, f"-DNOPS={n}") for n in (1, 1001)]
    assert abs(found[1].instructions - found[0].instructions - 1000) <= 2
