"""A trained policy as a file that runs without pydrone: ONNX, TorchScript, safetensors with a description, C.

The file contains the deterministic policy: observation normaliser, actor, and what the environment makes of actions. It
maps ``obs`` [B, O] float32 to ``actions`` [B, A] float32 (discrete: int64 [B], or [B, D] of D choices each); a
recurrent one also takes and returns ``memory`` [B, S] float32, zeros at the start of an episode. The file computes in
float32: observations rounded for storage and bfloat16 products are for training only. docs/export.md says how to run
it.

A policy is described by its layers, :mod:`pydrone.ppo.exporting.layers`, and all formats are made from them. The C
header has no batches: one observation a call.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydrone._version import __version__
from pydrone.envs.contract import Contract
from pydrone.envs.record import Actions, Bounds, Record, bounds
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.exporting import FORMATS, NEEDS, ExportError, c_header, c_program, missing  # noqa: F401 (for users)
from pydrone.ppo.exporting.files import READERS, WRITERS, Runner
from pydrone.ppo.exporting.layers import CELLS, OPERATIONS, Layers, memory_size, run  # noqa: F401 (run, CELLS: for users)
from pydrone.ppo.policy.make import make_policy
from pydrone.ppo.training.average import deployed

# Version of the description's layout.
VERSION = "1"

# The largest difference from the policy's own actions, beyond float32's rounding.
TOLERANCE = 1e-5
# That of the C header, where the rounding is measured over some other orders of the policy's sums.
C_TOLERANCE, ORDERS = 1e-6, 8
# Steps over which a recurrent policy is compared.
STEPS = 5

Limits = tuple[float, float] | Actions | None


class Exported(NamedTuple):
    """What :func:`save` wrote."""

    path: Path
    num_obs: int
    num_actions: int
    memory: int
    """S of a recurrent policy, else 0."""
    checked_with: str
    """What ran the file; empty where nothing could, and then it is not checked."""
    num_inputs: int
    difference: float
    """Largest difference from the policy's own actions; with float16 weights, those of the policy rounded to them."""
    rounding: str = ""
    """What float16 weights change, in words."""


# ------------------------------------------------------------------------------------------------------------- layers


def describe(policy: nn.Module, limits: Limits = None) -> tuple[Layers, dict[str, Tensor]]:
    """The layers of the deterministic policy and their tensors.

    Args:
        policy: a :class:`pydrone.ppo.policy.actor_critic.ActorCritic`.
        limits: range that actions are clipped to, or what the environment makes of them; None: nothing.
    """
    actions, layers = _actions(limits), []
    tensors: dict[str, Tensor] = {}

    def add(operation: str, *arguments: float, **named: Tensor) -> None:
        names = [f"{name}_{len(layers)}" for name in named]
        tensors.update((name, x.detach().cpu().float().contiguous()) for name, x in zip(names, named.values()))
        layers.append([operation, *names, *arguments])

    def clip(limits: Bounds) -> None:
        low, high = (torch.tensor(bound) for bound in limits)
        if len({*zip(*limits)}) == 1 and (low.isfinite() & high.isfinite()).all():
            add("clip", limits[0][0], limits[1][0])
        elif low.isfinite().any() or high.isfinite().any():
            add("clip", low=low, high=high)  # infinity is no number in JSON

    normalizer = getattr(policy, "actor_normalizer", None)
    if normalizer is not None:
        add("normalize", shift=normalizer.shift, std=normalizer.std)
        add("clip", -float(policy.obs_clip), float(policy.obs_clip))
    if getattr(policy, "recurrent", False):
        rnn = policy.actor_rnn
        weights = {name.removesuffix("_l0"): x for name, x in rnn.named_parameters()}
        add("gru" if isinstance(rnn, nn.GRU) else "lstm", **weights)
    for layer in policy.actor:
        if isinstance(layer, nn.Linear):
            add("linear", weight=layer.weight, bias=layer.bias)
            continue
        activation = type(layer).__name__.lstrip("_").lower()
        if activation not in OPERATIONS:
            raise ExportError(f"policy: expected linear layers and activations in the actor, got {layer}")
        add(activation)
    if _discrete(policy):
        add("argmax", *(policy.choices or ()))
        if actions.start:
            add("shift", actions.start)
        return layers, tensors
    if actions.limits is not None:
        clip(actions.limits)
    if actions.onto is not None:
        (low, high), (first, last) = (torch.tensor(x, dtype=torch.float64) for x in (actions.limits, actions.onto))
        slope = (last - first) / (high - low)
        slope, bias = torch.broadcast_tensors(slope, first - low * slope)
        size = policy.actor[-1].out_features
        add("linear", weight=torch.diag(slope.expand(size)), bias=bias.expand(size))
        clip(actions.onto)
    if actions.integers:
        add("trunc")
    return layers, tensors


