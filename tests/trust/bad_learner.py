"""The fused learner's functions and operations, with wrong values for their arguments; see bad_input.py."""

from __future__ import annotations

import copy
import random

import torch
from bad_values import BIG, INF, NAN, Bad, Subject, bad_tensor, not_tensors, other_layouts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pydrone.ppo
from pydrone import RolloutBuffer
from pydrone.ops.schema import packed_size
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.learner import fused
from pydrone.ppo.learner.acting import FusedActing
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.policy.make import make_policy


def networks(rng: random.Random, inputs: int, actions: int) -> tuple[nn.Module, nn.Module]:
    def network(outputs: int) -> nn.Module:
        width = rng.randint(1, 40)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))

    return network(actions), network(1)


def wrong_networks(network: nn.Module) -> list[object]:
    first, last = network[0], network[2]
    made: list[object] = [None, 3, "x", [network], nn.Sequential(), nn.ReLU(), nn.Conv1d(1, 1, 1)]
    made += [nn.Sequential(first, nn.GELU(), last), nn.Sequential(first, nn.Tanh()), nn.Sequential(first, last)]
    made += [nn.Sequential(first, nn.ELU(0.5), last), nn.Sequential(nn.LazyLinear(3), nn.Tanh(), last)]
    made += [nn.Sequential(first, nn.Tanh(), nn.Linear(last.in_features, last.out_features + 1))]
    made += [nn.Sequential(nn.Linear(first.in_features + 1, first.out_features), nn.Tanh(), last)]
    made += [nn.Sequential(first, nn.Tanh(), nn.Linear(last.in_features + 1, last.out_features))]
    made += [nn.Sequential(first, nn.Tanh(), nn.Linear(last.in_features, last.out_features, bias=False))]
    return [*made, copy.deepcopy(network).double(), copy.deepcopy(network).to("meta")]


def fused_update(rng: random.Random) -> Subject:
    samples, width, actions = rng.choice([1, 3, 130, 300]), rng.randint(2, 20), rng.randint(2, 5)
    actor, critic = networks(rng, width, actions)
    given: dict[str, object] = {"actor": actor, "critic": critic, "std": torch.rand(actions) + 0.5}
    given |= {"obs": torch.randn(samples, width), "actions": torch.randn(samples, actions)}
    vectors = ("log_probs", "advantages", "returns", "values")
    given |= {name: torch.randn(samples) for name in vectors}
    given |= {"mu": torch.randn(samples, actions), "sigma": torch.rand(samples, actions) + 0.5}
    tensors = [x for x in given.values() if isinstance(x, Tensor)]
    # If obs or actions have another number of samples, the error may name any other argument.
    names = ("obs", "actions", *vectors, "mu", "sigma", "std", "actor", "critic", "critic_obs")
    wrong: dict[str, list] = {
        name: [Bad(x, names) for x in bad_tensor(given[name], "real")] for name in ("actions", *vectors, "mu", "sigma")
    }
    for name in ("mu", "sigma"):
        wrong[name] = [x for x in wrong[name] if x.value is not None] + [Bad(None, ("mu", "sigma"))]
    # Integer observations are valid, and so is a list of one group.
    wrong["obs"] = [Bad(x, names) for x in bad_tensor(given["obs"], "flag") if not isinstance(x, list)]
    wrong["obs"] += [Bad(x, names) for x in ([], [3.0], ["x"], [None], [given["obs"]] * 2)]
    wrong["critic_obs"] = [Bad(x, names) for x in bad_tensor(given["obs"], "flag") if x is not None]
    wrong["std"] = [Bad(x, names) for x in bad_tensor(given["std"], "real")]
    wrong |= {name: wrong_networks(given[name]) for name in ("actor", "critic")}
    wrong["critic"] = [Bad(x, names) for x in wrong["critic"]]
    wrong["actor"] = [Bad(x, names) for x in wrong["actor"]]
    number = ["0.2", None, [], object(), 1j]
    wrong["clip"] = [*number, -0.1, NAN, INF, -INF]
    wrong["value_clip"] = [*(x for x in number if x is not None), -0.1, NAN, INF]
    wrong["value_loss_coef"] = [*number, NAN, INF]
    wrong["entropy_coef"] = [*number, NAN, INF]
    parameters = [*actor.parameters(), *critic.parameters()]
    for x in parameters:
        x.grad = torch.zeros_like(x)
    held = (*tensors, *parameters, *(x.grad for x in parameters))
    return Subject("fused_update", pydrone.ppo.fused_update, given, wrong, held)


