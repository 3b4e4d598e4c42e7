"""PPO on the rollout buffer: a policy, a loss, a learner, a trainer. Import the modules, nothing is imported here."""
