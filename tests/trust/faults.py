"""Known mistakes, for plant.py to make one at a time: each is a text that stands once in a file, and what replaces it.

Finite, plausible and wrong is the rule here: a mistake that crashes at once needs no test to be found.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``tests``: those that should fail, looked at before all others; arguments of pytest, separated by spaces."""

    name: str
    file: str
    old: str
    new: str
    tests: str


RECURRENCE, GAE, GATHER = "csrc/recurrence.h", "csrc/cpu/gae.cpp", "csrc/cpu/gather.cpp"
APPEND, TILES, PERMUTATION = "csrc/cpu/append.cpp", "csrc/cpu/tiles.h", "csrc/permutation.h"
SAMPLES = "csrc/cpu/samples.h"
TRITON_GAE, TRITON_GATHER = "triton_kernels/gae.py", "triton_kernels/gather.py"
REFERENCE, BUFFER, RING = "pydrone/ops/reference.py", "pydrone/buffer.py", "pydrone/ring.py"
SEQUENCES, LEARNER, LOSS = "pydrone/sequences.py", "pydrone/ppo/learner.py", "pydrone/ppo/loss.py"

OF_GAE, OF_STATS = "tests/test_gae.py", "tests/test_gae_contract.py"
OF_RING, OF_MINIBATCHES, OF_FINAL_OBS = "tests/test_ring.py", "tests/test_minibatches.py", "tests/test_final_obs.py"
OF_PROPERTIES, OF_SEQUENCES, OF_STATE = (
    "tests/test_properties.py",
    "tests/test_sequences.py",
    "tests/test_buffer_state.py",
)
IN_TRITON = "tests/ops/test_triton.py::test_cases[{}] tests/ops/test_triton.py::test_properties"
OF_TRITON, OF_GATHER, OF_APPEND = map(IN_TRITON.format, ("gae", "gather", "append"))
TILE, GRADIENTS, ACT = "csrc/cpu/mlp_tile.h", "csrc/cpu/ppo.cpp", "csrc/cpu/act.cpp"
NETWORKS, ACTING = "csrc/cpu/networks.h", "pydrone/ppo/acting.py"
OF_FUSED, OF_ACTING = "tests/ppo/test_fused.py", "tests/ppo/test_acting.py"
ADAM, OF_ADAM = "csrc/cpu/adam.cpp", "tests/ppo/test_adam.py"
OF_DRAWN = "tests/ppo/test_fused_ring.py"
OF_LEARNER, OF_LOSS = "tests/ppo/test_learner.py", "tests/ppo/test_loss.py"

