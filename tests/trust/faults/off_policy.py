"""Mistakes in V-trace and Retrace, and in what minibatches make of them."""

from __future__ import annotations

from .fault import Fault

RECURRENCE = "csrc/recurrence.h"
STEP = "csrc/cpu/scan_step.h"
REFERENCE = "pydrone/ops/reference.py"
ESTIMATORS = "pydrone/estimators.py"
TESTS = "tests/test_vtrace.py"
OF_BUFFERS = "tests/rollout/test_compute_vtrace.py"

OFF_POLICY = [
    Fault(
        "a ratio that is NaN is clipped",
        RECURRENCE,
        "return ratio > bound ? bound : ratio;",
        "return ratio < bound ? ratio : bound;",
        TESTS,
    ),
    Fault(
        "V-trace's advantage with the link of its targets",
        RECURRENCE,
        "advantage = weight * gae_join(cut, delta, gamma, carry);",
        "advantage = weight * gae_join(cut, delta, link, carry);",
        TESTS,
    ),
    Fault(
        "the ratio of an invalid step used",
        RECURRENCE,
        "weight = code == kInvalid ? T{} : rho;",
        "weight = rho;",
        TESTS,
    ),
    Fault(
        "V-trace's target with the advantage's weight of the carry",
        RECURRENCE,
        "return gae_join(cut, weight * delta, link, carry);",
        "return weight * gae_join(cut, delta, link, carry);",
        TESTS,
    ),
    Fault(
        "the clip of c for rho",
        STEP,
        "clipped_ratio(ratio, by.rho_clip)",
        "clipped_ratio(ratio, by.c_clip)",
        TESTS,
    ),
    Fault(
        "no lambda in c",
        "csrc/cpu/gae.cpp",
        "job.decay = gamma * lam;\n  job.rho_clip",
        "job.decay = gamma;\n  job.rho_clip",
        TESTS,
    ),
    Fault(
        "the ratio of an invalid step linked to the step before, in Retrace",
        RECURRENCE,
        "carry = code == kInvalid ? T{} : linked;",
        "carry = linked;",
        TESTS,
    ),
    Fault(
        "infinity less infinity in a large ratio",
        "csrc/cpu/exponential.h",
        "return (part + static_cast<T>(1)) * power;",
        "return part * power + power;",
        TESTS,
    ),
    Fault(
        "a small ratio that is not zero",
        "csrc/cpu/exponential.h",
        "kZero = -88.0f",
        "kZero = -87.0f",
        TESTS,
    ),
    Fault(
        "Retrace's ratio of the same step, in the reference",
        REFERENCE,
        "        else:\n            link = trace\n",
        "        link = trace\n",
        TESTS,
    ),
    Fault(
        "V-trace's outputs exchanged",
        ESTIMATORS,
        '("vs", "pg_advantages"), (1, 0))',
        '("vs", "pg_advantages"), (0, 1))',
        TESTS,
    ),
    Fault(
        "float64 ratios taken for float32",
        ESTIMATORS,
        "wide = torch.float64 in dtypes or torch.float64 in [x.dtype for x in others]",
        "wide = torch.float64 in dtypes",
        TESTS,
    ),
    Fault(
        "advantages and values as returns after V-trace",
        "pydrone/rollout/draws.py",
        "self._scan.targets if names else None,",
        "None,",
        OF_BUFFERS,
    ),
    Fault(
        "V-trace's targets as returns after GAE",
        "pydrone/rollout/scan.py",
        "self.computed, self.runs, self.method = True, self.runs + 1, name",
        "self.computed, self.runs, self.method = True, self.runs + 1, max(self.method, name)",
        OF_BUFFERS,
    ),
    Fault(
        "the fused learner forms returns after V-trace",
        "pydrone/ppo/learner/fused.py",
        "if place.returns is not None or not readable(place.obs):",
        "if not readable(place.obs):",
        "tests/ppo/learner/test_fused_ring.py",
    ),
    Fault(
        "a saved state forgets that its returns are V-trace's",
        "pydrone/buffer.py",
        'self._scan.method = state.get("method", "compute_gae")',
        'self._scan.method = "compute_gae"',
        OF_BUFFERS,
    ),
    Fault(
        "gathered returns are the advantages",
        "csrc/cpu/gather.cpp",
        "std::memcpy(&result[i], returns + batch.advantage[i0 + i], 4);",
        "std::memcpy(&result[i], bytes + batch.advantage[i0 + i], 4);",
        OF_BUFFERS,
    ),
    Fault(
        "PufferLib's rewards not shifted",
        "pydrone/integrations/pufferlib.py",
        "steps = rewards[:, 1:], before,",
        "steps = rewards[:, :-1], before,",
        "tests/integrations/test_pufferlib.py",
    ),
]