def _actions(limits: Limits) -> Actions:
    return limits if isinstance(limits, Actions) else Actions(None if limits is None else bounds(limits, "limits"))


def _discrete(policy: nn.Module) -> bool:
    # Discrete actions have no standard deviation.
    return not hasattr(policy, "std_param")


# -------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def save(
    policy: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    limits: Limits = None,
    metadata: Mapping[str, object] | None = None,
    *,
    contract: Contract | None = None,
    weights: str = "float32",
    prefix: str = "pydrone",
) -> Exported:
    """Writes ``policy`` to ``path``, after a check against its own actions, completely or not at all.

    Args:
        policy: a :class:`pydrone.ppo.policy.actor_critic.ActorCritic`.
        path: replaced where it exists.
        format: one of FORMATS.
        limits: range that the environment clips actions to, or all that it makes of them; None: nothing.
        metadata: stored in the file, as strings.
        contract: what observations and actions are, stored in the file.
        weights: what a C header stores matrices as, float32 or float16; all else is float32.
        prefix: what the names in a C header begin with.

    Raises:
        ValueError: ``format``, ``limits``, ``weights`` or ``prefix``. ImportError: what the format needs is not
            installed.
        ExportError: the file's actions are not the policy's. OSError: it cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(limits, (Actions, NoneType)) and not (len(limits) == 2 and limits[0] < limits[1]):
        raise ValueError(f"limits: expected a lower and a higher number, got {limits!r}")
    if weights not in c_header.WEIGHTS or (format != "c" and weights != "float32"):
        known = ", ".join(c_header.WEIGHTS if format == "c" else ("float32",))
        raise ValueError(f"weights: expected one of {known} for the format {format}, got {weights!r}")
    c_header.check_prefix(prefix)
    policy = original = _plain(policy)
    broken = [name for name, x in policy.actor.named_parameters() if not x.isfinite().all()]
    if broken:
        raise ExportError(f"policy: expected finite weights, got actor.{broken[0]} with others")
    if weights == "float16":
        policy = _halved(policy)
    layers, tensors = describe(policy, limits)
    (num_obs, num_actions), memory = sizes(policy), memory_size(layers, tensors)
    described = {
        "format": f"pydrone-policy-{VERSION}",
        "pydrone": __version__,
        "num_obs": num_obs,
        "num_actions": num_actions,
        "memory": memory,
        "layers": json.dumps(layers),
        **(metadata or {}),
        **({} if contract is None else {"contract": contract.text}),
    }
    described = {name: str(value) for name, value in described.items()}
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(f"{path}: expected a file's name in a folder that is there")
    # Checked under another name first, with the same suffix, which readers may depend on.
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        if format == "c":
            contract = contract or Contract("What observations and actions are, nobody said.", None)
            rounding = "" if policy is original else _rounding(original, policy, _actions(limits), num_obs, memory)
            vectors = _vectors(policy, _actions(limits), num_obs, memory)
            head = c_header.Header(prefix, weights, contract.text, (rounding,), vectors, contract.dt)
            beside.write_text(c_header.source(layers, tensors, described, head), encoding="ascii")
            opened = c_program.reader(beside, prefix, _discrete(policy), memory)
        else:
            rounding = ""
            WRITERS[format](beside, layers, tensors, (num_obs, memory), described)
            opened = READERS[format](beside)
        checked_with, num_inputs, difference = "", 0, math.nan
        if opened is not None:
            runner, checked_with = opened
            tolerance = C_TOLERANCE if format == "c" else TOLERANCE
            num_inputs, difference = _check(policy, _actions(limits), runner, num_obs, memory, path, tolerance)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return Exported(path, num_obs, num_actions, memory, checked_with, num_inputs, difference, rounding)


def sizes(policy: nn.Module) -> tuple[int, int]:
    """How many observations and actions (discrete: choices) a policy has."""
    first = policy.actor_rnn.weight_ih_l0 if getattr(policy, "recurrent", False) else policy.actor[0].weight
    return first.shape[1], policy.actor[-1].out_features


def _plain(policy: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 throughout."""
    policy = copy.deepcopy(policy).cpu().float().eval()
    policy.matmul, policy.obs_dtype = "float32", torch.float32
    return policy


