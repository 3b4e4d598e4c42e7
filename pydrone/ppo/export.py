"""A trained policy as a file that runs without pydrone: ONNX, TorchScript, or safetensors with a description.

The file contains the deterministic policy: observation normaliser, actor, and what the environment makes of actions. It
maps ``obs`` [B, O] float32 to ``actions`` [B, A] float32 (discrete: int64 [B], or [B, D] of D choices each); a
recurrent one also takes and returns ``memory`` [B, S] float32, zeros at the start of an episode. The file computes in
float32: observations rounded for storage and bfloat16 products are for training only. docs/export.md says how to run
it.

A policy is described by its layers: a list of [operation, argument, ...], arguments the names of tensors or numbers.
:func:`run` runs them, and all formats are made from it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pydrone._version import __version__
from pydrone.envs.record import Actions, Bounds, Record, bounds
from pydrone.ops.packages import needed
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy.make import make_policy

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "safetensors": ".safetensors"}
# The packages that write and check a format.
NEEDS = {"onnx": ("onnx", "onnxscript"), "torchscript": (), "safetensors": ("safetensors",)}

# Version of the description's layout.
VERSION = "1"

# The largest difference from the policy's own actions, beyond float32's rounding.
TOLERANCE = 1e-5
# Steps over which a recurrent policy is compared.
STEPS = 5

Layers = list[list[Any]]
Limits = tuple[float, float] | Actions | None
Runner = Callable[[Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


class ExportError(RuntimeError):
    """The policy could not be exported; nothing was written."""


class Exported(NamedTuple):
    """What :func:`save` wrote."""

    path: Path
    num_obs: int
    num_actions: int
    memory: int
    """S of a recurrent policy, else 0."""
    checked_with: str
    num_inputs: int
    difference: float
    """Largest difference from the policy's own actions."""


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


