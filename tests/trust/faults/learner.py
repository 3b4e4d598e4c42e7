"""Mistakes in the fused learner."""

from __future__ import annotations

from .fault import Fault

STEPS = "pydrone/rollout/steps.py"
LEARNER = "pydrone/ppo/learner/learner.py"
TILE = "csrc/cpu/mlp_tile.h"
GRADIENTS = "csrc/cpu/ppo.cpp"
ACT = "csrc/cpu/act.cpp"
NETWORKS = "csrc/cpu/networks.h"
ACTING = "pydrone/ppo/learner/acting.py"
PREPARED = "pydrone/ppo/learner/prepared.py"
SHARED = "pydrone/ppo/learner/networks.py"
OF_FUSED = "tests/ppo/learner/test_fused.py"
OF_PREPARED = "tests/ppo/learner/test_prepared.py"
OF_INSTRUCTIONS = "tests/ppo/learner/test_instructions.py"
OF_ACTING = "tests/ppo/learner/test_acting.py"
ADAM = "csrc/cpu/adam.cpp"
OF_ADAM = "tests/ppo/learner/test_adam.py"
OF_LAUNCHES = "tests/ops/test_triton.py::test_launches"
RSL_RL = "pydrone/integrations/rsl_rl_learner.py"
OF_RSL_RL = "tests/integrations/test_rsl_rl_learner.py"
OF_DRAWN = "tests/ppo/learner/test_fused_ring.py"

