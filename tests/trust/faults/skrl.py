"""Mistakes in skrl's update on the fused learner."""

from __future__ import annotations

from .fault import Fault

UPDATE = "pydrone/integrations/skrl_learner.py"
OF_UPDATE = "tests/integrations/test_skrl_learner.py"
VALUE = 'values, _ = self._value.compute(inputs, "value")'
POLICY = 'outputs, more = self._policy.compute(inputs, "policy")'

SKRL = [
    Fault("a gradient of log_std outside its bounds", UPDATE, "(held == self.log_std)", "(held == held)", OF_UPDATE),
    Fault("a trunk of both with the critic's gradient alone", UPDATE, "reuse=not shared,", "reuse=True,", OF_UPDATE),
    Fault(
        "statistics of skrl's scaler that go on",
        UPDATE,
        "(observations, train=not",
        "(observations, train=0 *",
        OF_UPDATE,
    ),
    Fault("skrl's random numbers not drawn", UPDATE, "if draws:", "if not draws:", OF_UPDATE),
    Fault(
        "a step of the minibatch that diverged", UPDATE, "divergence > cfg.kl_threshold:", "divergence < 0:", OF_UPDATE
    ),
    Fault("the value loss of rsl_rl in skrl", UPDATE, "value_max=False,", "value_max=True,", OF_UPDATE),
    Fault(
        "models that are taken at their layers' word",
        UPDATE,
        "if not same:",
        "if False:",
        OF_UPDATE,
    ),
    Fault(
        "a computation between two layers that goes unnoticed",
        UPDATE,
        "            if made is output:\n",
        "            if made is output or made.shape == output.shape:\n",
        OF_UPDATE,
    ),
    Fault(
        "features of the last step taken for those of a minibatch",
        UPDATE,
        f"{VALUE}\n            {POLICY}",
        f"{POLICY}\n            {VALUE}",
        OF_UPDATE,
    ),
]