CPP = [
    Fault(
        "the last value in the carry as well",
        GAE,
        "    after_ = advantages_row_;\n    next_ = next_row_;\n  }",
        "    std::copy(next_row_, next_row_ + envs_, advantages_row_);\n    after_ = advantages_row_;\n"
        "    next_ = next_row_;\n  }",
        OF_GAE,
    ),
    Fault("gamma in place of lambda", GAE, "job.gamma_lam = gamma * lam;", "job.gamma_lam = gamma * gamma;", OF_GAE),
    Fault(
        "done shifted by one step",
        GAE,
        "const uint8_t* codes = codes_of(i, slot);",
        "const uint8_t* codes = codes_of(i > 0 ? i - 1 : i, slot > 0 ? slot - 1 : slot);",
        OF_GAE,
    ),
    Fault(
        "a truncation taken for a termination",
        RECURRENCE,
        "T next = code == kTruncated ? at_truncation : next_value;",
        "T next = code == kTruncated ? T{} : next_value;",
        OF_GAE,
    ),
    Fault(
        "a product for the select of the next value",
        RECURRENCE,
        "next = code == kTerminated ? T{} : next;",
        "next = next * (code == kTerminated ? T{} : T{} + S{1});",
        OF_GAE,
    ),
    Fault(
        "a product for the select of the carry",
        RECURRENCE,
        "return cut ? delta : joined;",
        "return joined - (cut ? T{} + decay : T{}) * carry;",
        OF_GAE,
    ),
    Fault(
        "the stored value where the next one is asked for",
        GAE,
        "job_.bootstrap == kStoredValue ? values : (job_",
        "job_.bootstrap != kFinalValues ? values : (job_",
        OF_GAE,
    ),
    Fault(
        "the ring's head off by one",
        GAE,
        "const int64_t last_slot = (job_.start + end - 1) % job_.capacity;",
        "const int64_t last_slot = (job_.start + end) % job_.capacity;",
        OF_RING,
    ),
    Fault(
        "the last environment of a row left out",
        GAE,
        "  for (; i < n; ++i) {\n    const T advantage",
        "  for (; i + 1 < n; ++i) {\n    const T advantage",
        OF_GAE,
    ),
    Fault(
        "the value after a tile read from the tile that took its place",
        GAE,
        "if (next_ != next_row_) std::copy(next_, next_ + envs_, next_row_);",
        "",
        OF_GAE,
    ),
    Fault(
        "the rest of a row left out of the moments",
        GAE,
        "  for (; i < n; ++i) merge(into, 1, x[i], 0);",
        "",
        OF_STATS,
    ),
    Fault(
        "moments joined without the difference of the means",
        GAE,
        "into[2] += m2 + difference * difference * into[0] * count / total;",
        "into[2] += m2;",
        OF_STATS,
    ),
    Fault("naive sums of squares", GAE, "if (m2 >= 0.25 * second)", "if (m2 >= 0 || second >= 0)", OF_STATS),
    Fault("steps that are none in the statistics", GAE, "kept += codes[n] != kInvalid;", "kept += 1;", OF_GAE),
    Fault(
        "zero for a final value that is missing",
        GAE,
        "spare_row_[n] = std::numeric_limits<T>::quiet_NaN();",
        "spare_row_[n] = T{0};",
        f"{OF_FINAL_OBS} tests/test_captured.py",
    ),
    Fault(
        "streamed advantages without the rest of a row",
        GAE,
        "    if constexpr (Stream) advantages_out[i] = advantage;\n    returns[i]",
        "    returns[i]",
        "tests/test_gae.py tests/test_pages.py",
    ),
    Fault(
        "streamed rows without their last bytes",
        "csrc/cpu/common.h",
        "    std::memcpy(target + i, source + i, bytes - i);",
        "",
        "tests/test_buffer.py",
    ),
    Fault(
        "the rest of a tile not transposed",
        TILES,
        "for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c)",
        "for (int64_t c = whole_columns; c < columns; ++c)",
        OF_GAE,
    ),
    Fault(
        "flags by their lowest byte",
        TILES,
        "[](From x) -> uint8_t { return nonzero(x); }",
        "[](From x) -> uint8_t { return static_cast<uint8_t>(static_cast<int64_t>(x)); }",
        OF_GAE,
    ),
    Fault(
        "two rounds in place of eight",
        PERMUTATION,
        "constexpr int kRounds = 8;",
        "constexpr int kRounds = 2;",
        OF_MINIBATCHES,
    ),
    Fault(
        "the same permutation in every epoch",
        PERMUTATION,
        "for (int i = 0; i < 5; ++i) {",
        "for (int i = 0; i < 4; ++i) {",
        OF_MINIBATCHES,
    ),
    Fault(
        "half of the rollout's number in the key",
        PERMUTATION,
        "uint32_t(rollout), uint32_t(rollout >> 32),",
        "uint32_t(rollout), uint32_t(rollout),",
        f"{OF_PROPERTIES} {OF_MINIBATCHES}",
    ),
    Fault(
        "one sample beyond the last not walked back",
        SAMPLES,
        "n, batch)) >= samples.permutation.size)",
        "n, batch)) > samples.permutation.size)",
        OF_MINIBATCHES,
    ),
    Fault(
        "a biased standard deviation",
        SAMPLES,
        "std::sqrt(moments[2] / (moments[0] - 1))",
        "std::sqrt(moments[2] / moments[0])",
        OF_MINIBATCHES,
    ),
    Fault(
        "no epsilon under the advantages",
        SAMPLES,
        "static_cast<float>(1.0 / (std + kStdEpsilon))",
        "static_cast<float>(1.0 / std)",
        OF_MINIBATCHES,
    ),
    Fault(
        "returns of normalised advantages",
        GATHER,
        "result[i] = advantage[i] + value;",
        "result[i] = (advantage[i] - job.mean) * job.scale + value;",
        OF_MINIBATCHES,
    ),
    Fault(
        "rows gathered past the ring's end",
        SAMPLES,
        "slot -= slot >= capacity ? capacity : 0;",
        "slot -= slot > capacity ? capacity : 0;",
        OF_RING,
    ),
    Fault(
        "every minibatch the first one",
        SAMPLES,
        "const int64_t first = samples.first + position;",
        "const int64_t first = position;",
        OF_MINIBATCHES,
    ),
    Fault(
        "a sample's step without its correction",
        SAMPLES,
        "step += step < 0 ? num_steps : (step >= num_steps ? -num_steps : 0);",
        "",
        OF_MINIBATCHES,
    ),
    Fault(
        "crashes stored over time-outs",
        APPEND,
        "*truncated, n0, envs, true, kTruncated);",
        "*truncated, n0, envs, true, kTerminated);",
        OF_FINAL_OBS,
    ),
    Fault("two final observations in one place", APPEND, "number = place;", "number = place / 2;", OF_FINAL_OBS),
]