def clipped_step(rng: random.Random) -> Subject:
    actor, critic = networks(rng, rng.randint(1, 9), rng.randint(1, 3))
    groups = [list(actor.parameters()), list(critic.parameters())]
    parameters = [*groups[0], *groups[1]]
    optimizer = torch.optim.Adam(parameters)
    for x in parameters:
        x.grad = torch.randn_like(x)
    if rng.random() < 0.5:
        optimizer.step()
    other, another = (nn.Parameter(torch.ones(3)) for _ in range(2))
    other.grad = torch.ones(3)
    others = [torch.optim.SGD(parameters), torch.optim.AdamW(parameters), torch.optim.Adam(parameters, amsgrad=True)]
    others += [torch.optim.Adam(parameters, weight_decay=0.1), torch.optim.Adam(parameters, maximize=True)]
    others += [torch.optim.Adam([{"params": x} for x in groups])]
    wrong: dict[str, list] = {"optimizer": [None, 3, "x", object(), *others]}
    wrong["optimizer"] += [Bad(torch.optim.Adam([*parameters, other]), ("groups",))]
    wrong["groups"] = [None, 3, "x", [], groups[:1], [*groups, [another]], [3], [groups], parameters, [None], object()]
    wrong["max_norm"] = ["1", [], object(), 1j, 0, -1.0, NAN, -INF, torch.ones(2)]
    given = {"optimizer": optimizer, "groups": groups, "max_norm": 1.0}
    return Subject("clipped_step", pydrone.ppo.clipped_step, given, wrong, (*parameters, *(x.grad for x in parameters)))


# ---------------------------------------------------------------------------------------------- the operations

RANGES = {
    "activation": (-1, 4, BIG, -BIG),
    "matmul": (-1, 3, BIG, -BIG),
    "clip": (-0.1, NAN, INF),
    "max_norm": (0.0, -1.0, NAN, -INF),
    "beta1": (-0.1, 1.0, NAN, INF),
    "beta2": (-0.1, 1.0, NAN, INF),
    "epsilon": (-1e-9, NAN, INF),
    **dict.fromkeys(("slot", "end_slot", "pool_slot", "end_pool_slot"), (-1, 99, BIG, -BIG)),
}
# Names of parts of an argument, from pydrone/ops/schema.py; then those of ``drawn``, and of PyTorch's dispatcher.
PARTS = ("sources", "rows", "codes", "planes", "pool", "count", "final_obs", "final_rows", "not_finite")
PARTS += ("num_steps", "start", "num_samples", "first", "backend", "device")


