"""The settings of a training, with their defaults. Plain dataclasses: no dependency beyond Python.

Each field has its help text and aliases in ``metadata``, from which the command line is built. A default
of None depends on the device or the environment; the help text says how.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from pydrone.envs import ENVIRONMENTS, Randomization, TaskOptions, check_name
from pydrone.envs.registry import is_gymnasium

# The values that fields of PPOConfig may have.
CHOICES = {
    "schedule": ("adaptive", "fixed", "linear"),
    "advantage_scope": ("rollout", "rank", "minibatch"),
    "obs_dtype": ("float32", "float16", "bfloat16"),
    "recurrent": ("none", "gru", "lstm"),
    "activation": ("tanh", "elu", "relu", "silu"),
    "learner": ("auto", "torch", "fused"),
    "matmul": (None, "float32", "tf32", "bfloat16"),
}

# What a resumed training makes of a setting that is not its checkpoint's; each is in one of the three, and task and
# randomization as a whole. docs/training.md lists them.
ON_RESUME = {
    # Refused by name: it is in the weights or the running statistics, or was read before the first iteration alone.
    "kept": (
        *("hidden_dims", "activation", "recurrent", "rnn_dim", "actor_obs", "critic_obs"),
        *("normalize_obs", "normalize_values", "init_std"),
    ),
    # Holds from the next iteration, and is said.
    "new": (
        *("env", "env_kwargs", "num_envs", "num_steps", "seed", "random_episode_starts", "task", "randomization"),
        *("learning_rate", "schedule", "desired_kl", "max_kl", "num_epochs", "num_minibatches", "clip", "entropy_coef"),
        *("value_loss_coef", "clipped_value_loss", "max_grad_norm", "gamma", "lam", "normalize_advantages"),
        *("advantage_scope", "obs_clip", "normalize_rewards", "reward_scale", "obs_dtype", "matmul", "burn_in"),
        "ema_decay",
    ),
    # Says how long and where it trains, or what is written.
    "of the process": (
        *("iterations", "target_episode_length", "device", "run_dir", "resume", "save_interval", "tensorboard"),
        *("wandb", "wandb_project", "capture", "live", "learner", "chunk_size", "autocast"),  # which is matmul
    ),
}


def option(default: Any, help: str, *aliases: str) -> Any:
    """A dataclass field with its help text and the further names it has on the command line."""
    return field(default=default, metadata={"help": help, "aliases": aliases})


@dataclass
class PPOConfig:
    """Proximal policy optimisation (arXiv:1707.06347), with rsl_rl's learning-rate schedule."""

    learning_rate: float = option(3e-4, "Adam's learning rate; with the adaptive schedule the initial one.", "--lr")
    schedule: Literal["adaptive", "fixed", "linear"] = option(
        "adaptive",
        "adaptive: / 1.5 above twice desired-kl, * 1.5 below half of it, before each minibatch's step. linear: from "
        "learning-rate towards 0 at the last iteration.",
    )
    desired_kl: float = option(0.01, "KL divergence (old || new) that the adaptive schedule aims at, nats.")
    max_kl: float | None = option(
        None,
        "End the update at the first minibatch whose KL divergence is above this, before its step. None: never.",
    )
    num_epochs: int = option(5, "Passes over a rollout.", "--num-learning-epochs")
    num_minibatches: int = option(4, "Minibatches per pass.", "--num-mini-batches")
    clip: float = option(0.2, "Half-width of the clip range of the probability ratio and of the value.", "--clip-param")
    entropy_coef: float = option(0.004, "Weight of the entropy bonus.")
    value_loss_coef: float = option(1.0, "Weight of the value loss.")
    clipped_value_loss: bool = option(True, "Clip the value loss too.")
    max_grad_norm: float = option(1.0, "Norm that the gradients are clipped to, separately for actor and critic.")
    gamma: float = option(0.99, "Discount per step.")
    lam: float = option(0.95, "GAE's lambda.")
    normalize_advantages: bool = option(True, "Normalise advantages to mean 0 and standard deviation 1.")
    advantage_scope: Literal["rollout", "rank", "minibatch"] = option(
        "rollout",
        "What advantages are normalised over: the rollouts of all processes, each process's own (rank), or each "
        "minibatch.",
    )
    normalize_obs: bool = option(
        False, "Normalise observations by running statistics, which one rollout before the first iteration fills."
    )
    obs_clip: float = option(10.0, "Largest magnitude of a normalised observation.")
    normalize_values: bool = option(
        False,
        "The critic learns returns normalised by running statistics; clip is in the normalised unit.",
    )
    normalize_rewards: bool = option(
        False, "Divide rewards by the running standard deviation of the discounted reward."
    )
    reward_scale: float = option(1.0, "Factor on the rewards that are learnt from; figures show rewards without it.")
    actor_obs: tuple[str, ...] = option((), "Observation groups that the actor sees. Empty: policy.")
    critic_obs: tuple[str, ...] = option(
        (), "Observation groups that the critic sees. Empty: critic, or the actor's where there is no such group."
    )
    obs_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "float32", "Type that observations are stored as; the policy sees them rounded to it, also when acting."
    )
    matmul: Literal["float32", "tf32", "bfloat16"] | None = option(
        None,
        "What the operands of the networks' matrix products are rounded to, in acting and learning; all else is "
        "float32. None: tf32 on CUDA, float32 elsewhere. A CPU computes tf32 in float32, and bfloat16 slowly without "
        "AVX512_BF16.",
    )
    autocast: bool = option(False, "The same as --matmul bfloat16.")
    recurrent: Literal["none", "gru", "lstm"] = option(
        "none", "A recurrent layer before the hidden ones, in actor and critic. Minibatches are whole environments."
    )
    rnn_dim: int = option(64, "Units of the recurrent layer.")
    burn_in: int = option(
        0, "Steps that only rebuild the recurrent state, where an episode continues from the previous rollout."
    )
    hidden_dims: tuple[int, ...] = option((128, 128), "Widths of the hidden layers of actor and critic.")
    activation: Literal["tanh", "elu", "relu", "silu"] = option("tanh", "Activation of the hidden layers.")
    learner: Literal["auto", "torch", "fused"] = option(
        "auto",
        "How gradients are computed. fused: by one operation, on a CPU about five times as fast; for multilayer "
        "perceptrons and continuous actions in float32. On CUDA by Triton, or only the loss where its kernel cannot "
        "serve the networks. torch: autograd. auto: fused where possible.",
    )
    ema_decay: float = option(
        0.0,
        "Factor per iteration of an exponential moving average of the weights, which eval and export take. 0: the last "
        "weights.",
    )
    init_std: float = option(1.0, "Initial standard deviation of the actions, which is never below 1e-4.")
    chunk_size: int | None = option(
        None,
        "Samples that autograd processes at a time, accumulating gradients. None: 3200 per thread on the CPU, which "
        "keeps the activations in the caches; the whole minibatch on CUDA. fused has its own.",
    )

    def __post_init__(self) -> None:
        _make_plain(self)
        for name in ("num_epochs", "num_minibatches", "rnn_dim"):
            _count(name, getattr(self, name))
        if self.chunk_size is not None:
            _count("chunk_size", self.chunk_size)
        for name in ("learning_rate", "desired_kl", "clip", "max_grad_norm", "init_std", "obs_clip", "reward_scale"):
            _number(name, getattr(self, name), "above 0", lambda x: x > 0)
        if self.max_kl is not None:
            _number("max_kl", self.max_kl, "above 0", lambda x: x > 0)
        for name in ("entropy_coef", "value_loss_coef"):
            _number(name, getattr(self, name), "of at least 0", lambda x: x >= 0)
        for name in ("gamma", "lam"):
            _number(name, getattr(self, name), "from 0 to 1", lambda x: 0 <= x <= 1)
        _number("ema_decay", self.ema_decay, "of at least 0 and below 1", lambda x: 0 <= x < 1)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                expected = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if self.autocast:
            if self.matmul not in (None, "bfloat16"):
                raise ValueError(f"autocast: expected False with matmul {self.matmul!r}, got {self.autocast!r}")
            self.matmul, self.autocast = "bfloat16", False  # one setting in one place
        for name in ("actor_obs", "critic_obs"):
            groups = getattr(self, name)
            if not isinstance(groups, (tuple, list)) or not all(isinstance(x, str) for x in groups):
                raise ValueError(f"{name}: expected a tuple of names, got {groups!r}")
            setattr(self, name, tuple(groups))
        if isinstance(self.burn_in, bool) or not isinstance(self.burn_in, int) or self.burn_in < 0:
            raise ValueError(f"burn_in: expected an int of at least 0, got {self.burn_in!r}")
        if self.burn_in and self.recurrent == "none":
            raise ValueError(f"burn_in: expected 0 without a recurrent layer, got {self.burn_in}")
        if not isinstance(self.hidden_dims, (tuple, list)):
            raise ValueError(f"hidden_dims: expected a tuple of ints, got {self.hidden_dims!r}")
        for i, width in enumerate(self.hidden_dims):
            _count(f"hidden_dims[{i}]", width)
        self.hidden_dims = tuple(self.hidden_dims)