TRITON = [
    Fault(
        "a product for the select of the carry, in Triton",
        TRITON_GAE,
        "return tl.where(cut, advantage, advantage + link * later), ",
        "return advantage + tl.where(cut, 0.0, link) * later, ",
        OF_TRITON,
    ),
    Fault(
        "a truncation taken for a termination, in Triton",
        TRITON_GAE,
        "next_value = tl.where(code == TRUNCATED, at_truncation, next_value)",
        "next_value = tl.where(code == TRUNCATED, 0.0, next_value)",
        OF_TRITON,
    ),
    Fault(
        "the last tile without its mask",
        TRITON_GAE,
        "mask=mask, other=INVALID).to(tl.int32)",
        "mask=mask, other=RUNNING).to(tl.int32)",
        OF_TRITON,
    ),
    Fault(
        "the carry between tiles from the wrong step",
        TRITON_GAE,
        "carry = tl.sum(tl.where(lane == 0, a0, 0.0), 1)[:, None]",
        "carry = tl.sum(tl.where(lane == 0, a1, 0.0), 1)[:, None]",
        OF_TRITON,
    ),
    Fault(
        "a cut that underflows is a cut no more",
        TRITON_GAE,
        "cut = link.to(tl.int32, bitcast=True) < 0",
        "cut = link < 0",
        OF_TRITON,
    ),
    Fault(
        "the ring's end off by one, in Triton",
        TRITON_GAE,
        "slot = tl.where(slot >= capacity, slot - capacity, slot)",
        "slot = tl.where(slot > capacity, slot - capacity, slot)",
        OF_TRITON,
    ),
    Fault(
        "moments of programs joined without their means' differences, in Triton",
        TRITON_GAE,
        "squares += spread + number * offset * offset",
        "squares += spread",
        OF_TRITON,
    ),
    Fault(
        "a biased standard deviation, in Triton",
        TRITON_GATHER,
        "tl.load(stats + 2) / tl.maximum(count - 1, 1.0)",
        "tl.load(stats + 2) / tl.maximum(count, 1.0)",
        OF_GATHER,
    ),
    Fault(
        "every minibatch the first one, in Triton",
        TRITON_GATHER,
        "position = tl.where(inside, first + sample, first).to(tl.uint32)",
        "position = tl.where(inside, sample, first).to(tl.uint32)",
        OF_GATHER,
    ),
    Fault(
        "one sample beyond the last not walked back, in Triton",
        TRITON_GATHER,
        "    outside = tl.max((x >= size).to(tl.int32))\n    while outside > 0:",
        "    outside = tl.max((x > size).to(tl.int32))\n    while outside > 0:",
        OF_GATHER,
    ),
    Fault(
        "two final observations in one place, in Triton",
        "triton_kernels/append.py",
        "place = place + tl.cumsum(wanted.to(tl.int32)) - 1",
        "place = place + tl.cumsum(wanted.to(tl.int32)) // 2",
        OF_APPEND,
    ),
]