class Recorder(TorchDispatchMode):
    """Keeps the last call of one of pydrone's operations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pydrone":
            names = [x.name for x in func._schema.arguments]
            self.operation, self.arguments = func, dict(zip(names, args)) | (kwargs or {})
        return func(*args, **(kwargs or {}))


def wrong_in_learner_op(name: str, x: object) -> list[object]:
    if isinstance(x, Tensor):
        made = [*not_tensors(x, True), *other_layouts(x), x.detach().to(torch.complex64), x.detach().unsqueeze(0)]
        if name == "packed":  # a longer one is valid
            return [*made, x.new_zeros(()), x[:0], x[: len(x) // 4], x.double(), x[:1].expand(len(x)), x.repeat(2)[::2]]
        # More norms than groups are valid (zero), and so is a longer not_finite.
        longer_too = x.dim() == 0 or name == "norms" or (name == "memory" and x.dim() == 1)
        return made if longer_too else [*made, torch.cat([x, x[:1]]).detach(), x.new_zeros(())]
    if isinstance(x, list) and x and isinstance(x[0], Tensor):
        made: list[object] = [[*x, x[0]], *([x[:1]] if len(x) > 1 else [])]
        # A network of equal input and output width can be doubled; three more tensors in memory are an unused pool.
        longer_too = name in ("actor", "critic") and x[0].dim() == 2 and x[0].shape[1] == x[-1].shape[0]
        made += [] if longer_too or ("memory" in name and len(x) == 3) else [[*x, *x]]
        for i, y in enumerate(x):
            made += [[*x[:i], z, *x[i + 1 :]] for z in wrong_in_learner_op(name, y)]
        return made
    if isinstance(x, list) and x:
        return [x[1:], [*x, 0], [BIG] * len(x), [-BIG] * len(x), [-1] * len(x), "x", [0.5] * len(x), None]
    return [*RANGES.get(name, ()), "x", [], object()]


def rollout(rng: random.Random) -> tuple[ActorCritic, RolloutBuffer]:
    """A policy and an empty buffer for it, which may wrap and have groups and a pool."""
    obs = rng.choice([rng.randint(1, 20), {"policy": rng.randint(1, 9), "critic": rng.randint(1, 9)}])
    dtype = rng.choice(["float32", "float32", "bfloat16", "float16"])
    normalize = {name: rng.random() < 0.3 for name in ("normalize_obs", "normalize_values")}
    config = PPOConfig(hidden_dims=(rng.randint(1, 40),), obs_dtype=dtype, **normalize)
    policy = make_policy(obs, rng.randint(1, 5), config)
    num_envs, num_steps = rng.choice([2, 3, 130]), rng.randint(2, 4)
    options = {"capacity": num_steps + rng.randint(0, 3), "final_obs_rows": rng.choice([0, 9])}
    options |= {"obs_dtype": getattr(torch, dtype), "non_finite": rng.choice(["warn", "ignore"])}
    buffer = RolloutBuffer(num_envs, num_steps, obs, len(policy.std_param), fields=policy.fields(), **options)
    for _ in range(rng.randint(0, 1)):  # the next rollout may begin at another slot
        collect(rng, policy, buffer)
        buffer.clear()
    return policy, buffer


def observe(policy: ActorCritic, num_envs: int) -> Tensor | dict[str, Tensor]:
    if isinstance(policy.obs, dict):
        return {name: torch.randn(num_envs, width) for name, width in policy.obs.items()}
    return torch.randn(num_envs, policy.obs)


def collect(rng: random.Random, policy: ActorCritic, buffer: RolloutBuffer, steps: int | None = None) -> None:
    """Collects a rollout with ``ppo_step``, or calls it ``steps`` times."""
    acting, ends, n = FusedActing(policy, buffer, lambda stage: None), None, buffer.num_envs
    kind = rng.choice(["dones", "truncated", "final_obs", "valid"])
    for _ in range(steps or buffer.num_steps):
        acting(observe(policy, n), ends)
        ends = {"rewards": torch.randn(n), "dones": torch.rand(n) < 0.3}
        ends |= {"truncated": ends["dones"].clone()} if kind in ("truncated", "final_obs") else {}
        ends |= (
            {"final_obs": observe(policy, n)} if kind == "final_obs" and buffer._storage.pool_count is not None else {}
        )
        ends |= {"valid": torch.arange(n) % 3 < rng.randint(1, 2)} if kind == "valid" else {}
    if steps is None:
        buffer.end(**ends)


def wrong_numbers(drawn: list[int], capacity: int) -> list[list[int]]:
    """``drawn`` with one number out of range, whatever the others are."""
    _, _, num_samples, *_, first, count = drawn
    ranges = {0: (-1, 0, capacity + 1), 1: (-1, capacity), 2: (-1, 0, num_samples - 1, num_samples + 1)}
    ranges |= {7: (-1, num_samples - count + 1), 8: (-1, 0, num_samples - first + 1)}
    return [
        [*drawn[:place], x, *drawn[place + 1 :]] for place, made in ranges.items() for x in (*made, BIG, -BIG, 2**62)
    ]


def wrong_layouts(layout: Tensor) -> list[Tensor]:
    made = [layout.int(), layout.double(), layout[:0], layout[:-1], layout[:, :3], layout.repeat(1, 2)[:, ::2]]
    for i in range(layout.numel()):
        # With a source [N, width], any number of inner dimensions below two is accepted.
        for x in (BIG, 2**40, *(() if i > 4 and i % 4 == 3 else (-1, -BIG))):
            made.append(layout.clone())
            made[-1].view(-1)[i] = x
    return made


def learner_op(rng: random.Random) -> Subject:
    """The operations themselves, with the arguments that the Python functions pass to them."""
    kind = rng.choice(["ppo_gradients", "ppo_gradients in the ring", "ppo_act", "ppo_step", "clipped_adam"])
    recorder = Recorder()
    if kind == "ppo_act":
        policy = make_policy(rng.randint(2, 20), rng.randint(2, 5), PPOConfig(hidden_dims=(rng.randint(1, 40),)))
        obs, parts = torch.randn(rng.choice([1, 3, 130, 300]), policy.obs), fused.parameters_of(policy)
        packed = torch.zeros(sum(packed_size(x) for x in parts[:2])) if rng.random() < 0.7 else None
        outputs = [torch.zeros(len(obs), policy.std_param.numel()), *torch.zeros(2, len(obs)).unbind()]
        given = fused.act_arguments(policy, obs, parts, policy.std, outputs[0] + 1, packed, [*outputs, outputs[0] - 1])
        with recorder, torch.no_grad():
            torch.ops.pydrone.ppo_act(*given)
    elif kind in ("ppo_step", "ppo_gradients in the ring"):
        policy, buffer = rollout(rng)
        if kind == "ppo_step":
            with recorder:
                collect(rng, policy, buffer, rng.randint(1, buffer.num_steps))
        else:
            collect(rng, policy, buffer)
            buffer.compute_gae(torch.zeros(buffer.num_envs), timeout_bootstrap="stored_value")
            options = {"shuffle": rng.choice(["full", "none"]), "normalize_advantages": rng.random() < 0.7}
            for minibatch in buffer.minibatches(rng.randint(1, 2), lazy=True, **options):
                with recorder:
                    fused.of_policy(policy, minibatch, PPOConfig())
    else:
        subject = fused_update(rng) if kind == "ppo_gradients" else clipped_step(rng)
        with recorder:
            subject.call(**subject.arguments)
    given, operation = recorder.arguments, recorder.operation
    assert operation.name() == f"pydrone::{kind.partition(' ')[0]}", f"recorded {operation.name()}, not {kind}"
    wrong = {name: wrong_in_learner_op(name, x) for name, x in given.items() if x is not None and x != []}
    if given.get("drawn"):
        given |= {name: given.get(name) for name in ("stats", "subset")}  # in the schema's order
        wrong["drawn"] += [[], *wrong_numbers(given["drawn"], given["actions"].shape[0])]
        fields = {name: given[name] for name in ("actions", "log_probs", "values", "mu", "sigma")}
        for name, x in fields.items():  # not of the same rows
            wrong[name] += [x.clone(), x[:, :-1], x[:-1], x.flip(0).contiguous()]
        wrong["values"].append(given["values"].double())
        wrong["returns"] = [given["values"], torch.zeros(given["drawn"][-1])]
        wrong.setdefault("subset", []).extend([torch.arange(given["drawn"][2] + 1), torch.zeros(given["drawn"][2])])
        wrong.setdefault("stats", []).extend([torch.zeros(3), torch.zeros(2).double()])
    if kind == "ppo_step":
        for name in wrong.keys() & {"layout", "end_layout"}:
            wrong[name] += wrong_layouts(given[name])
        # These slots are ignored without an end, without a pool, or if no field is checked for finite values.
        pooled = given["truncated"] is not None and len(given["end_memory"]) > 3
        looked_at = given["layout"][0, 3].item() > 0
        used = {"end_slot": given["end_layout"] is not None, "end_pool_slot": pooled, "pool_slot": looked_at}
        wrong = {name: made for name, made in wrong.items() if used.get(name, True)}
    if kind in ("ppo_act", "ppo_step"):
        for name in ("actions", "mean", "log_probs", "values"):
            wrong[name] += [given[name][:1].expand_as(given[name])] if len(given[name]) > 1 else []
    # For a tensor on another device or not in plain memory, PyTorch's dispatcher raises before the operation can.
    names = (*given, *PARTS)
    wrong = {name: [Bad(x, names) for x in made] for name, made in wrong.items()}
    flat = [y for x in given.values() for y in (x if isinstance(x, list) else [x])]
    held = tuple(x for x in flat if isinstance(x, Tensor))
    return Subject(f"ops.{kind}", lambda **x: operation(*x.values()), given, wrong, held)
