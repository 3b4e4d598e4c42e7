"""Discrete actions, which ``ppo_act`` draws and ``ppo_gradients`` learns from: a network's outputs, in tiles [samples,
columns], are the logits of each action's choices, one action after the other; CATEGORIES: the numbers of choices."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from .ppo_loss import surrogate


def check_categories(categories: Sequence[int], num_actions: int, outputs: int) -> None:
    """Raises a RuntimeError unless they are those of ``num_actions`` actions, whose logits are ``outputs`` in all."""
    if len(categories) != num_actions:
        raise RuntimeError(f"categories: expected {num_actions} numbers, one for each action, got {len(categories)}")
    if sum(categories) != outputs:
        raise RuntimeError(f"categories: expected {outputs} choices in all, got {sum(categories)}")


@triton.jit
def larger(a, b):
    """The larger number; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def choices_of(column, CATEGORIES: tl.constexpr):
    """For each column its action, len(CATEGORIES) beyond the last one's logits, and the number of its choice."""
    action = tl.zeros_like(column)
    choice = column
    end: tl.constexpr = 0
    for i in tl.static_range(len(CATEGORIES)):
        end += CATEGORIES[i]
        action += (column >= end).to(tl.int32)
        choice = tl.where(column >= end, column - end, choice)
    return action, choice


@triton.jit
def shifted(logits, here):
    """The logits of one action, which are in the columns ``here``, minus the largest of them; and the logarithm of the
    sum of their exponentials, [samples]."""
    x = logits - tl.reduce(tl.where(here, logits, float("-inf")), 1, larger)[:, None]
    return x, tl.log(tl.sum(tl.where(here, tl.exp(x), 0.0), 1))


@triton.jit
def categorical_loss(
    logits, actions, old_log_prob, advantage, exists, total, clip, entropy_coef, CATEGORIES: tl.constexpr,
    ESTIMATES: tl.constexpr,
):  # fmt: skip
    """The figures of :func:`ppo_loss.surrogate`; each sample's entropy; and the gradient of minus the sum of surrogates
    and entropies / ``total`` with respect to the logits. ``actions`` [samples, columns]: of the column's action."""
    action, choice = choices_of(tl.arange(0, logits.shape[1]), CATEGORIES)
    log_probs = tl.zeros_like(logits)
    apart = tl.zeros_like(logits)  # from the entropy
    entropies = tl.zeros([logits.shape[0]], tl.float32)
    for i in range(len(CATEGORIES)):
        here = (action == i)[None, :]
        x, log_sum = shifted(logits, here)
        x -= log_sum[:, None]
        entropy = -tl.sum(tl.where(here, tl.exp(x) * x, 0.0), 1)
        log_probs = tl.where(here, x, log_probs)
        apart = tl.where(here, x + entropy[:, None], apart)
        entropies += entropy
    inside = (action < len(CATEGORIES))[None, :]
    hit = inside & (actions == choice[None, :])
    # NaN where an action is no choice.
    found = tl.sum(hit.to(tl.int32), 1) == len(CATEGORIES)
    log_prob = tl.where(found, tl.sum(tl.where(hit, log_probs, 0.0), 1), float("nan"))
    figures, grad = surrogate(log_prob, old_log_prob, advantage, exists, total, clip, ESTIMATES)
    p = tl.exp(log_probs)
    along = grad[:, None] * (hit.to(tl.float32) - p) + (entropy_coef / total) * p * apart
    return figures, tl.where(exists, entropies, 0.0), tl.where(inside & exists[:, None], along, 0.0)


@triton.jit
def draw_choice(logits, times, here):
    """Of one action, whose logits are in the columns ``here``: the column of the choice whose exponential clock,
    ``times`` over its probability, rings first, as torch.multinomial draws it; and its log-probability, [samples]."""
    x, log_sum = shifted(logits, here)
    score = tl.exp(x) / times
    score = tl.where(here, tl.where(score >= 0, score, -1.0), -2.0)  # a column of the action even among NaN
    column = tl.arange(0, logits.shape[1])[None, :]
    first = tl.where(score == tl.reduce(score, 1, larger)[:, None], column, logits.shape[1])
    best = tl.min(first, 1)
    return best, tl.sum(tl.where(column == best[:, None], x, 0.0), 1) - log_sum