@dataclass
class TrainConfig:
    """The settings of a training."""

    env: str = option(
        "genesis-hover",
        "genesis-hover: a Crazyflie in the Genesis simulator; quadrotor: without a simulator; genesis-course, "
        "quadrotor-course: through waypoints; or one that an installed package offers (docs/environments.md); or "
        "gymnasium:ID, as gymnasium:Pendulum-v1.",
    )
    num_envs: int | None = option(
        None,
        "Environments that run at once, in each process. None: 8192 on CUDA, 1024 on the CPU; 16 of Gymnasium, which "
        "steps them one after another.",
    )
    num_steps: int = option(100, "Steps per environment in a rollout.", "--num-steps-per-env")
    iterations: int = option(301, "Rollouts to learn from.", "--max-iterations")
    device: str | None = option(None, "cpu, cuda, cuda:1, ... None: cuda where there is one.")
    seed: int = option(1, "Seed of the networks, the actions, the environment and the shuffle.")
    target_episode_length: float | None = option(
        None, "Stop once the mean episode length over ten iterations reaches this many steps. None: never."
    )
    random_episode_starts: bool = option(
        True, "Start the first episodes at random ages, so that they do not all time out together."
    )
    run_dir: str | None = option(None, "Folder of the run. None: runs/ENV/DATE-TIME.")
    resume: str | None = option(
        None,
        "A run's folder, to continue it from its newest checkpoint, or a checkpoint, to continue in a new folder. "
        "Settings are the checkpoint's unless --config or the command line changes them; not "
        f"{', '.join(ON_RESUME['kept'])}.",
    )
    save_interval: int = option(50, "Iterations between checkpoints.")
    tensorboard: bool = option(True, "Write TensorBoard event files.")
    wandb: bool = option(False, "Log to Weights & Biases too; needs wandb.")
    wandb_project: str = option("pydrone", "Its project.")
    capture: bool | Literal["auto"] = option(
        "auto",
        "Replay iterations as one CUDA graph. True (or --capture alone): an error where they cannot be. False (or "
        "--no-capture): never. auto: where they can be, else only the update where that can be.",
    )
    live: bool = option(True, "Draw the progress where the output is a terminal; elsewhere print a line per iteration.")
    ppo: PPOConfig = field(default_factory=PPOConfig, metadata={"help": "The algorithm.", "aliases": ()})
    task: TaskOptions = field(
        default_factory=TaskOptions, metadata={"help": "Of the tasks that pydrone brings.", "aliases": ()}
    )
    randomization: Randomization = field(
        default_factory=Randomization,
        metadata={"help": "Ranges that every drone draws from for each episode. Off by default.", "aliases": ()},
    )
    env_kwargs: dict[str, bool | int | float | str] = field(
        default_factory=dict,
        metadata={
            "help": "Arguments of an environment that pydrone does not bring, such as --env-kwargs g 9.81 for "
            "gymnasium:Pendulum-v1.",
            "aliases": (),
        },
    )

    def __post_init__(self) -> None:
        _make_plain(self)
        self.device = None if self.device is None else str(self.device)
        for name in ("num_steps", "iterations", "save_interval"):
            _count(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed: expected an int, got {self.seed!r}")
        check_name(self.env)
        _check_env_kwargs(self.env, self.env_kwargs)
        if not isinstance(self.capture, bool) and self.capture != "auto":
            raise ValueError(f"capture: expected True, False or 'auto', got {self.capture!r}")
        if self.target_episode_length is not None:
            _number("target_episode_length", self.target_episode_length, "above 0", lambda x: x > 0)
        if self.ppo.burn_in >= self.num_steps:
            raise ValueError(f"burn_in: expected less than num_steps, {self.num_steps}, got {self.ppo.burn_in}")
        if self.num_envs is not None:
            _count("num_envs", self.num_envs)
            check_minibatches(self.ppo.num_minibatches, self.num_envs * self.num_steps)


def default_num_envs(device_type: str, env: str = "quadrotor") -> int:
    """The default number of environments ``env`` on a device of this type."""
    if is_gymnasium(env):
        return 16
    return 8192 if device_type == "cuda" else 1024


def _check_env_kwargs(env: str, kwargs: Any) -> None:
    plain = isinstance(kwargs, dict) and all(
        isinstance(name, str) and isinstance(x, (bool, int, float, str)) for name, x in kwargs.items()
    )
    if not plain:
        raise ValueError(f"env_kwargs: expected names with a number, a bool or a string each, got {kwargs!r}")
    if kwargs and env in ENVIRONMENTS:
        raise ValueError(f"env_kwargs: expected none for {env}, whose options are those of [task], got {kwargs}")
    for name in ("name", "id", "num_envs", "device", "seed", "vectorization_mode", "vector_kwargs", "wrappers"):
        if name in kwargs:
            raise ValueError(f"env_kwargs: expected arguments of the environment itself, got {name!r}")


def check_minibatches(num_minibatches: int, samples: int) -> None:
    """Raises ValueError where a rollout of ``samples`` = num_envs * num_steps has fewer samples than minibatches."""
    if num_minibatches > samples:
        raise ValueError(
            f"num_minibatches: expected at most num_envs * num_steps, {samples} samples, got {num_minibatches}"
        )


def _make_plain(config: Any) -> None:
    for f in fields(config):
        setattr(config, f.name, _plain(getattr(config, f.name)))


def _plain(x: Any) -> Any:
    """``x``, a value of a setting, as Python's own bool, int, float, str, tuple or list, which every file can hold.

    Taken too: NumPy's and torch's scalars, enums, paths.
    """
    if is_dataclass(x):
        changed = {f.name: _plain(getattr(x, f.name)) for f in fields(x)}
        return x if all(getattr(x, name) is part for name, part in changed.items()) else replace(x, **changed)
    if type(x) in (tuple, list):
        parts = type(x)(map(_plain, x))
        return x if all(a is b for a, b in zip(x, parts)) else parts
    if isinstance(x, enum.Enum):
        return _plain(x.value)
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    if hasattr(x, "dtype") and getattr(x, "ndim", None) == 0:
        x = x.item()
    return next((kind(x) for kind in (bool, int, float, str) if isinstance(x, kind)), x)


def _count(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {x!r}")


def _number(name: str, x: Any, what: str, fits: Callable[[float], bool]) -> None:
    number = isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)
    if not (number and fits(x)):
        raise ValueError(f"{name}: expected a number {what}, got {x!r}")