PYTHON = [
    Fault(
        "the last value in the carry as well, in the reference",
        REFERENCE,
        "carry = torch.zeros_like(next_value)",
        "carry = next_value",
        OF_GAE,
    ),
    Fault(
        "a product for the select of the carry, in the reference",
        REFERENCE,
        "torch.where(code == 0, delta + gamma * lam * carry, delta)",
        "delta + gamma * lam * carry * (code == 0)",
        OF_GAE,
    ),
    Fault(
        "a biased standard deviation, in the reference",
        REFERENCE,
        "torch.where(count > 1, m2 / (count - 1).clamp_min(1), 0).sqrt()",
        "torch.where(count > 1, m2 / count.clamp_min(1), 0).sqrt()",
        OF_MINIBATCHES,
    ),
    Fault(
        "columns taken for rows",
        "pydrone/estimators.py",
        "return x if time_dim else x.t()",
        "return x if time_dim or x.shape[0] == x.shape[1] else x.t()",
        f"{OF_GAE} {OF_PROPERTIES}",
    ),
    Fault(
        "gamma 0.99 whatever was asked for",
        BUFFER,
        '        gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)\n',
        '        gamma, lam = 0.99, unit_interval("lam", lam)\n',
        OF_RING,
    ),
    Fault(
        "the same permutation twice",
        BUFFER,
        "            epoch, self._epoch = self._epoch, self._epoch + 1\n            for first, size in plan.parts():",
        "            epoch, self._epoch = self._epoch, self._epoch\n            for first, size in plan.parts():",
        OF_MINIBATCHES,
    ),
    Fault(
        "the same permutations in every rollout",
        BUFFER,
        "return self._key, self._rollout, self._start",
        "return self._key, 0, self._start",
        OF_MINIBATCHES,
    ),
    Fault(
        "the same permutation in every epoch, read in the ring",
        BUFFER,
        "key, rollout, epoch, int(plan.shuffle)",
        "key, rollout, 0, int(plan.shuffle)",
        OF_DRAWN,
    ),
    Fault(
        "an older minibatch gathered over a later one",
        BUFFER,
        "return plan.reuse and turn != self._turns[plan.largest]",
        "return False",
        OF_MINIBATCHES,
    ),
    Fault(
        "a lazy minibatch of another rollout by the same number",
        RING,
        "        self._discards += 1\n        for name, x in own.items():",
        "        for name, x in own.items():",
        OF_MINIBATCHES,
    ),
    Fault(
        "a captured step by the host's counter",
        BUFFER,
        "if self._capturing():  # the operation",
        "if False:  # the operation",
        "tests/ppo/test_acting.py",
    ),
    Fault(
        "a minibatch's biased standard deviation",
        BUFFER,
        "advantages.std() if size > 1",
        "advantages.std(correction=0) if size > 1",
        OF_MINIBATCHES,
    ),
    Fault(
        "an overwritten tensor that autograd does not notice",
        BUFFER,
        "        written(*tensors.values())\n",
        "",
        OF_STATE,
    ),
    Fault(
        "the final values of another rollout",
        BUFFER,
        "rows = self._final_obs[rollout]",
        "rows = self._final_obs[0]",
        OF_FINAL_OBS,
    ),
    Fault(
        "final values at slots from zero on",
        BUFFER,
        "slots = (torch.arange(self.num_steps, device=self.device) + start) % self.capacity",
        "slots = torch.arange(self.num_steps, device=self.device) % self.capacity",
        OF_FINAL_OBS,
    ),
    Fault(
        "the head modulo the rollout's length",
        RING,
        "return self._discarded % self.capacity",
        "return self._discarded % self.num_steps",
        OF_RING,
    ),
    Fault(
        "a wrapped view one step short of its end",
        RING,
        "plane[:, : start + steps - self.capacity]], dim=1)",
        "plane[:, 1 : start + steps - self.capacity + 1]], dim=1)",
        OF_RING,
    ),
    Fault("a pool that is never emptied", RING, "self._pool_count[rollout].zero_()", "pass", OF_FINAL_OBS),
    Fault("every process shuffles alike", RING, "for word in (rank, 0):", "for word in (0, 0):", OF_MINIBATCHES),
    Fault(
        "a restored buffer begins its epochs anew",
        RING,
        '"computed", "epoch", "seed")',
        '"computed", "seed")',
        OF_STATE,
    ),
    Fault(
        "parts of an epoch that overlap",
        "pydrone/minibatch.py",
        "yield first, (i + 1) * total // self.count - first",
        "yield first, -(-total // self.count)",
        OF_MINIBATCHES,
    ),
    Fault(
        "a scalar read from the wrong element",
        "pydrone/sources.py",
        "fits = x.shape[:1] == (self.num_envs,) and x.numel() == self.num_envs\n        else:",
        "fits = x.numel() >= self.num_envs\n        else:",
        "tests/test_buffer.py",
    ),
    Fault(
        "ends shifted by one step",
        SEQUENCES,
        "begins[:, 1:] = ended[envs, :-1]",
        "begins[:, 1:] = ended[envs, 1:]",
        OF_SEQUENCES,
    ),
    Fault(
        "steps that only renew the memory learnt from",
        SEQUENCES,
        "(start > 0) | (offset >= burn_in)",
        "(start >= 0) | (offset >= burn_in)",
        OF_SEQUENCES,
    ),
    Fault(
        "the memory of another environment",
        SEQUENCES,
        "state[env, start] for name",
        "state[env.flip(0), start] for name",
        OF_SEQUENCES,
    ),
    Fault("resets learnt from", SEQUENCES, " & (codes[env, step] != 3)", "", OF_SEQUENCES),
    Fault("the surrogate's maximum", LOSS, "return -torch.minimum(ratio", "return -torch.maximum(ratio", OF_LOSS),
    Fault(
        "the surrogate clipped on one side",
        LOSS,
        "ratio.clamp(1 - clip, 1 + clip)",
        "ratio.clamp_max(1 + clip)",
        OF_LOSS,
    ),
    Fault("half of the KL's variance", LOSS, "(2 * std.square())).sum()", "std.square()).sum()", OF_LOSS),
    Fault(
        "entropy punished", LEARNER, "- config.entropy_coef * entropy", "+ config.entropy_coef * entropy", OF_LEARNER
    ),
    Fault("chunks that count alike", LEARNER, "(loss * share).backward()", "(loss / chunks).backward()", OF_LEARNER),
    Fault(
        "values clipped about nothing",
        LEARNER,
        "policy.normalize_values(minibatch.values[rows]),",
        "minibatch.values[rows],",
        f"{OF_LEARNER} tests/ppo/test_normalization.py",
    ),
    Fault(
        "a log-probability of the mean",
        "pydrone/ppo/policy.py",
        "return PolicyStep(torch.addcmul(mean, noise, std), log_probs, values",
        "return PolicyStep(torch.addcmul(mean, noise, std), log_probs * 0 - log_normalizer(std), values",
        "tests/ppo/test_policy.py",
    ),
    Fault(
        "running moments joined without the difference of the means",
        "pydrone/ppo/normalization.py",
        "self.m2.add_(m2 + delta.square() * self.count * share)",
        "self.m2.add_(m2)",
        "tests/ppo/test_normalization.py",
    ),
    Fault(
        "a discounted reward that runs on over an end",
        "pydrone/ppo/normalization.py",
        "running = torch.where(codes[:, t] == RUNNING, running, 0)",
        "pass",
        "tests/ppo/test_normalization.py",
    ),
    Fault(
        "a checkpoint whose bytes nobody looks at",
        "pydrone/ppo/checkpoint.py",
        "return end > 0 and content == _sealed(content[:end] + bytes(2))",
        "return end > 0",
        "tests/ppo/test_checkpoint.py",
    ),
    Fault(
        "the newest checkpoint by its name's letters",
        "pydrone/ppo/checkpoint.py",
        "found = sorted((int(match[1]), path)",
        "found = sorted((match[1], path)",
        "tests/ppo/test_checkpoint.py",
    ),
    Fault(
        "resumed with other random numbers",
        "pydrone/ppo/trainer.py",
        'torch.set_rng_state(progress["generators"]["cpu"].cpu())',
        "pass",
        "tests/ppo/test_resume.py",
    ),
    Fault(
        "a bootstrap with the value before the time-out",
        "pydrone/ppo/trainer.py",
        'return last_values, {"value_fn": policy.value}',
        'return last_values, {"timeout_bootstrap": "stored_value"}',
        "tests/ppo/test_trainer.py",
    ),
    Fault(
        "the value of the observation acted on, not of the one after",
        "pydrone/ppo/trainer.py",
        "        self._obs = obs\n        last_values = policy.value(obs)",
        "        last_values = policy.value(self._obs)\n        self._obs = obs",
        "tests/ppo/test_trainer.py",
    ),
    Fault(
        "Stable-Baselines3's episode starts not shifted",
        "pydrone/integrations/sb3.py",
        "self._ring.end_last_step(self._tensor(episode_start, bool))",
        "pass",
        "tests/integrations/test_sb3.py",
    ),
    Fault(
        "a final observation that the reset has overwritten",
        "pydrone/envs/hover_task.py",
        "dones, truncated, final_obs, None, log)",
        "dones, truncated, self._obs, None, log)",
        "tests/envs/test_hover_task.py tests/envs/test_quadrotor.py",
    ),
    Fault(
        "a crash on the last step taken for a time-out",
        "pydrone/envs/hover_task.py",
        "truncated = timeout & ~crash",
        "truncated = timeout",
        "tests/envs/test_hover_task.py tests/envs/test_quadrotor.py",
    ),
    Fault(
        "running episodes in memory that a replay does not read",
        "pydrone/ppo/meters.py",
        "self._length.copy_(length_after + torch.where(ended, 0, self._length))",
        "self._length = length_after + torch.where(ended, 0, self._length)",
        "tests/ppo/test_graphs.py",
    ),
    Fault(
        "a log that is forgotten with the first replay's figures",
        "pydrone/ppo/graphs.py",
        "trainer._env_log = self._log.copy()",
        "trainer._env_log = self._log",
        "tests/ppo/test_graphs.py",
    ),
    Fault(
        "a first iteration by the host's counters, whose kernels are not the capture's",
        "pydrone/ppo/graphs.py",
        "with trainer.buffer.as_captured():",
        "if trainer.buffer is not None:",
        "tests/ppo/test_graphs.py",
    ),
]

