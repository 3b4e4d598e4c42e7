"""What :mod:`pydrone.ppo.trainer` stands on: an iteration, CUDA graphs, several processes, figures, checkpoints."""
