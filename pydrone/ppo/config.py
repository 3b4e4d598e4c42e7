"""The settings of a training, with their defaults. Plain dataclasses: no dependency beyond Python.

Each field carries its help text and its other names in ``metadata``, from which the command line is made. A default
of None is one that depends on the device or the environment; its help text says on what.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, help: str, *aliases: str) -> Any:
    """A dataclass field with its help text and the further names it has on the command line."""
    return field(default=default, metadata={"help": help, "aliases": aliases})


@dataclass
class PPOConfig:
    """Proximal policy optimisation (arXiv:1707.06347), with rsl_rl's learning-rate schedule."""

    learning_rate: float = option(3e-4, "Adam's learning rate, the first one with the adaptive schedule.", "--lr")
    schedule: Literal["adaptive", "fixed"] = option(
        "adaptive", "adaptive: / 1.5 above twice desired-kl, * 1.5 below half of it, before each minibatch's step."
    )
    desired_kl: float = option(0.01, "KL divergence (old || new) the adaptive schedule holds, nats.")
    num_epochs: int = option(5, "Passes over a rollout.", "--num-learning-epochs")
    num_minibatches: int = option(4, "Minibatches in a pass.", "--num-mini-batches")
    clip: float = option(
        0.2, "Half-width of the clip range, of the probability ratio and of the value.", "--clip-param"
    )
    entropy_coef: float = option(0.004, "Weight of the entropy bonus.")
    value_loss_coef: float = option(1.0, "Weight of the value loss.")
    clipped_value_loss: bool = option(True, "Clip the value loss too.")
    max_grad_norm: float = option(1.0, "Norm the gradients are clipped to, actor and critic each on its own.")
    gamma: float = option(0.99, "Discount a step.")
    lam: float = option(0.95, "GAE's lambda.")
    normalize_advantages: bool = option(True, "Advantages to mean 0 and standard deviation 1 over the rollout.")
    hidden_dims: tuple[int, ...] = option((128, 128), "Widths of the hidden layers, of actor and critic alike.")
    init_std: float = option(1.0, "First standard deviation of the actions.")
    chunk_size: int | None = option(
        None,
        "Samples that go through the networks at a time; the gradients add up. None: 3200 a thread on the "
        "CPU, where the activations then stay in the caches, the whole minibatch on CUDA.",
    )

    def __post_init__(self) -> None:
        for name in ("num_epochs", "num_minibatches"):
            _at_least(self, name, 1)
        for name in ("learning_rate", "desired_kl", "clip", "max_grad_norm", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)!r}")
        if self.schedule not in ("adaptive", "fixed"):
            raise ValueError(f"schedule: expected 'adaptive' or 'fixed', got {self.schedule!r}")
        if self.chunk_size is not None:
            _at_least(self, "chunk_size", 1)


@dataclass
class TrainConfig:
    """A training from beginning to end."""

    env: Literal["genesis-hover", "quadrotor"] = option(
        "genesis-hover", "genesis-hover: a Crazyflie in the Genesis simulator; quadrotor: pure PyTorch, no simulator."
    )
    num_envs: int | None = option(None, "Environments that run at once. None: 8192 on CUDA, 1024 on the CPU.")
    num_steps: int = option(100, "Steps of each environment in a rollout.", "--num-steps-per-env")
    iterations: int = option(301, "Rollouts to learn from.", "--max-iterations")
    device: str | None = option(None, "cpu, cuda, cuda:1, ... None: cuda where there is one.")
    seed: int = option(1, "Seed of the networks, the actions, the environment and the shuffle.")
    target_episode_length: float | None = option(
        None, "Stop once the mean episode length over ten iterations reaches this many steps. None: never."
    )
    random_episode_starts: bool = option(True, "Start episodes at random ages, so that they do not time out together.")
    run_dir: str | None = option(None, "Folder of the run. None: runs/ENV/DATE-TIME.")
    resume: str | None = option(None, "Checkpoint to go on from.")
    save_interval: int = option(50, "Iterations from one checkpoint to the next.")
    tensorboard: bool = option(True, "Write TensorBoard event files.")
    ppo: PPOConfig = field(default_factory=PPOConfig, metadata={"help": "The algorithm.", "aliases": ()})

    def __post_init__(self) -> None:
        for name in ("num_steps", "iterations", "save_interval"):
            _at_least(self, name, 1)
        if self.num_envs is not None:
            _at_least(self, "num_envs", 1)


def default_num_envs(device_type: str) -> int:
    """How many environments a device of this type is given by default."""
    return 8192 if device_type == "cuda" else 1024


def _at_least(config: Any, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise ValueError(f"{name}: expected at least {least}, got {getattr(config, name)!r}")