def _gru(x: Tensor, memory: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    r, z, n = nn.functional.linear(x, w_ih, b_ih).chunk(3, -1)
    hr, hz, hn = nn.functional.linear(memory, w_hh, b_hh).chunk(3, -1)
    z = torch.sigmoid(z + hz)
    memory = (1 - z) * torch.tanh(n + torch.sigmoid(r + hr) * hn) + z * memory
    return memory, memory


def _lstm(x: Tensor, memory: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> tuple[Tensor, Tensor]:
    # The memory is the output and the cell, side by side.
    output, cell = memory.chunk(2, -1)
    i, f, g, o = (nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(output, w_hh, b_hh)).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    output = torch.sigmoid(o) * torch.tanh(cell)
    return output, torch.cat((output, cell), -1)


def _argmax(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[B], or [B, D] of parts of these ``sizes``."""
    return torch.stack([part.argmax(-1) for part in x.split(sizes, -1)], -1) if sizes else x.argmax(-1)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "normalize": lambda x, shift, std: (x - shift) / std,
    "linear": nn.functional.linear,
    "tanh": torch.tanh,
    "elu": nn.functional.elu,
    "relu": torch.relu,
    "silu": nn.functional.silu,
    "clip": torch.clamp,
    "trunc": torch.trunc,
    "argmax": lambda x, *sizes: _argmax(x, sizes),
    "shift": lambda x, start: x + start,
}
CELLS = {"gru": _gru, "lstm": _lstm}


def run(
    layers: Layers, tensors: Mapping[str, Tensor], obs: Tensor, memory: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Actions for observations [B, O] and a recurrent policy's next memory [B, S]."""
    x = obs
    for operation, *arguments in layers:
        given = [tensors[argument] if isinstance(argument, str) else argument for argument in arguments]
        if operation in CELLS:
            x, memory = CELLS[operation](x, memory, *given)
        else:
            x = OPERATIONS[operation](x, *given)
    return x, memory


def memory_size(layers: Layers, tensors: Mapping[str, Tensor]) -> int:
    """S, the width of a recurrent policy's memory; 0 where there is none."""
    for operation, *arguments in layers:
        if operation in CELLS:
            return tensors[arguments[1]].shape[1] * (2 if operation == "lstm" else 1)
    return 0


class _Network(nn.Module):
    """The layers as a module, to be traced."""

    def __init__(self, layers: Layers, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        for name, x in tensors.items():
            self.register_buffer(name, x)

    def forward(self, obs: Tensor, memory: Tensor | None = None) -> Any:
        actions, memory = run(self.layers, dict(self.named_buffers()), obs, memory)
        return actions if memory is None else (actions, memory)


# -------------------------------------------------------------------------------------------------------------- files


@torch.no_grad()
def save(
    policy: nn.Module,
    path: str | os.PathLike[str],
    format: str,
    limits: Limits = None,
    metadata: Mapping[str, object] | None = None,
) -> Exported:
    """Writes ``policy`` to ``path``, after a check against its own actions, completely or not at all.

    Args:
        policy: a :class:`pydrone.ppo.policy.actor_critic.ActorCritic`.
        path: replaced where it exists.
        format: one of FORMATS.
        limits: range that the environment clips actions to, or all that it makes of them; None: nothing.
        metadata: stored in the file, as strings.

    Raises:
        ValueError: ``format`` or ``limits``. ImportError: what the format needs is not installed.
        ExportError: the file's actions are not the policy's. OSError: it cannot be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if not isinstance(limits, (Actions, NoneType)) and not (len(limits) == 2 and limits[0] < limits[1]):
        raise ValueError(f"limits: expected a lower and a higher number, got {limits!r}")
    policy = _plain(policy)
    layers, tensors = describe(policy, limits)
    broken = [name for name, x in policy.actor.named_parameters() if not x.isfinite().all()]
    if broken:
        raise ExportError(f"policy: expected finite weights, got actor.{broken[0]} with others")
    linear = [tensors[layer[1]] for layer in layers if layer[0] in ("linear", *CELLS)]
    num_obs, num_actions, memory = linear[0].shape[1], linear[-1].shape[0], memory_size(layers, tensors)
    described = {
        "format": f"pydrone-policy-{VERSION}",
        "pydrone": __version__,
        "num_obs": num_obs,
        "num_actions": num_actions,
        "memory": memory,
        "layers": json.dumps(layers),
        **(metadata or {}),
    }
    described = {name: str(value) for name, value in described.items()}
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise OSError(f"{path}: expected a file's name in a folder that is there")
    # Checked under another name first, with the same suffix, which readers may depend on.
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        _WRITERS[format](beside, layers, tensors, (num_obs, memory), described)
        runner, checked_with = _READERS[format](beside)
        num_inputs, difference = _check(policy, _actions(limits), runner, num_obs, memory, path)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return Exported(path, num_obs, num_actions, memory, checked_with, num_inputs, difference)


def _plain(policy: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 throughout."""
    policy = copy.deepcopy(policy).cpu().float().eval()
    policy.matmul, policy.obs_dtype = "float32", torch.float32
    return policy


def _example(sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    num_obs, memory = sizes
    # Two rows: the exporter would take a size of one for a constant.
    return (torch.zeros(2, num_obs), torch.zeros(2, memory)) if memory else (torch.zeros(2, num_obs),)


def _write_torchscript(path: Path, layers: Layers, tensors: Any, sizes: tuple[int, int], metadata: dict) -> None:
    with warnings.catch_warnings():
        # TorchScript is deprecated, but C++ programs still load it.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_Network(layers, tensors).eval(), _example(sizes))
        torch.jit.save(torch.jit.freeze(traced), str(path), _extra_files={"pydrone.json": json.dumps(metadata)})


def _read_torchscript(path: Path) -> tuple[Runner, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(str(path))
    return lambda obs, memory: _pair(loaded(obs) if memory is None else loaded(obs, memory)), "TorchScript"


def _write_onnx(path: Path, layers: Layers, tensors: Any, sizes: tuple[int, int], metadata: dict) -> None:
    with needed("onnx", "the export", '"pydrone-rl[export]"'):
        import onnx

    names = ["obs", "memory"] if sizes[1] else ["obs"]
    outputs = ["actions", "next_memory"] if sizes[1] else ["actions"]
    batch = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Network(layers, tensors).eval(),
            _example(sizes),
            dynamo=True,
            input_names=names,
            output_names=outputs,
            dynamic_shapes=dict.fromkeys(names, batch),
            verbose=False,
        )
    model = program.model_proto
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Any:
    """Silences the exporter's notes on packages that a policy does not need."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _read_onnx(path: Path) -> tuple[Runner, str]:
    """Runs it by onnxruntime where installed, else by onnx's own evaluator."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session, name = ReferenceEvaluator(str(path)), "onnx's reference evaluator"
    else:
        # From bytes: the file is to be renamed.
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        name = f"onnxruntime {onnxruntime.__version__}"

    def runner(obs: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        given = {"obs": obs.numpy()} | ({} if memory is None else {"memory": memory.numpy()})
        return _pair([torch.as_tensor(x) for x in session.run(None, given)])

    return runner, name


def _write_safetensors(path: Path, layers: Layers, tensors: Any, sizes: tuple[int, int], metadata: dict) -> None:
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), metadata))


def _read_safetensors(path: Path) -> tuple[Runner, str]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        layers = json.loads(file.metadata()["layers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return lambda obs, memory: run(layers, tensors, obs, memory), "safetensors"


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "safetensors": _write_safetensors}
_READERS = {"onnx": _read_onnx, "torchscript": _read_torchscript, "safetensors": _read_safetensors}


def _pair(outputs: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(outputs, Tensor):
        return outputs, None
    return (outputs[0], outputs[1]) if len(outputs) == 2 else (outputs[0], None)


# -------------------------------------------------------------------------------------------------------------- check


def inputs(width: int) -> Tensor:
    """Observations [B, width] for the comparison: random ones of every magnitude, and edge cases."""
    draw = torch.Generator().manual_seed(0)
    random = [scale * torch.randn(16, width, generator=draw) for scale in (0.01, 0.3, 1.0, 3.0, 30.0)]
    signs = torch.tensor([1.0, -1.0]).repeat(width)[:width]
    ones = torch.ones(width)
    edges = [value * row for value in (1.0, -1.0, 10.0, 1e4, 1e-4, 1e-30, 1e-42) for row in (ones, signs)]
    return torch.cat([*random, torch.zeros(1, width), torch.stack(edges), torch.eye(width), -torch.eye(width)])


def _check(
    policy: nn.Module, actions: Actions, runner: Runner, num_obs: int, memory: int, path: Path
) -> tuple[int, float]:
    """Compares with the policy's own actions; returns how many inputs, and the largest difference."""
    obs = inputs(num_obs)
    # All at once, and some in batches of other sizes.
    batches, largest, count = [obs, obs[:1], obs[16:23]], 0.0, 0
    exact = copy.deepcopy(policy).double()
    for batch in batches:
        state = torch.zeros(len(batch), memory) if memory else None
        for _ in range(STEPS if memory else 1):
            own, own_state = _own(policy, batch, state)
            # The policy's own float32 rounding is not the file's fault.
            precise, precise_state = _own(exact, batch.double(), None if state is None else state.double())
            got, got_state = runner(batch, state)
            difference = _difference(policy, actions, own, precise, got, path)
            if state is not None:
                _near("memory", path, own_state, precise_state, got_state)
            largest, count, state = max(largest, difference), count + len(batch), own_state
            batch = batch.roll(1, 0)
    return count, largest


def _own(policy: nn.Module, obs: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The policy's own outputs, before they are clipped."""
    return (policy.mean(obs), None) if memory is None else policy(obs, memory)


def _difference(policy: nn.Module, actions: Actions, own: Tensor, precise: Tensor, got: Tensor, path: Path) -> float:
    if not _discrete(policy):
        return _near("actions", path, actions.applied(own), actions.applied(precise), got)
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
        differences.append(_near("likelihood of the actions", path, likeliest, likeliest, chosen))
    return max(differences)


def _near(what: str, path: Path, own: Tensor, precise: Tensor, got: Tensor | None) -> float:
    if got is None or got.shape != own.shape:
        shape = None if got is None else list(got.shape)
        raise ExportError(f"{path}: not written: {what}: expected shape {list(own.shape)}, got {shape}")
    precise = precise.double()
    rounding = (own - precise).abs().amax(-1, keepdim=True)
    scale = precise.abs().amax(-1, keepdim=True).clamp_min(1.0)
    difference = (got - own).abs().double()
    if not bool((difference <= TOLERANCE * scale + 8 * rounding).all()):
        worst = difference.nan_to_num(math.inf).max().item()
        raise ExportError(f"{path}: not written: its {what} differ from the policy's own by up to {worst:.3g}")
    return difference.max().item()


# --------------------------------------------------------------------------------------------------------- checkpoints


def policy_of(state: Mapping[str, Any]) -> nn.Module:
    """The policy in a checkpoint, see :meth:`pydrone.ppo.trainer.Trainer.state_dict`; needs no environment.

    Raises ValueError where the checkpoint holds no such policy.
    """
    try:
        weights, settings = state["policy"], state["config"]["ppo"]
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


def missing(format: str) -> Sequence[str]:
    """The packages that ``format`` needs and that are missing."""
    from importlib.util import find_spec

    return [name for name in NEEDS[format] if find_spec(name) is None]