def _halved(policy: nn.Module) -> nn.Module:
    """A copy whose actor's matrices are rounded to float16; biases and the normaliser are not."""
    policy = copy.deepcopy(policy)
    for name, x in policy.named_parameters():
        if name.startswith("actor") and x.dim() == 2:
            x.copy_(x.half())
            if not x.isfinite().all():
                raise ExportError(f"weights: expected float32, since {name} has numbers beyond float16, got float16")
    return policy


def _rounding(policy: nn.Module, halved: nn.Module, actions: Actions, num_obs: int, memory: int) -> str:
    """How far the actions of a policy with rounded weights are from its own, on the usual inputs of the check."""
    obs = inputs(num_obs)[:64]  # random ones up to three times the usual size
    state = torch.zeros(len(obs), memory) if memory else None
    own, got = (_own(x, obs, state)[0] for x in (policy, halved))
    what = f"The weights are rounded to float16: on {len(obs)} random observations"
    if _discrete(policy):
        return f"{what} {int((own.argmax(-1) != got.argmax(-1)).sum())} actions differ from the unrounded policy's."
    difference = (actions.applied(own) - actions.applied(got)).abs().max().item()
    return f"{what} actions differ by up to {difference:.2g} from the unrounded policy's."


# -------------------------------------------------------------------------------------------------------------- check


def _vectors(policy: nn.Module, actions: Actions, num_obs: int, memory: int) -> c_header.Vectors:
    """Observations of a few calls in a row, and what the policy answers, computed in double precision.

    Of many draws that one whose answers say most: actions that bounds do not decide, and choices that are clear.
    """
    exact, draw = copy.deepcopy(policy).double(), torch.Generator().manual_seed(1)
    obs = 0.5 * torch.randn(STEPS, 256, num_obs, generator=draw)
    state, outputs = torch.zeros(256, memory, dtype=torch.float64) if memory else None, []
    for step in obs:
        output, state = _own(exact, step.double(), state)
        outputs.append(output)
    answers = torch.stack(outputs)  # [STEPS, 256, A]
    if _discrete(policy):
        chosen, top = answers.argmax(-1), answers.topk(min(2, answers.shape[-1]), -1).values
        clear = (top[..., 0] - top[..., -1]).amin(0) > 1e-3
        kinds = torch.tensor([len(set(draw.tolist())) for draw in chosen.t()])
        best = int((kinds * clear).argmax())
        return c_header.Vectors(obs[:, best], chosen[:, best] + actions.start)
    given = torch.stack([actions.applied(x) for x in answers])
    free = torch.ones_like(answers, dtype=torch.bool)
    if actions.limits is not None:
        low, high = (answers.new_tensor(bound) for bound in actions.limits)
        free = (answers > low) & (answers < high)
    score = free.double().mean((0, 2))
    if actions.integers:
        # Not where rounding decides about a fraction that is dropped.
        whole = torch.stack([actions._replace(integers=False).applied(x) for x in answers])
        score = score - ((whole - whole.round()).abs() < 1e-3).double().mean((0, 2))
    best = int(score.argmax())
    return c_header.Vectors(obs[:, best], given[:, best].float())


