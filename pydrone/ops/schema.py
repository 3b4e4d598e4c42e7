"""The operations' signatures: the one place where they stand.

Every backend (reference, cpu, triton, cuda) has functions of these names and arguments. N = num_envs, T = num_steps,
C = capacity of the ring in steps. All outputs are written in place; nothing is returned and nothing is allocated.

``gae``     done-masked reverse scan over one rollout, with returns and statistics in the same launch.

    rewards, values, dones, truncated, valid: [N, C], any strides; step t of the rollout lies at slot (start + t) % C.
    ``coded``: ``dones`` holds uint8 codes (0 running, 1 terminated, 2 truncated, 3 invalid) and the other two are None;
    otherwise the three are flags of any dtype, by ``x != 0``.
    last_values [N].  final_values: [N, C] values of the true final observations, read at code 2 alone; or, with
    final_rows (int32 [N, C]), a pool [P] indexed by it, where an index outside [0, P) stands for a missing value (NaN).
    bootstrap: one of BOOTSTRAP.  advantages, returns: [N, T], float32 or float64, the dtype of the computation.
    stats: float64 [3] (count, mean, M2) of the advantages of valid samples; mean or M2 is not finite if one of their
    rewards or values is not, since each of these enters an advantage.  workspace: float64 [workspace_size(N)],
    zero before the first launch, private to one stream.

``append``  stores one step of N environments. (An argument costs a tenth of a microsecond, a list half of one and more
with numbers in it: hence two lists, and a tensor of numbers. :func:`pydrone.rollout.layout.of_append` makes it.)

    memory: [rows, codes, *planes], or [rows] alone: rows uint8 [C, N, row_bytes], codes uint8 [N, C], planes [N, C].
    With a pool of final observations also final_obs, count, final_rows: uint8 [R, P, pool_row_bytes], rows where
    truncated is set, in no particular order; int32 [R, 2] (rows wanted, truncations that came without a final
    observation); int32 [N, C], the row's index in the pool, -1 where it found no place.
    Where layout asks for it, last of all: int32 [R], 1 written at the rollout's place where something looked at is not
    finite, and nothing else.
    sources: all fields of a row, or none; a scalar for each plane; all fields of a row of the pool, or none.
    layout: int64 [1 + fields, 4] on the CPU: how many sources of each of the three kinds, then how many fields of a
    row, the first ones, are looked at as they are stored (0: none); and for each field of a row, then of the pool's,
    the byte where it begins, its dtype (SCALAR_TYPES), its elements and its dimensions.
    A field is [N, ...] of any strides, stored contiguous; a scalar is [N] or [N, 1].
    dones, truncated, valid: flags, [N] or [N, 1], any dtype, that form the codes; dones None: there are none yet.

``gather``  one minibatch: positions first .. first + B of the epoch's permutation, for all fields at once.

    outputs[i]: [B, ...] contiguous, from byte offsets[i] of the rows (dtypes[i] is what is stored; a half-precision
    field may have a float32 output).  advantages: [N, T]; advantages_out = (A - mean) / (std + STD_EPSILON) with
    stats, A without; returns_out = A + the float32 value at byte value_offset of the row.  subset: int64
    [num_samples], sample numbers n * T + t to draw from; None means all N * T.  indices_out: int64 [B], n * T + t.

``ppo_gradients``  of one minibatch of B samples, of two multilayer perceptrons and a Gaussian; on the CPU alone.

    obs, critic_obs: groups [B, width], side by side; critic_obs empty: what the actor sees.  actions, mu, sigma [B, A];
    log_probs, advantages, returns, values [B].  actor, critic: weight [out, in] and bias [out] of each layer in turn.
    std [A].  activation: number in ACTIVATIONS, of the hidden layers.  bf16: what products multiply is rounded to
    bfloat16, as far as ``has_bf16``; all else is float32.  value_clip below 0: the value loss is plain.
    obs_shift, obs_std [width], critic_shift, critic_std, value_shift, value_std []: (x - shift) / std, of observations
    clipped to obs_clip; None: as they are.  grads: of actor, critic and std, shaped as these, of
    surrogate + value_loss_coef * value loss (pydrone/ppo/learner/loss.py).  metrics: float64 [3], surrogate, value
    loss, and KL(mu, sigma || new), not a number without these.
    drawn: empty, or [num_steps, start, num_samples, key, rollout, epoch, shuffle, first, B], as ``gather``'s. Then obs,
    critic_obs, actions, log_probs, values, mu and sigma are fields of a ring's rows, [C, N, ...], advantages are
    [N, T], stats and subset as ``gather``'s, and returns None: A + values. To the bit what gathering first would give.

``ppo_act``  a step of the same policy: actions = mean + std * noise, their log-probabilities, and values, for N
    environments; on the CPU alone.  noise, actions, mean [N, A]; log_probs, values [N]; outputs of any strides.
    packed: None, or float32 [packed_size(actor) + packed_size(critic)], zeros at first, for networks of these sizes
    and one bf16 alone: weights packed by earlier calls, and packed again where they are no longer the same bits.

``ppo_step``  the end of a step, ``ppo_act`` on the observations that came of it, and the first half of the next step:
    ``append`` before and after it, in one call. Nothing is written where an argument of either is wrong.

    end_...: append's arguments for the end; end_layout None: there is none.  memory, layout, slot, pool_slot: append's
    for the beginning of a step whose fields are stored_obs (its observations), then actions, log_probs, values, mean
    and sigma [N, A]; values are in a plane too.  Outputs are read as they are written: none may be another argument.

``clipped_adam``  gradient clipping and a step of Adam for a list of parameters, of any shapes; on the CPU alone.

    grads, exp_avgs, exp_avg_sqs: as parameters; steps: [] float32 each; contiguous. groups: for each parameter the
    number of its group in norms [groups], which get the norms of the groups' gradients; gradients are left as they are,
    and count as min(1, max_norm / (norm + 1e-6)) times that. learning_rate: [] float32.

``has_bf16``  whether the operations above take bf16: on x86-64 with AVX512_BF16, where PYDRONE_ISA does not leave it
    out.

``ppo_loss``  the loss of one minibatch and its derivatives by what the networks put out; Triton on CUDA, on every other
    device the reference.

    mean, actions, mu, sigma [B, A]; std [A]; log_probs, advantages, new_values, values, returns [B]; any strides. mean,
    std and new_values are the policy's, the others the minibatch's. mu and sigma None: KL is not a number.
    value_clip below 0: the value loss is plain. value_shift, value_std []: of values and returns, as above.
    num_samples: what means are taken over, B, or more where these are a part of the minibatch, whose parts add up.
    mean_grad [B, A], value_grad [B], std_grad [A], contiguous: of surrogate + value_loss_coef * value loss -
    entropy_coef * entropy. metrics [4]: surrogate, value loss, entropy, KL. Computed in mean_grad's dtype, summed in a
    fixed order. workspace: float64 [loss_workspace_size(B, A)], zero before the first launch, private to one stream.

``cursor``: None, or int64 [CURSOR_SIZE] on the device: what a captured CUDA graph reads in place of the host's
slot, start and rollout.  A captured append onto a rollout not discarded writes nothing and sets the flag.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

SCHEMAS = {
    "gae": (
        "(Tensor rewards, Tensor values, Tensor dones, Tensor? truncated, Tensor? valid, Tensor last_values, "
        "Tensor? final_values, Tensor? final_rows, float gamma, float lam, int start, bool coded, int bootstrap, "
        "Tensor? cursor, Tensor(a!) advantages, Tensor(b!)? returns, Tensor(c!)? stats, Tensor(d!)? workspace) -> ()"
    ),
    "append": (
        "(Tensor(a!)[] memory, Tensor[] sources, Tensor layout, Tensor? dones, Tensor? truncated, Tensor? valid, "
        "int slot, int pool_slot, Tensor(b!)? cursor, bool commit) -> ()"
    ),
    "gather": (
        "(Tensor rows, int[] offsets, int[] dtypes, Tensor(a!)[] outputs, int value_offset, Tensor? advantages, "
        "Tensor? stats, Tensor? subset, int num_steps, int start, int num_samples, int key, int rollout, int epoch, "
        "bool shuffle, int first, Tensor? cursor, Tensor(b!)? advantages_out, Tensor(c!)? returns_out, "
        "Tensor(d!)? indices_out) -> ()"
    ),
}

# Of the CPU library alone: what calls them has another way where it is missing.
CPU_SCHEMAS = {
    "ppo_act": (
        "(Tensor[] obs, Tensor[] critic_obs, Tensor noise, Tensor[] actor, Tensor[] critic, Tensor std, "
        "int activation, bool bf16, Tensor? obs_shift, Tensor? obs_std, Tensor? critic_shift, Tensor? critic_std, "
        "float obs_clip, Tensor? value_shift, Tensor? value_std, Tensor(a!)? packed, Tensor(b!) actions, "
        "Tensor(c!) log_probs, Tensor(d!) values, Tensor(e!) mean) -> ()"
    ),
    "ppo_step": (
        "(Tensor(a!)[] end_memory, Tensor[] end_sources, Tensor? end_layout, Tensor? dones, Tensor? truncated, "
        "Tensor? valid, int end_slot, int end_pool_slot, Tensor[] obs, Tensor[] critic_obs, Tensor noise, "
        "Tensor[] actor, Tensor[] critic, Tensor std, int activation, bool bf16, Tensor? obs_shift, Tensor? obs_std, "
        "Tensor? critic_shift, Tensor? critic_std, float obs_clip, Tensor? value_shift, Tensor? value_std, "
        "Tensor(b!)? packed, Tensor(c!) actions, Tensor(d!) log_probs, Tensor(e!) values, Tensor(f!) mean, "
        "Tensor sigma, Tensor(g!)[] memory, Tensor[] stored_obs, Tensor layout, int slot, int pool_slot) -> ()"
    ),
    "ppo_gradients": (
        "(Tensor[] obs, Tensor[] critic_obs, Tensor actions, Tensor log_probs, Tensor advantages, Tensor? returns, "
        "Tensor values, Tensor? mu, Tensor? sigma, Tensor[] actor, Tensor[] critic, Tensor std, int activation, "
        "bool bf16, float clip, float value_clip, float value_loss_coef, Tensor? obs_shift, Tensor? obs_std, "
        "Tensor? critic_shift, Tensor? critic_std, float obs_clip, Tensor? value_shift, Tensor? value_std, "
        "Tensor(a!)[] grads, Tensor(b!) metrics, int[] drawn=[], Tensor? stats=None, Tensor? subset=None) -> ()"
    ),
    "clipped_adam": (
        "(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, int[] groups, float max_norm, Tensor learning_rate, float beta1, float beta2, "
        "float epsilon, Tensor(e!) norms) -> ()"
    ),
}

# What the CPU library says of itself.
CPU_QUERIES = {"has_bf16": "() -> bool"}

# Of every device, without an own version in the native libraries.
LEARNER_SCHEMAS = {
    "ppo_loss": (
        "(Tensor mean, Tensor std, Tensor actions, Tensor log_probs, Tensor advantages, Tensor new_values, "
        "Tensor values, Tensor returns, Tensor? mu, Tensor? sigma, float clip, float value_clip, "
        "float value_loss_coef, float entropy_coef, Tensor? value_shift, Tensor? value_std, int num_samples, "
        "Tensor(a!) mean_grad, Tensor(b!) value_grad, Tensor(c!) std_grad, Tensor(d!) metrics, "
        "Tensor(e!)? workspace) -> ()"
    ),
}

ACTIVATIONS = ("tanh", "elu", "relu", "silu")

# What a truncated step bootstraps with.
BOOTSTRAP = {None: 0, "final_values": 1, "stored_value": 2, "next_value": 3}

# Codes of the stored end flags.
RUNNING, TERMINATED, TRUNCATED, INVALID = 0, 1, 2, 3

# Slots of the cursor.
CURSOR_APPENDED, CURSOR_DISCARDED, CURSOR_FLAG, CURSOR_TICKET, CURSOR_NUM_STEPS = range(5)
CURSOR_SIZE = 5

# c10::ScalarType's numbers, part of PyTorch's stable ABI.
SCALAR_TYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
DTYPES = {number: dtype for dtype, number in SCALAR_TYPES.items()}

# Added to the standard deviation, as rsl_rl, skrl, CleanRL and SB3 do.
STD_EPSILON = 1e-8

# The permutation's side lengths multiply to at most a little more than this.
MAX_SAMPLES = 2**31 - 1


def workspace_size(num_envs: int) -> int:
    """Elements of ``gae``'s float64 workspace: a ticket, then (count, mean, M2) of each program of at least 4 envs."""
    return 3 * ((num_envs + 3) // 4) + 1


def packed_size(parameters: Sequence[torch.Tensor]) -> int:
    """Elements of ``ppo_act``'s packed weights of one network, at most: in whole vectors of 16, and as they are."""
    return sum(2 * -(-x.shape[0] // 16) * 16 * (x.shape[1] + 1) for x in parameters[::2]) + 16


def loss_workspace_size(num_samples: int, num_actions: int) -> int:
    """Elements of ``ppo_loss``'s float64 workspace: a ticket, then the sums of each program of at least 16 samples."""
    return 1 + (num_actions + 3) * ((num_samples + 15) // 16)
