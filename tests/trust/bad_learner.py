"""The fused learner's functions and operations, and what may be wrong with their arguments; see bad_input.py."""

from __future__ import annotations

import copy
import random

import torch
from bad_values import BIG, INF, NAN, Bad, Subject, bad_tensor, not_tensors, other_layouts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pydrone.ppo
from pydrone.ppo import fused
from pydrone.ppo.config import PPOConfig
from pydrone.ppo.policy import make_policy


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
    # Of samples: where actions or obs have more or fewer, the others' are wrong. One sample more of one alone is seen.
    names = ("obs", "actions", *vectors, "mu", "sigma", "std", "actor", "critic", "critic_obs")
    wrong: dict[str, list] = {
        name: [Bad(x, names) for x in bad_tensor(given[name], "real")] for name in ("actions", *vectors, "mu", "sigma")
    }
    for name in ("mu", "sigma"):
        wrong[name] = [x for x in wrong[name] if x.value is not None] + [Bad(None, ("mu", "sigma"))]
    # Integers are observations; groups of one kind are as good as one.
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
    "clip": (-0.1, NAN, INF),
    "max_norm": (0.0, -1.0, NAN, -INF),
    "beta1": (-0.1, 1.0, NAN, INF),
    "beta2": (-0.1, 1.0, NAN, INF),
    "epsilon": (-1e-9, NAN, INF),
}


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
        # Any number of groups has its norms: more than are asked for are zero.
        return made if x.dim() == 0 or name == "norms" else [*made, torch.cat([x, x[:1]]).detach(), x.new_zeros(())]
    if isinstance(x, list) and x and isinstance(x[0], Tensor):
        made: list[object] = [[*x, x[0]], [*x, *x], *([x[:1]] if len(x) > 1 else [])]
        for i, y in enumerate(x):
            made += [[*x[:i], z, *x[i + 1 :]] for z in wrong_in_learner_op(name, y)]
        return made
    if isinstance(x, list) and x:
        return [x[1:], [*x, 0], [BIG] * len(x), [-BIG] * len(x), [-1] * len(x), "x", [0.5] * len(x), None]
    return [*RANGES.get(name, ()), "x", [], object()]


def learner_op(rng: random.Random) -> Subject:
    """The operations themselves, with the arguments that the functions give them."""
    kind = rng.choice(["ppo_gradients", "ppo_act", "clipped_adam"])
    recorder = Recorder()
    with recorder:
        if kind == "ppo_act":
            policy = make_policy(rng.randint(2, 20), rng.randint(2, 5), PPOConfig(hidden_dims=(rng.randint(1, 40),)))
            fused.act(policy, torch.randn(rng.choice([1, 3, 130, 300]), policy.actor[0].in_features))
        else:
            subject = fused_update(rng) if kind == "ppo_gradients" else clipped_step(rng)
            subject.call(**subject.arguments)
    given, operation = recorder.arguments, recorder.operation
    wrong = {name: wrong_in_learner_op(name, x) for name, x in given.items() if x is not None and x != []}
    # Of a tensor that is elsewhere, or no plain memory, PyTorch's dispatcher speaks before the operation can.
    wrong = {name: [Bad(x, (*given, "backend", "device")) for x in made] for name, made in wrong.items()}
    flat = [y for x in given.values() for y in (x if isinstance(x, list) else [x])]
    held = tuple(x for x in flat if isinstance(x, Tensor))
    return Subject(f"ops.{kind}", lambda **x: operation(*x.values()), given, wrong, held)
