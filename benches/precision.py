"""What the precision of the networks' products costs, by emulated rounding on a CPU: gradients, and learning curves.

``python benches/precision.py gradients | curves`` prints a table. Factors are rounded to nearest, ties to even; sums
are float32. TF32 units of a GPU may round or sum in other ways, which this does not show.
"""

from __future__ import annotations

import copy
import json
import sys

import torch
from torch import Tensor, nn

from pydrone.envs.quadrotor import Quadrotor
from pydrone.ops.schema import MATMUL
from pydrone.ppo.config import PPOConfig, TrainConfig
from pydrone.ppo.learner.learner import Learner
from pydrone.ppo.policy.actor_critic import ActorCritic
from pydrone.ppo.trainer import Trainer

LEAST_BITS = {"float32": 0, "tf32": 13, "bfloat16": 16}  # of 23, that rounding drops


def rounded(x: Tensor, matmul: str) -> Tensor:
    """float32 ``x`` rounded to the precision of ``matmul``."""
    drop = LEAST_BITS[matmul]
    if not drop or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)) & -(1 << drop)).view(torch.float32)


class Product(torch.autograd.Function):
    """A linear layer, all three products of which take rounded factors."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, matmul: str) -> Tensor:
        x, weight = rounded(x, matmul), rounded(weight, matmul)
        ctx.save_for_backward(x, weight)
        ctx.matmul = matmul
        return torch.addmm(bias, x, weight.T)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        factor = rounded(grad, ctx.matmul)
        return factor @ weight, factor.T @ x, grad.sum(0), None


class RoundedLinear(nn.Linear):
    """A layer that multiplies in the precision ``matmul``."""

    matmul: str

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.weight, self.bias, self.matmul)


def emulate(policy: ActorCritic, matmul: str) -> None:
    """Has the policy's networks multiply in this precision from now on, in acting and learning."""
    for layer in [*policy.actor, *policy.critic]:
        if isinstance(layer, nn.Linear):
            layer.__class__, layer.matmul = RoundedLinear, matmul


def trainer(seed: int, num_envs: int, iterations: int, **ppo) -> Trainer:
    """The default training of the quadrotor, by autograd."""
    config = TrainConfig(iterations=iterations, seed=seed, capture=False, ppo=PPOConfig(learner="torch", **ppo))
    return Trainer(Quadrotor(num_envs, seed=seed), config, echo=lambda line: None)


def gradients(matmul: str, subject: Trainer, minibatch) -> list[Tensor]:
    """Of all parameters, for one minibatch; ``matmul`` float64: without any rounding."""
    policy = copy.deepcopy(subject.policy)
    emulate(policy, "float32" if matmul == "float64" else matmul)
    if matmul == "float64":
        policy.double()
        minibatch = Fields({name: minibatch[name].double() for name in Fields.NAMES})
    Learner(policy, subject.config.ppo).compute_gradients(minibatch)
    return [p.grad.double() for p in policy.parameters()]


class Fields:
    """A minibatch's fields, as attributes and as items."""

    NAMES = ("obs", "actions", "log_probs", "advantages", "returns", "values", "mu", "sigma")

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self.__dict__.update(fields)

    def __getitem__(self, name: str) -> Tensor:
        return self.__dict__[name]


def gradient_errors(iterations: int, num_envs: int = 256, **ppo) -> dict[str, float]:
    """||difference|| / ||gradient|| of all parameters, against float64, after some iterations of training."""
    subject = trainer(1, num_envs, iterations + 1, **ppo)
    for _ in range(iterations):
        subject.iterate()
    if subject.observations is None:
        subject.start()
    subject._estimate(*subject.collect())
    learner = subject.learner
    batches = iter(subject.buffer.minibatches(num_minibatches=4, num_epochs=1))
    learner.step(next(batches))  # where all ratios are 1, the surrogate's gradient hardly depends on the networks
    minibatch = next(batches)
    exact = gradients("float64", subject, minibatch)
    norm = sum(x.square().sum() for x in exact).sqrt()
    return {
        matmul: (
            sum((x - y).square().sum() for x, y in zip(gradients(matmul, subject, minibatch), exact)).sqrt() / norm
        ).item()
        for matmul in MATMUL
    }


def curve(matmul: str, seed: int, num_envs: int = 256, iterations: int = 40) -> list[tuple[float, float]]:
    """(return, length) of the episodes that ended in each iteration."""
    subject = trainer(seed, num_envs, iterations)
    emulate(subject.policy, matmul)
    figures = [subject.iterate() for _ in range(iterations)]
    return [(x["episode_return"], x["episode_length"]) for x in figures]


def main(what: str) -> None:
    torch.set_num_threads(1)
    if what == "gradients":
        for hidden, activation in (((128, 128), "tanh"), ((512, 256, 128), "elu")):
            for iterations in (0, 20):
                errors = gradient_errors(iterations, hidden_dims=hidden, activation=activation)
                print(hidden, activation, iterations, {name: f"{x:.1e}" for name, x in errors.items()}, flush=True)
        return
    for seed in (1, 2, 3):
        for matmul in MATMUL:
            print(json.dumps({"matmul": matmul, "seed": seed, "curve": curve(matmul, seed)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