def inputs(width: int) -> Tensor:
    """Observations [B, width] for the comparison: random ones of every magnitude, and edge cases."""
    draw = torch.Generator().manual_seed(0)
    random = [scale * torch.randn(16, width, generator=draw) for scale in (0.01, 0.3, 1.0, 3.0, 30.0)]
    signs = torch.tensor([1.0, -1.0]).repeat(width)[:width]
    ones = torch.ones(width)
    edges = [value * row for value in (1.0, -1.0, 10.0, 1e4, 1e-4, 1e-30, 1e-42) for row in (ones, signs)]
    return torch.cat([*random, torch.zeros(1, width), torch.stack(edges), torch.eye(width), -torch.eye(width)])


def _check(
    policy: nn.Module, actions: Actions, runner: Runner, num_obs: int, memory: int, path: Path, tolerance: float
) -> tuple[int, float]:
    """Compares with the policy's own actions; returns how many inputs, and the largest difference."""
    obs = inputs(num_obs)
    # All at once, and some in batches of other sizes.
    batches, largest, count = [obs, obs[:1], obs[16:23]], 0.0, 0
    exact = copy.deepcopy(policy).double()
    others = [_reordered(policy, seed) for seed in range(ORDERS if tolerance < TOLERANCE else 0)]
    for batch in batches:
        state = torch.zeros(len(batch), memory) if memory else None
        for _ in range(STEPS if memory else 1):
            own, own_state = _own(policy, batch, state)
            # The policy's own float32 rounding is not the file's fault.
            precise, precise_state = _own(exact, batch.double(), None if state is None else state.double())
            outputs, states = zip((own, own_state), *(_own(x, batch[:, order], state) for x, order in others))
            got, got_state = runner(batch, state)
            difference = _difference(policy, actions, outputs, precise, got, path, tolerance)
            if state is not None:
                _near("memory", path, states, precise_state, got_state, tolerance)
            largest, count, state = max(largest, difference), count + len(batch), own_state
            batch = batch.roll(1, 0)
    return count, largest


def _own(policy: nn.Module, obs: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The policy's own outputs, before they are clipped."""
    return (policy.mean(obs), None) if memory is None else policy(obs, memory)


def _reordered(policy: nn.Module, seed: int) -> tuple[nn.Module, Tensor]:
    """The same function with its inputs and hidden units in another order, and that order of the observations."""
    draw, policy = torch.Generator().manual_seed(seed), copy.deepcopy(policy)

    def shuffled(x: Tensor, dim: int, order: Tensor) -> None:
        x.copy_(x.index_select(dim, order))

    linear = [layer for layer in policy.actor if isinstance(layer, nn.Linear)]
    first = policy.actor_rnn.weight_ih_l0 if getattr(policy, "recurrent", False) else linear[0].weight
    given = torch.randperm(first.shape[1], generator=draw)
    shuffled(first, 1, given)
    if policy.actor_normalizer is not None:
        shuffled(policy.actor_normalizer.shift, 0, given)
        shuffled(policy.actor_normalizer.std, 0, given)
    for layer, following in itertools.pairwise(linear):
        order = torch.randperm(layer.out_features, generator=draw)
        for x, dim in ((layer.weight, 0), (layer.bias, 0), (following.weight, 1)):
            shuffled(x, dim, order)
    return policy, given


def _difference(
    policy: nn.Module,
    actions: Actions,
    outputs: Sequence[Tensor],
    precise: Tensor,
    got: Tensor,
    path: Path,
    tolerance: float,
) -> float:
    """``outputs``: the policy's own, and with its sums in other orders."""
    own = outputs[0]
    if not _discrete(policy):
        return _near("actions", path, [*map(actions.applied, outputs)], actions.applied(precise), got, tolerance)
    shape = (*own.shape[:1], *((len(policy.choices),) if policy.choices else ()))
    if got.dtype != torch.int64 or got.shape != shape:
        raise ExportError(
            f"{path}: not written: expected actions int64 {list(shape)}, got {got.dtype} {list(got.shape)}"
        )
    # Each chosen action must be the likeliest one, up to rounding.
    differences = []
    for logs, index in zip(
        precise.split(policy.choices or own.shape[1], 1), (got - actions.start).reshape(len(own), -1).T
    ):
        if not 0 <= index.min() <= index.max() < logs.shape[1]:
            raise ExportError(
                f"{path}: not written: expected actions from {actions.start}, got {got.min()} to {got.max()}"
            )
        chosen, likeliest = logs.gather(1, index.unsqueeze(1)).squeeze(1), logs.amax(1)
        near = _near("likelihood of the actions", path, [likeliest], likeliest, chosen.to(likeliest.dtype), TOLERANCE)
        differences.append(near)
    return max(differences)


def _near(
    what: str, path: Path, outputs: Sequence[Tensor], precise: Tensor, got: Tensor | None, tolerance: float
) -> float:
    own = outputs[0]
    if got is None or got.shape != own.shape:
        shape = None if got is None else list(got.shape)
        raise ExportError(f"{path}: not written: {what}: expected shape {list(own.shape)}, got {shape}")
    precise = precise.double()
    rounding = torch.stack([(x - precise).abs() for x in outputs]).amax(0).amax(-1, keepdim=True)
    scale = precise.abs().amax(-1, keepdim=True).clamp_min(1.0)
    difference = (got - own).abs().double()
    if not bool((difference <= tolerance * scale + 8 * rounding).all()):
        worst = difference.nan_to_num(math.inf).max().item()
        raise ExportError(f"{path}: not written: its {what} differ from the policy's own by up to {worst:.3g}")
    return difference.max().item()


# --------------------------------------------------------------------------------------------------------- checkpoints


def policy_of(state: Mapping[str, Any]) -> nn.Module:
    """The policy in a checkpoint, with the averaged weights where there are any; needs no environment.

    ``state`` as of :meth:`pydrone.ppo.trainer.Trainer.state_dict`.

    Raises ValueError where the checkpoint holds no such policy.
    """
    try:
        weights, settings = deployed(state), state["config"]["ppo"]
        # Each network sees its groups concatenated, whatever they were.
        config = PPOConfig(**{**settings, "actor_obs": (), "critic_obs": ()})
        obs = {group: _width(weights, network) for group, network in (("policy", "actor"), ("critic", "critic"))}
        num_actions = weights[f"actor.{2 * len(config.hidden_dims)}.bias"].shape[0]
        continuous = "std_param" in weights
        choices = weights["choice_counts"].tolist() if "choice_counts" in weights else num_actions
        policy = make_policy(obs, num_actions if continuous else ((), torch.int64), config, choices)
        policy.load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        message = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"expected the weights of a policy, got others: {type(error).__name__} {message}") from error
    return policy


