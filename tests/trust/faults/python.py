"""Mistakes in Python: the reference, the buffer, the learner, the trainer."""

from __future__ import annotations

from .fault import Fault

REFERENCE = "pydrone/ops/reference.py"
BUFFER = "pydrone/buffer.py"
RING = "pydrone/rollout/ring.py"
SCAN = "pydrone/rollout/scan.py"
STEPS = "pydrone/rollout/steps.py"
DRAWS = "pydrone/rollout/draws.py"
SEQUENCES = "pydrone/rollout/sequences.py"
LEARNER = "pydrone/ppo/learner/learner.py"
LOSS = "pydrone/ppo/learner/loss.py"
DISTRIBUTIONS = "pydrone/ppo/policy/distributions.py"
OF_GAE = "tests/test_gae.py"
OF_RING = "tests/rollout/test_ring.py"
OF_MINIBATCHES = "tests/rollout/test_minibatches.py"
OF_FINAL_OBS = "tests/rollout/test_final_obs.py"
OF_PROPERTIES = "tests/test_properties.py"
OF_SEQUENCES = "tests/rollout/test_sequences.py"
OF_STATE = "tests/test_buffer_state.py"
OF_DRAWN = "tests/ppo/learner/test_fused_ring.py"
OF_LEARNER = "tests/ppo/learner/test_learner.py"
OF_LOSS = "tests/ppo/learner/test_loss.py"
OF_DISTRIBUTIONS = "tests/ppo/policy/test_distributions.py"

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
        SCAN,
        '        gamma, lam = unit_interval("gamma", gamma), unit_interval("lam", lam)\n',
        '        gamma, lam = 0.99, unit_interval("lam", lam)\n',
        OF_RING,
    ),
    Fault(
        "the same permutation twice",
        DRAWS,
        "        self.epoch += 1\n        return self.epoch - 1",
        "        return self.epoch",
        OF_MINIBATCHES,
    ),
    Fault(
        "the same permutations in every rollout",
        DRAWS,
        "self.key, self._ring.rollout, self._ring.start",
        "self.key, 0, self._ring.start",
        OF_MINIBATCHES,
    ),
    Fault(
        "the same permutation in every epoch, read in the ring",
        DRAWS,
        "key, rollout, epoch, shuffle, first, size]",
        "key, rollout, 0, shuffle, first, size]",
        OF_DRAWN,
    ),
    Fault(
        "an older minibatch gathered over a later one",
        DRAWS,
        "return plan.reuse and turn != self._turns[plan.largest]",
        "return False",
        OF_MINIBATCHES,
    ),
    Fault(
        "a lazy minibatch of another rollout by the same number",
        RING,
        "list(resets)\n        self.discards += 1\n",
        "list(resets)\n",
        OF_MINIBATCHES,
    ),
    Fault(
        "a precision of the products that is not given back",
        "pydrone/ppo/policy/matmul.py",
        "            x.fp32_precision = was",
        "            pass",
        "tests/ppo/policy/test_matmul.py",
    ),
    Fault(
        "a backward pass in the precision of the process",
        LEARNER,
        "with precision.products(self.policy.matmul, self.learning_rate.device):",
        "if True:",
        "tests/ppo/policy/test_matmul.py",
    ),
    Fault(
        "a captured step by the host's counter",
        STEPS,
        "        cursor = ring.cursor if captured else None\n        try:",
        "        cursor = None\n        try:",
        "tests/ppo/learner/test_acting.py",
    ),
    Fault(
        "a minibatch's biased standard deviation",
        DRAWS,
        "advantages.std() if part.size > 1",
        "advantages.std(correction=0) if part.size > 1",
        OF_MINIBATCHES,
    ),
    Fault(
        "an overwritten tensor that autograd does not notice",
        DRAWS,
        "        written(*tensors.values())\n",
        "",
        OF_STATE,
    ),
    Fault(
        "the final values of another rollout",
        SCAN,
        "values = value_fn(storage.final_observations(ring.place, rows))",
        "values = value_fn(storage.final_observations(0, rows))",
        OF_FINAL_OBS,
    ),
    Fault(
        "final values at slots from zero on",
        SCAN,
        "slots = (torch.arange(ring.num_steps, device=storage.device) + start) % ring.capacity",
        "slots = torch.arange(ring.num_steps, device=storage.device) % ring.capacity",
        OF_FINAL_OBS,
    ),
    Fault(
        "the head modulo the rollout's length",
        RING,
        "return self.discarded % self.capacity",
        "return self.discarded % self.num_steps",
        OF_RING,
    ),
    Fault(
        "a wrapped view one step short of its end",
        "pydrone/rollout/views.py",
        "plane[:, : start + steps - self._ring.capacity]], dim=1)",
        "plane[:, 1 : start + steps - self._ring.capacity + 1]], dim=1)",
        OF_RING,
    ),
    Fault("a pool that is never emptied", BUFFER, "storage.pool_count[place].zero_()", "pass", OF_FINAL_OBS),
    Fault("every process shuffles alike", DRAWS, "for word in (rank, 0):", "for word in (0, 0):", OF_MINIBATCHES),
    Fault(
        "a restored buffer begins its epochs anew",
        BUFFER,
        'self._draws.epoch = state["seed"], state["epoch"]',
        'self._draws.epoch = state["seed"], 0',
        OF_STATE,
    ),
    Fault(
        "parts of an epoch that overlap",
        "pydrone/rollout/minibatch.py",
        "yield first, (i + 1) * total // self.count - first",
        "yield first, -(-total // self.count)",
        OF_MINIBATCHES,
    ),
    Fault(
        "a scalar read from the wrong element",
        "pydrone/rollout/sources.py",
        "fits = x.shape in ((self.num_envs,), (self.num_envs, 1))\n        else:",
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
        "an episode's first steps taken for those of an earlier policy",
        "pydrone/ppo/policy/recurrent.py",
        "config.burn_in * continued",
        "config.burn_in",
        "tests/ppo/policy/test_recurrent.py",
    ),
    Fault(
        "the memory of another environment",
        SEQUENCES,
        "state[env, start] for name",
        "state[env.flip(0), start] for name",
        OF_SEQUENCES,
    ),
    Fault("resets learnt from", SEQUENCES, " & (codes[env, step] != 3)", "", OF_SEQUENCES),
    Fault("a ratio that overflows", LOSS, "(advantages >= 0) & (log_ratio > most)", "log_ratio != log_ratio", OF_LOSS),
    Fault("the surrogate's maximum", LOSS, "return -torch.minimum(ratio", "return -torch.maximum(ratio", OF_LOSS),
    Fault(
        "the surrogate clipped on one side",
        LOSS,
        "ratio.clamp(1 - clip, 1 + clip)",
        "ratio.clamp_max(1 + clip)",
        OF_LOSS,
    ),
    Fault(
        "half of the KL's variance",
        "pydrone/ppo/policy/distributions.py",
        "(2 * std.square())).sum()",
        "std.square()).sum()",
        "tests/ppo/policy/test_distributions.py",
    ),
    Fault(
        "entropy punished", LEARNER, "- config.entropy_coef * entropy", "+ config.entropy_coef * entropy", OF_LEARNER
    ),
    Fault("chunks that count alike", LEARNER, "(loss * share).backward()", "(loss / chunks).backward()", OF_LEARNER),
    Fault(
        "values clipped about nothing",
        LEARNER,
        "policy.normalize_values(minibatch.values[rows]),",
        "minibatch.values[rows],",
        f"{OF_LEARNER} tests/ppo/learner/test_fused.py",
    ),
    Fault(
        "a log-probability of the mean",
        "pydrone/ppo/policy/actor_critic.py",
        "return PolicyStep(torch.addcmul(mean, noise, std), log_probs, values",
        "return PolicyStep(torch.addcmul(mean, noise, std), log_probs * 0 - log_normalizer(std), values",
        "tests/ppo/policy/test_policy.py",
    ),
    Fault(
        "running moments joined without the difference of the means",
        "pydrone/ppo/policy/normalization.py",
        "self.m2.add_(m2 + delta.square() * self.count * share)",
        "self.m2.add_(m2)",
        "tests/ppo/policy/test_normalization.py",
    ),
    Fault(
        "a discounted reward that runs on over an end",
        "pydrone/ppo/policy/normalization.py",
        "running = torch.where(codes[:, t] == RUNNING, running, 0)",
        "pass",
        "tests/ppo/policy/test_normalization.py",
    ),
    Fault(
        "a checkpoint whose bytes nobody looks at",
        "pydrone/ppo/training/checkpoint.py",
        "return end > 0 and content == _sealed(content[:end] + bytes(2))",
        "return end > 0",
        "tests/ppo/training/test_checkpoint.py",
    ),
    Fault(
        "the newest checkpoint by its name's letters",
        "pydrone/ppo/training/checkpoint.py",
        "found = sorted((int(match[1]), path)",
        "found = sorted((match[1], path)",
        "tests/ppo/training/test_checkpoint.py",
    ),
    Fault(
        "resumed with other random numbers",
        "pydrone/ppo/training/progress.py",
        'torch.set_rng_state(progress["generators"]["cpu"].cpu())',
        "pass",
        "tests/ppo/training/test_resume.py",
    ),
    Fault(
        "a bootstrap with the value before the time-out",
        "pydrone/ppo/training/iteration.py",
        'return last_values, {"value_fn": policy.value, "without_final_obs": "stored_value"}',
        'return last_values, {"timeout_bootstrap": "stored_value"}',
        "tests/ppo/test_trainer.py",
    ),
    Fault(
        "the bootstrap of all time-outs decided by the last step",
        "pydrone/ppo/training/iteration.py",
        "known |= final_obs is not None",
        "known = final_obs is not None",
        "tests/ppo/training/test_autoreset.py",
    ),
    Fault(
        "statistics of observations with those of reset steps",
        "pydrone/ppo/policy/actor_critic.py",
        "obs, valid = obs.obs, obs.valid",
        "obs = obs.obs",
        "tests/ppo/policy/test_normalization.py",
    ),
    Fault(
        "a reward figure that counts reset steps",
        "pydrone/ppo/training/figures.py",
        "paid = torch.where(valid, rewards, 0).sum(dtype=torch.float64), valid.sum()",
        "paid = rewards.sum(dtype=torch.float64), torch.ones_like(valid).sum()",
        "tests/ppo/training/test_autoreset.py",
    ),
    Fault(
        "what stands in a reset step acted on",
        "pydrone/ppo/training/iteration.py",
        "obs = to_act_on(result, self.autoreset)",
        "obs = result.obs",
        "tests/ppo/training/test_autoreset.py",
    ),
    Fault(
        "a pool that does not grow",
        "pydrone/ppo/training/iteration.py",
        "self._make_room(step, result.truncated)",
        "pass",
        "tests/ppo/training/test_autoreset.py",
    ),
    Fault(
        "the value of the observation acted on, not of the one after",
        "pydrone/ppo/training/iteration.py",
        "        self.observations = obs\n        last_values = policy.value(obs)",
        "        last_values = policy.value(self.observations)\n        self.observations = obs",
        "tests/ppo/test_trainer.py",
    ),
    Fault(
        "Stable-Baselines3's episode starts not shifted",
        "pydrone/integrations/sb3.py",
        "starts[1:].t(), dones",
        "starts[:-1].t(), dones",
        "tests/integrations/test_sb3.py",
    ),
    Fault(
        "Stable-Baselines3's returns that a callback has written, ignored",
        "pydrone/integrations/sb3.py",
        "if self._exposed:",
        "if False:",
        "tests/integrations/test_sb3_surface.py",
    ),
    Fault(
        "rsl_rl's returns that an algorithm has written, ignored",
        "pydrone/integrations/rsl_rl.py",
        "if not self._exposed:",
        "if True:",
        "tests/integrations/test_rsl_rl_surface.py",
    ),
    Fault(
        "half precision widened in a drop-in's minibatches",
        "pydrone/rollout/layout.py",
        "if dtype in HALVES and not self._verbatim else",
        "if dtype in HALVES else",
        "tests/test_buffer.py tests/integrations/test_sb3_surface.py tests/integrations/test_rsl_rl_surface.py",
    ),
    Fault(
        "a final observation that the reset has overwritten",
        "pydrone/envs/hover_task.py",
        "dones, truncated, final_obs, None, log)",
        "dones, truncated, self._obs, None, log)",
        "tests/envs/test_hover_task.py tests/envs/test_quadrotor.py",
    ),
    Fault(
        "a broken package taken for a missing one",
        "pydrone/ops/packages.py",
        "isinstance(error, ModuleNotFoundError) and error.name == module",
        "isinstance(error, ModuleNotFoundError)",
        "tests/ops/test_packages.py",
    ),
    Fault(
        "an infinite action taken for the largest one",
        "pydrone/envs/drone.py",
        "clamp(*ACTION_LIMITS).add_(actions, alpha=0)",
        "clamp(*ACTION_LIMITS)",
        "tests/envs/test_quadrotor.py",
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
        "pydrone/ppo/training/meters.py",
        "self._length.copy_(length_after + torch.where(ended, 0, self._length))",
        "self._length = length_after + torch.where(ended, 0, self._length)",
        "tests/ppo/training/test_graphs.py",
    ),
    Fault(
        "a log that is forgotten with the first replay's figures",
        "pydrone/ppo/training/figures.py",
        "self._gather(computed, computed.log.copy(), stop)",
        "self._gather(computed, computed.log, stop)",
        "tests/ppo/training/test_graphs.py",
    ),
    Fault(
        "a first iteration by the host's counters, whose kernels are not the capture's",
        "pydrone/ppo/training/graphs.py",
        "with iteration.buffer.as_captured():",
        "if iteration.buffer is not None:",
        "tests/ppo/training/test_graphs.py",
    ),
    Fault(
        "a rate below its bounds raised to them by a large divergence",
        LEARNER,
        "torch.minimum(rate, (rate / LEARNING_RATE_FACTOR).clamp_min(least))",
        "(rate / LEARNING_RATE_FACTOR).clamp_min(least)",
        OF_LEARNER,
    ),
    Fault(
        "a setting that a resumed training keeps, changed without a word",
        "pydrone/ppo/training/progress.py",
        'if name in ON_RESUME["kept"]:',
        'if name in ("hidden_dims",):',
        "tests/ppo/training/test_robust.py",
    ),
    Fault(
        "a reward scale that a resumed training ignores",
        "pydrone/ppo/policy/normalization.py",
        "        if not self.normalize:\n            self.factor.fill_(self.scale)",
        "        if False:\n            self.factor.fill_(self.scale)",
        "tests/ppo/training/test_robust.py",
    ),
    Fault(
        "an environment object recorded by the settings' default",
        "pydrone/envs/record.py",
        'settings = {"env": record.label, "num_envs"',
        'settings = {"num_envs"',
        "tests/cli/test_train_again.py",
    ),
    Fault(
        "the bounds of a wrapped environment taken for the wrapper's",
        "pydrone/envs/record.py",
        "inspect.getattr_static(env, name)",
        "getattr(env, name)",
        "tests/ppo/test_export.py",
    ),
    Fault(
        "the first action's bounds for all",
        "pydrone/ppo/export.py",
        "if len({*zip(*limits)}) == 1 and",
        "if limits and",
        "tests/ppo/test_export.py",
    ),
    Fault(
        "an array of NumPy that comes back as a tensor",
        "pydrone/ppo/training/checkpoint.py",
        "return array[()] if scalar else array",
        "return array[()] if scalar else tensor",
        "tests/ppo/training/test_checkpoint.py",
    ),
    Fault(
        "a checkpoint that is not read back",
        "pydrone/ppo/training/checkpoint.py",
        "        _read(content)\n    except (OSError",
        "    except (OSError",
        "tests/ppo/training/test_checkpoint.py",
    ),
]