UPDATE = [
    Fault(
        "a clipped ratio that goes on being learnt from",
        TILE,
        "const Vec grad = plain <= clipped ? plain :",
        "const Vec grad = plain <= plain ? plain :",
        OF_FUSED,
    ),
    Fault("the smaller value error, not the larger", TILE, "squared > square ? squared : square", "square", OF_FUSED),
    Fault(
        "a clipped value that goes on being learnt from",
        TILE,
        "moved == held ? 2.0f * other : Vec{}",
        "moved == moved ? 2.0f * other : Vec{}",
        OF_FUSED,
    ),
    Fault(
        "tanh's slope of its input", TILE, "case kTanh: return 1.0f - y * y;", "case kTanh: return 1.0f - y;", OF_FUSED
    ),
    Fault(
        "rows of the last tile that do not exist",
        TILE,
        "return index < static_cast<int32_t>(count);",
        "return index < static_cast<int32_t>(kTile);",
        OF_FUSED,
    ),
    Fault(
        "the divergence the other way round",
        TILE,
        "logarithm(all(s)) - logarithm(old)",
        "logarithm(old) - logarithm(all(s))",
        OF_FUSED,
    ),
    Fault(
        "one thread's gradients alone",
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
        "clipping that lengthens",
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
        "pydrone/ppo/fused.py",
        "parameter.grad.add_(grad)",
        "parameter.grad.copy_(grad)",
        OF_FUSED,
    ),
    Fault(
        "the entropy bonus as a penalty",
        "pydrone/ppo/fused.py",
        "torch.full_like(entropy, -entropy_coef)",
        "torch.full_like(entropy, entropy_coef)",
        OF_FUSED,
    ),
    Fault("weights packed once for all", NETWORKS, "!std::memcmp(weight, x.weight, weights) && ", "", OF_ACTING),
    Fault("biases packed once for all", NETWORKS, " && !std::memcmp(bias, x.bias, biases)", "", OF_ACTING),
    Fault(
        "a step that ends before all is checked",
        ACT,
        "  const auto begin = checked_append(",
        "  if (end) end();\n  end = nullptr;\n  const auto begin = checked_append(",
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
        "        self._std.copy_(policy.std)\n",
        "        if ends is None:\n            self._std.copy_(policy.std)\n",
        OF_ACTING,
    ),
    Fault(
        "actions written over while the environment has them",
        ACTING,
        "actions = torch.empty_like(mean)",
        'actions = self.__dict__.setdefault("_actions", torch.empty_like(mean))',
        OF_ACTING,
    ),
    Fault(
        "a step's beginning in the slot before",
        BUFFER,
        "layout, *self._place(step)))",
        "layout, *self._place(self._appended)))",
        OF_ACTING,
    ),
    Fault(
        "the next rollout's first step in a full ring",
        BUFFER,
        "or step - self._discarded >= self.capacity",
        "or self._appended - self._discarded >= self.capacity",
        OF_ACTING,
    ),
]

FAULTS = [*PYTHON, *TRITON, *CPP, *UPDATE]