def _width(weights: Mapping[str, Tensor], network: str) -> int:
    first = weights.get(f"{network}_rnn.weight_ih_l0")
    return (weights[f"{network}.0.weight"] if first is None else first).shape[1]


def actions_of(state: Mapping[str, Any], policy: nn.Module) -> Actions:
    """What the environment that a checkpoint was trained in makes of the actions of its ``policy``.

    Raises ValueError where that is unknown: a checkpoint of before runs knew their environment, whose policy does not
    fit the one that it names.
    """
    record = Record.read(state)
    if record.actions is not None:
        return record.actions
    limits, found = action_limits(record.name), _class_of(record.name)
    trained = policy.obs["policy"], None if _discrete(policy) else policy.actor[-1].out_features
    sizes = tuple(getattr(found, name, None) for name in ("obs", "actions"))
    if all(isinstance(x, int) for x in sizes) and sizes != trained:
        raise ValueError(
            f"trained in another environment than {record.name}, which has {sizes[0]} observations and {sizes[1]} "
            "actions, and the checkpoint does not say in which: give the range that it clips actions to by --clip"
        )
    return Actions(said=False) if limits is None else Actions(bounds(limits, "action_limits"))


def action_limits(env: Any) -> tuple[float, float] | None:
    """The range that the environment named ``env`` clips actions to, its class's ``action_limits``. None: unknown."""
    return getattr(_class_of(env), "action_limits", None)


def _class_of(env: Any) -> Any:
    """What builds the environment named ``env``; None: unknown."""
    from importlib import import_module
    from importlib.metadata import entry_points

    from pydrone.envs import ENVIRONMENTS

    if env in ENVIRONMENTS:
        module, name = ENVIRONMENTS[env].split(":")
        return getattr(import_module(module), name)
    points = list(entry_points(group="pydrone.envs", name=str(env)))
    try:
        return points[0].load() if points else None
    except (ImportError, AttributeError):
        return None