LEARNER = [
    Fault(
        "vectors that AVX2 does not have",
        "csrc/cpu/mlp_v3.cpp",
        "PYDRONE_VECTOR 8",
        "PYDRONE_VECTOR 16",
        OF_INSTRUCTIONS,
    ),
    Fault(
        "an activation of the first block's rows alone",
        TILE,
        "activate_panel<Vectors>(p, rows);",
        "activate_panel<Vectors>(p, kMost);",
        OF_FUSED,
    ),
    Fault(
        "a standard deviation below its floor that stays there",
        "pydrone/ppo/policy/actor_critic.py",
        "self.std_param.clamp_(min=MIN_STD)",
        "self.std_param.clamp(min=MIN_STD)",
        "tests/ppo/learner/test_learner.py",
    ),
    Fault(
        "a gradient through a clipped ratio",
        TILE,
        "const Vec grad = plain <= clipped ? plain :",
        "const Vec grad = plain <= plain ? plain :",
        OF_FUSED,
    ),
    Fault(
        "the plain value error where only the clipped one counts",
        TILE,
        "!loss.value_max ? held_grad :",
        "",
        OF_PREPARED,
    ),
    Fault(
        "an action that is no choice taken for the first",
        TILE,
        'chosen = all(__builtin_nanf(""));',
        "chosen = logits(first);",
        OF_PREPARED,
    ),
    Fault(
        "the entropy of the last discrete action alone",
        TILE,
        "entropies += exists ?",
        "entropies = exists ?",
        OF_PREPARED,
    ),
    Fault("the entropy's gradient that leaves the entropy out", TILE, "* p * (x + entropy)", "* p * x", OF_PREPARED),
    Fault(
        "an estimated divergence of the wrong sign",
        TILE,
        "exists ? moved - log_ratio",
        "exists ? log_ratio - moved",
        OF_FUSED,
    ),
    Fault("a choice by probability times time", ACT, "highest = p / times[j]", "highest = p * times[j]", OF_PREPARED),
    Fault(
        "the gradient of the deviation for that of its logarithm",
        PREPARED,
        "grads[-1].mul_(deviation)",
        "pass",
        OF_PREPARED,
    ),
    Fault(
        "a layer used twice that counts once",
        SHARED,
        "list(network._modules.values())",
        "list(network.children())",
        OF_PREPARED,
    ),
    Fault(
        "a parameter that was replaced goes unnoticed",
        PREPARED,
        "if len(parts) == len(self._parts) and all(",
        "if len(self._parts) > 1 or all(",
        OF_PREPARED,
    ),
    Fault(
        "a hook that is registered later goes unnoticed",
        SHARED,
        "*filter(hooked, modules), ",
        "",
        OF_PREPARED,
    ),
    Fault(
        "the smaller value error, not the larger", TILE, "larger(square, squared)", "smaller(square, squared)", OF_FUSED
    ),
    Fault(
        "a NaN that a maximum drops",
        TILE,
        "larger(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }",
        "larger(Vec a, Vec b) { return a > b ? a : b; }",
        OF_FUSED,
    ),
    Fault(
        "a gradient through a clipped value",
        TILE,
        "moved == held ? 2.0f * other : Vec{}",
        "moved == moved ? 2.0f * other : Vec{}",
        OF_FUSED,
    ),
    Fault(
        "tanh's slope from its input",
        TILE,
        "case kTanh: return 1.0f - y * y;",
        "case kTanh: return 1.0f - y;",
        OF_FUSED,
    ),
    Fault(
        "nonexistent rows of the last tile counted",
        TILE,
        "return index < static_cast<int32_t>(count);",
        "return index < static_cast<int32_t>(kTile);",
        OF_FUSED,
    ),
    Fault(
        "the logarithms of the divergence swapped",
        TILE,
        "logarithm(all(s)) - logarithm(old)",
        "logarithm(old) - logarithm(all(s))",
        OF_FUSED,
    ),
    Fault(
        "only one thread's gradients",
        GRADIENTS,
        "for (const float* thread : sums) sum += thread[x.weight_grad",
        "for (const float* thread : {sums[0]}) sum += thread[x.weight_grad",
        OF_FUSED,
    ),
    Fault("one norm for all groups", ADAM, "totals[groups[piece.index]] +=", "totals[0] +=", OF_ADAM),
    Fault(
        "the first moment's bias correction for the second",
        ADAM,
        "std::sqrt(1 - std::pow(beta2, static_cast<double>(step)))",
        "std::sqrt(1 - std::pow(beta1, static_cast<double>(step)))",
        OF_ADAM,
    ),
    Fault(
        "a decay that is rounded before it is taken from 1",
        ADAM,
        "static_cast<float>(1 - beta2)",
        "1 - static_cast<float>(beta2)",
        OF_ADAM,
    ),
    Fault(
        "clipping that scales gradients up",
        ADAM,
        "shorter >= 1 || std::isinf(max_norm) ? 1.0f : static_cast<float>(shorter)",
        "static_cast<float>(shorter)",
        OF_ADAM,
    ),
    Fault(
        "a return of the normalised advantage, in the ring",
        GRADIENTS,
        "x.returns[i] = advantage + x.values[i];",
        "x.returns[i] = (advantage - mean_) * scale_ + x.values[i];",
        OF_DRAWN,
    ),
    Fault(
        "rows of another tile",
        GRADIENTS,
        "const Batch& batch = batches[tile % 2];",
        "const Batch& batch = batches[0];",
        OF_DRAWN,
    ),
    Fault("a value that is not denormalised", ACT, "networks.value_normalizer.undo(y[i * ld])", "y[i * ld]", OF_FUSED),
    Fault(
        "gradients that replace what was there",
        PREPARED,
        "parameter.grad.add_(grad)",
        "parameter.grad.copy_(grad)",
        OF_FUSED,
    ),
    Fault(
        "the entropy bonus as a penalty",
        GRADIENTS,
        "std_grad[j] -= loss.entropy_coef",
        "std_grad[j] += loss.entropy_coef",
        OF_FUSED,
    ),
    Fault("weights packed once for all", NETWORKS, "!std::memcmp(weight, x.weight, weights) && ", "", OF_ACTING),
    Fault("biases packed once for all", NETWORKS, " && !std::memcmp(bias, x.bias, biases)", "", OF_ACTING),
    Fault(
        "a step that ends before all is checked",
        ACT,
        "  auto begin = checked_begin();",
        "  if (end) end();\n  end = nullptr;\n  auto begin = checked_begin();",
        OF_ACTING,
    ),
    Fault(
        "layers acted by that are no longer the policy's",
        ACTING,
        " or not all(map(operator.is_, parts, self._parts))",
        "",
        OF_ACTING,
    ),
    Fault(
        "the standard deviation of a rollout's first step",
        ACTING,
        "        std = policy.std_param.detach()\n",
        '        std = self.__dict__.setdefault("_std", policy.std_param.detach().clone())\n',
        OF_ACTING,
    ),
    Fault(
        "a standard deviation that is acted by below its floor",
        ACTING,
        "        if ends is None:\n            policy.bound_std()",
        "        if ends is None:\n            pass",
        OF_ACTING,
    ),
    Fault(
        "a launch for the standard deviation in each step",
        ACTING,
        "std = policy.std_param.detach()",
        "std = policy.std.detach()",
        OF_LAUNCHES,
    ),
    Fault(
        "a launch for the standard deviation in each minibatch",
        "pydrone/ppo/learner/fused.py",
        "update.run(policy.std_param,",
        "update.run(policy.std,",
        OF_LAUNCHES,
    ),
    Fault(
        "actions written over while the environment has them",
        ACTING,
        "actions = torch.empty_like(mean)",
        'actions = self.__dict__.setdefault("_actions", torch.empty_like(mean))',
        OF_ACTING,
    ),
    Fault(
        "a learning rate above its bounds held to them",
        "csrc/cpu/adam.cpp",
        "return std::max(rate, std::min(rate * factor, most));",
        "return std::min(rate * factor, most);",
        "tests/ppo/learner/test_on_cuda.py",
    ),
    Fault(
        "a step's beginning in the slot before",
        STEPS,
        "layout, *ring.where(step), cursor))",
        "layout, *ring.where(ring.appended), cursor))",
        OF_ACTING,
    ),
    Fault(
        "the next rollout's first step in a full ring",
        STEPS,
        "and step - ring.discarded >= ring.capacity",
        "and ring.appended - ring.discarded >= ring.capacity",
        OF_ACTING,
    ),
    Fault(
        "the epsilon of rsl_rl's normaliser left out",
        RSL_RL,
        "return self._normalizer._std[0] + self._normalizer.eps",
        "return self._normalizer._std[0]",
        OF_RSL_RL,
    ),
    Fault(
        "rsl_rl's advantages not normalised by minibatch",
        RSL_RL,
        "if algorithm.normalize_advantage_per_mini_batch:",
        "if False:",
        OF_RSL_RL,
    ),
    Fault(
        "hooks of rsl_rl's models not called",
        RSL_RL,
        "if hooked(x) or",
        "if",
        OF_RSL_RL,
    ),
    Fault(
        "the numbers that rsl_rl's update draws, not drawn",
        RSL_RL,
        "distribution.sample()  # as",
        "distribution.mean  # as",
        OF_RSL_RL,
    ),
    Fault(
        "a divergence of 0 that raises rsl_rl's rate",
        RSL_RL,
        "elif 0.0 < divergence <",
        "elif divergence <",
        OF_RSL_RL,
    ),
    Fault(
        "gradients of rsl_rl's standard deviation added up",
        RSL_RL,
        "self.optimizer.zero_grad()  # std",
        "pass  # std",
        OF_RSL_RL,
    ),
    Fault(
        "actor and critic of rsl_rl that share parameters",
        RSL_RL,
        "if len({id(x) for x in parameters}) < len(parameters):",
        "if False:",
        OF_RSL_RL,
    ),
    Fault(
        "gradients not averaged over rsl_rl's processes",
        RSL_RL,
        "self.reduce_parameters()",
        "pass",
        OF_RSL_RL,
    ),
]
