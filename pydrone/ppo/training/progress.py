"""Resuming a training: what a checkpoint holds besides the learnt part, and how a training takes both over.

Each rank has its own progress. All are in the checkpoint that the first rank writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from pydrone.envs.record import Record
from pydrone.ppo.config import ON_RESUME, TrainConfig
from pydrone.ppo.training.iteration import Iteration


def changes(before: Mapping[str, Any], config: TrainConfig, path: Any) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from ``before``, those of the checkpoint ``path``: by name, the old and the new value.

    Those of the process are left out, see ``ON_RESUME``. Raises ValueError for one that a resumed training keeps.
    """
    found = {}
    for group, name, old, new in _differing(before, dataclasses.asdict(config)):
        if name in ON_RESUME["kept"]:
            raise ValueError(
                f"{name}: expected {old!r}, that of the checkpoint {path}, got {new!r}: a resumed training keeps it"
            )
        if name in ON_RESUME["new"] or group in ON_RESUME["new"]:
            found[name] = old, new
    return found


def _differing(before: Any, after: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str, Any, Any]]:
    """Group, name, old and new value; settings that ``before`` does not know are left out."""
    for name, new in after.items():
        if not isinstance(before, Mapping) or name not in before:
            continue
        old = tuple(before[name]) if isinstance(before[name], list) else before[name]
        if isinstance(new, Mapping) and name != "env_kwargs":  # whose names are no settings
            yield from _differing(old, new, name)
        elif old != new:
            yield group, name, old, new


def progress_of(training: Iteration) -> dict[str, Any]:
    """What this rank's next iteration depends on besides :meth:`Iteration.learnt`; not copied."""
    buffer, figures, scaler, policy = training.buffer, training.figures, training.reward_scaler, training.policy
    counters = buffer.state_dict()
    saved = training.observations is not None and hasattr(training.env, "state_dict")
    generators = {"cpu": torch.get_rng_state()}
    if training.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(training.device)
    first = training.ranks.rank == 0  # whose discounted rewards and memory are in Iteration.learnt()
    return {
        "generators": generators,
        "rollouts": counters["discarded"] // buffer.num_steps,  # the buffer is empty between iterations
        "shuffle_seed": counters["seed"],
        "env": training.env.state_dict() if saved else None,
        "obs": training.observations if saved else None,
        "running_episodes": figures.running_episodes.state_dict(),
        "episode_figures": dict(figures.last_episodes),
        "episode_lengths": list(figures.episode_lengths),
        **({} if scaler is None or first else {"discounted": scaler.running}),
        **({"memory": policy.memory} if policy.recurrent and not first else {}),
    }


def restore(training: Iteration, state: dict[str, Any]) -> list[str]:
    """Takes over a checkpoint, see :meth:`pydrone.ppo.trainer.Trainer.state_dict`.

    Returns lines that say what could not be restored, such as an environment without a state, and which settings are
    others. Raises ValueError where networks, optimiser or progress are those of another training.
    """
    changed = changes(state["config"], training.recorded, training.config.resume)
    changed |= Record.read(state).changed(training.environment)
    _restore_learnt(training, state)
    if "learning_rate" in changed:
        # The adaptive schedule begins anew from the given rate.
        training.learner.learning_rate.fill_(training.config.ppo.learning_rate)
    said, lost = [], _restore_progress(training, state)
    if lost is not None:
        said.append(f"Resumed at iteration {training.iteration}; {lost}.")
    if changed:
        said.append(in_words(changed))
    return said


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """A line that names what differs from the checkpoint, with the old and the new values."""
    return f"Changed since the checkpoint: {'; '.join(f'{k} {old}, now {new}' for k, (old, new) in changed.items())}."


def _restore_learnt(training: Iteration, state: dict[str, Any]) -> None:
    """Takes over what :meth:`Iteration.learnt` returned."""
    path = training.config.resume
    own = {name: tuple(x.shape) for name, x in training.policy.state_dict().items()}
    try:
        theirs = {name: tuple(x.shape) for name, x in state["policy"].items()}
    except AttributeError:
        raise ValueError(f"{path}: expected the weights of a policy, got something else") from None
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            raise ValueError(
                f"{path}: {name}: expected shape {own.get(name)} for this environment, got {theirs.get(name)}"
            )
    training.policy.load_state_dict(state["policy"])
    try:
        training.learner.load_state_dict(state["learner"])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected the state of Adam for these networks, got something else") from error
    if training.average is not None and "average" in state:
        try:
            training.average.load_state_dict(state["average"])
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: expected averages of these weights, got something else") from error
    if training.reward_scaler is not None and "rewards" in state:
        training.reward_scaler.restore(state["rewards"])
    if training.policy.recurrent:
        # Needed where the environment continues too; where it is reset, so is the memory.
        training.policy.memory = state.get("memory")


def _restore_progress(training: Iteration, state: dict[str, Any]) -> str | None:
    """Takes over what :func:`progress_of` returned. Returns in words what it could not, or None."""
    progress, before = state.get("progress"), state["config"]
    buffer, figures, ranks = training.buffer, training.figures, training.ranks
    if progress is None:
        return (
            "its checkpoint was saved after a failure, or without the environment's state: all episodes begin anew, "
            "with other random numbers"
        )
    try:
        figures.last_episodes |= progress["episode_figures"]
        figures.episode_lengths.extend(progress["episode_lengths"])
        if before["seed"] != training.config.seed:
            return f"its seed was {before['seed']}: all episodes begin anew, with other random numbers"
        each = [progress, *state.get("others", [])]
        if len(each) != ranks.world_size:
            return (
                f"its processes were {len(each)}, these are {ranks.world_size}: all episodes begin anew, "
                "with other random numbers"
            )
        progress = each[ranks.rank]
        if ranks.rank and training.reward_scaler is not None and "discounted" in progress:
            training.reward_scaler.running.copy_(progress["discounted"])
        if ranks.rank and training.policy.recurrent:
            training.policy.memory = progress["memory"]
        steps = progress["rollouts"] * buffer.num_steps
        counters = {"appended": steps, "discarded": steps, "seed": progress["shuffle_seed"]}
        buffer.load_state_dict({**buffer.state_dict(), **counters})
        torch.set_rng_state(progress["generators"]["cpu"].cpu())
        if training.device.type == "cuda" and "cuda" in progress["generators"]:
            torch.cuda.set_rng_state(progress["generators"]["cuda"].cpu(), training.device)
        if progress["env"] is None or not hasattr(training.env, "load_state_dict"):
            told = "cannot restore its simulator: all episodes begin anew, with other targets and random numbers"
            return f"{before['env']} {told}"
        try:
            training.env.load_state_dict(progress["env"])
        except (RuntimeError, ValueError) as error:
            return f"all episodes begin anew, as this environment is not the checkpoint's: {error}"
        figures.running_episodes.load_state_dict(progress["running_episodes"])
        training.observations = progress["obs"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        path = training.config.resume
        raise ValueError(f"{path}: expected the progress of a training, got something else: {error}") from error
    return None
