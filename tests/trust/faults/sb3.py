"""Mistakes in the PPO for Stable-Baselines3."""

from __future__ import annotations

from .fault import Fault

PPO = "pydrone/integrations/sb3_ppo.py"
OF_PPO = "tests/integrations/test_sb3_ppo.py"

SB3 = [
    Fault(
        "advantages normalised over several minibatches",
        PPO,
        "[advantages[:whole].view(-1, size),",
        "[advantages[:whole].view(1, -1),",
        f"{OF_PPO}::test_as_its_own",
    ),
    Fault(
        "the greater of both value errors, where Stable-Baselines3 takes the clipped one",
        PPO,
        "value_max=False",
        "value_max=True",
        f"{OF_PPO}::test_as_its_own",
    ),
    Fault(
        "a stop at target_kl, not at 1.5 times it",
        PPO,
        "if divergence > 1.5 * self.target_kl:",
        "if divergence > self.target_kl:",
        f"{OF_PPO}::test_as_its_own",
    ),
    Fault(
        "an action drawn where the most likely one was asked for",
        PPO,
        " and not deterministic and",
        " and",
        f"{OF_PPO}::test_copies_of_the_policy_in_a_callback",
    ),
    Fault(
        "a layer that a callback has replaced goes on acting",
        PPO,
        " and acting.parts == _parts(policy):",
        ":",
        f"{OF_PPO}::test_a_layer_that_a_callback_replaces",
    ),
    Fault(
        "a replaced method that is not called",
        PPO,
        " or _altered(x) for x in",
        " for x in",
        f"{OF_PPO}::test_what_is_not_known_goes_its_way",
    ),
    Fault(
        "gradients of frozen parameters from an earlier rollout",
        PPO,
        "        policy.optimizer.zero_grad()\n        step",
        "        step",
        f"{OF_PPO}::test_parameters_frozen_after_a_rollout",
    ),
]
