"""The operations' signatures, defined here and nowhere else.

Every backend (reference, cpu, triton, cuda) implements them under these names, with these arguments. N = num_envs,
T = num_steps, C = capacity of the ring in steps. Operations write into the given outputs; they return nothing and
allocate no output. The native backends check every argument before they write anything, and raise RuntimeError that
names the argument, what it was and what it must be; the reference and Triton check only some.

``gae``     reverse scan over one rollout, cut at episode ends; returns and statistics in the same launch.

    rewards, values, dones, truncated, valid: [N, C], any strides; step t of the rollout is in slot (start + t) % C.
    coded: True if ``dones`` holds uint8 codes (0 running, 1 terminated, 2 truncated, 3 invalid) and truncated and valid
    are None; otherwise all three are flags of any dtype, set where ``x != 0``.
    last_values: [N].  final_values: values of the true final observations, [N, C], read at code 2 only; or, with
    final_rows (int32 [N, C]), a pool [P] indexed by final_rows, where an index outside [0, P) gives NaN.
    bootstrap: a value of BOOTSTRAP.  advantages, returns: [N, T], float32 or float64, the dtype of the computation.
    stats: float64 [3] (count, mean, M2) of the advantages of valid samples; mean or M2 is not finite if any of their
    rewards or values is not, since each of these enters an advantage.  workspace: float64 [workspace_size(N)], zero
    before the first launch, used by one stream only.

``off_policy``  V-trace (Espeholt et al. 2018, arXiv:1802.01561) or, with q_values, Retrace(lambda) (Munos et al. 2016,
    arXiv:1606.02647): gae's scan with a weight on the temporal difference and a link on the carry.

    Arguments as for ``gae``, and log_rhos: [N, C], any strides, floating: log of the new over the old probability of
    the action; q_values: [N, C], Q(s_t, a_t), then values are E_pi Q(s_t, .).  rho_clip, c_clip: at least 0, may be
    infinite.  targets: [N, T], float32 or float64, the dtype of the computation: V-trace's vs, or Retrace's targets.
    advantages: [N, T] of that dtype, V-trace's for the policy gradient; None with q_values.  stats: of them.
    With next_t and code_t as in ``gae``, ratio_t = exp(log_rho_t), rho_t = min(rho_clip, ratio_t),
    c_t = lam * min(c_clip, ratio_t) and x_T = 0, where a NaN ratio stays NaN:
    V-trace: delta_t = r_t + gamma * next_t - V_t; x_t = rho_t * delta_t + (0 if code_t else gamma * c_t * x_{t+1});
    targets_t = V_t + x_t; advantages_t = rho_t * (delta_t + (0 if code_t else gamma * x_{t+1})).
    Retrace: delta_t = r_t + gamma * next_t - Q_t; x_t = delta_t + (0 if code_t else gamma * c_{t+1} * x_{t+1});
    targets_t = Q_t + x_t.  An invalid step: x_t and advantages_t are 0, and c_t is not used.

``append``  stores one step of N environments.  Each argument costs 0.1 us per call, a list 0.5 us or more if it holds
    numbers; hence two lists, and one tensor of numbers, built by :func:`pydrone.rollout.layout.of_append`.

    memory: [rows, codes, *planes], or [rows] only: rows uint8 [C, N, row_bytes], codes uint8 [N, C], planes [N, C].
    With a pool of final observations, then final_obs, count, final_rows: uint8 [R, P, pool_row_bytes], a row for each
    environment with truncated set, in no particular order; int32 [R, 2] (rows requested, truncations without a final
    observation); int32 [N, C], the row's index in the pool, -1 if the pool was full.
    If layout requests the check for finite values, last: int32 [R], set to 1 at index pool_slot if a checked value is
    not finite, otherwise left alone.
    sources: all fields of a row, or none; one scalar for each plane; all fields of a pool row, or none.
    layout: int64 [1 + fields, 4] on the CPU. Row 0: the numbers of sources of these three kinds, then how many fields
    of a row, from the first, are checked for finite values (0: none). One row for each field of a row, then of a pool
    row: byte offset, dtype (SCALAR_TYPES), number of elements, number of dimensions without N.
    A field is [N, ...], any strides, and is stored contiguously; a scalar is [N] or [N, 1].
    dones, truncated, valid: flags, [N] or [N, 1], any dtype, stored as codes; dones None: no codes are written.
    slot, pool_slot: where the step goes in the ring, and its rollout in the R pools.  commit: advances the cursor.

``gather``  one minibatch: positions first .. first + B of the epoch's permutation, all fields in one launch.

    outputs[i]: [B, ...] contiguous, read at byte offsets[i] of the rows; dtypes[i] is the stored dtype (half-precision
    fields may have float32 outputs).  advantages: [N, T]; advantages_out = (A - mean) / (std + STD_EPSILON) with
    stats, A without; returns_out is read from returns [N, T], of the dtype and strides of advantages, or, where that is
    None, A + the float32 value at byte value_offset of the row.  subset: int64 [num_samples], sample numbers n * T + t
    to draw from; None: all N * T.  indices_out: int64 [B], n * T + t.

``ppo_gradients``  gradients of a minibatch of B samples for two multilayer perceptrons and a Gaussian.

    obs, critic_obs: groups [B, width], concatenated; critic_obs empty: the critic sees obs.  actions, mu, sigma [B, A];
    log_probs, advantages, returns, values [B].  actor, critic: weight [out, in] and bias [out] of each layer in turn.
    std [A]; or None, for discrete actions: categories are then the choices of each, the actor's outputs their logits,
    one action after the other, actions [B, A] numbers of choices, and mu and sigma None.
    activation: index into ACTIVATIONS, for the hidden layers.  matmul: index into MATMUL, what operands of matrix
    products are rounded to: nothing (float32), TF32, or bfloat16 (on the CPU where ``has_bf16``); everything else is
    float32. The CPU computes TF32 in float32.  value_clip below 0: no value clipping; else value_max: the value loss is
    the greater of the clipped and the plain error, not the clipped one alone.
    obs_shift, obs_std [width], critic_shift, critic_std, value_shift, value_std []: inputs become (x - shift) / std,
    observations clipped to +-obs_clip; None: unchanged.  grads: of actor, critic and std, same shapes, of
    surrogate + value_loss_coef * value loss - entropy_coef * entropy (pydrone/ppo/learner/loss.py).  metrics: float32
    [4] or [NUM_METRICS], summed in float64: surrogate, value loss, entropy, KL(mu, sigma || new), which is NaN without
    mu and sigma, its estimate from the ratios r of new to old probabilities, mean(r - 1 - log r), and the share of the
    samples with |r - 1| > clip.
    drawn: empty, or [num_steps, start, num_samples, key, rollout, epoch, shuffle, first, B] as for ``gather``. Then
    obs, critic_obs, actions, log_probs, values, mu and sigma are fields of the ring's rows, [C, N, ...], advantages is
    [N, T], stats, subset and cursor are as for ``gather``, and returns is None: A + values. Bit-equal to gathering
    first.

``ppo_act``  acts for N environments with the same policy: actions = mean + std * noise, their log-probabilities, and
    values.  noise, actions, mean [N, A]; log_probs, values [N]; outputs of any strides.  std None, and categories: as
    for ``ppo_gradients``; mean are the logits then, noise [N, sum of categories] is exponential, and the choice is that
    with the greatest probability / noise, as torch.multinomial draws it.
    packed: None, or float32 [packed_size(actor) + packed_size(critic)], zero at first, which keeps packed weights
    between calls; use one for each pair of network shapes and ``matmul``. Weights whose bits changed are repacked.

``ppo_step``  ends a step, runs ``ppo_act`` on the observations that followed, and begins the next step, in one call:
    ``append``, ``ppo_act``, ``append``. Nothing is written if an argument of any of them is invalid.

    end_...: append's arguments for the end; end_layout None: no step to end.  memory, layout, slot, pool_slot: append's
    for the beginning of a step with fields stored_obs (its observations), then actions, log_probs, values, mean and
    sigma [N, A]; values also go to a plane.  cursor: moved by the end, then followed by the beginning.  Outputs are
    read back: none may share memory with another argument.

``clipped_adam``  clips gradients and takes one Adam step for a list of parameters of any shapes.

    grads, exp_avgs, exp_avg_sqs: shaped as parameters; steps: float32 [] each; all contiguous. groups: for each
    parameter, the index of its group in norms [groups], which receives the norm of each group's gradients. Gradients
    are not modified; they are used times min(1, max_norm / (norm + 1e-6)). learning_rate: float32 [].
    kl: None, or float32 []; then schedule is [desired_kl, zero_kl, factor, least, most], and learning_rate is first
    adapted: where kl > 2 * desired_kl, divided by factor but not below least; where zero_kl < kl < desired_kl / 2,
    multiplied by it but not above most; a rate beyond these is never moved against that direction to reach them.

``has_bf16``  whether the CPU takes bfloat16 in the above: x86-64 with AVX512_BF16, unless PYDRONE_ISA selects less.

``append_plan``  checks ``append``'s arguments, and returns what it does with such dtypes, shapes and strides, as plain
    numbers: int64, on the CPU. :mod:`pydrone.ops.prepared` launches it on addresses of the memory's tensors, then of
    the sources and flags, where places[i] is the number of source or flag i among the latter.

``ppo_loss``  the loss of one minibatch and its gradients with respect to the networks' outputs; Triton on CUDA, the
    reference on every other device.

    mean, actions, mu, sigma [B, A]; std [A]; log_probs, advantages, new_values, values, returns [B]; any strides. mean,
    std and new_values are the policy's, the others the minibatch's. mu and sigma None: KL is NaN.
    value_clip below 0: no value clipping. value_shift, value_std []: normalise values and returns, as above.
    num_samples: the divisor of all means: B, or the whole minibatch's size if these B are a chunk of it, so that the
    chunks' results add up.
    mean_grad [B, A], value_grad [B], std_grad [A], contiguous: gradients of surrogate + value_loss_coef * value loss -
    entropy_coef * entropy. metrics [4]: surrogate, value loss, entropy, KL. Computed in mean_grad's dtype, summed in a
    fixed order. workspace: float64 [loss_workspace_size(B, A)], zero before the first launch, used by one stream only.

``activate``  a layer's bias and activation after its matrix product; Triton on CUDA, the reference on every other
    device. ``activate_backward``: their gradients.

    x [B, H], contiguous float32: receives activation(x + bias), bias [H]; or, with out, as SiLU needs, x + bias, and
    out the result. activation: index into ACTIVATIONS, or -1: none.
    grad [B, H]: with respect to the layer's output.  kept [B, H]: what ``activate`` left in x; None without an
    activation.  out [B, H]: grad times the activation's derivative; None without one. bias_grad [H]: its sum over B, in
    a fixed order.  workspace: float64 [layer_workspace_size(B, H)], zero before the first launch, used by one stream
    only.

``task_step``  a step of N drones' tasks, with the quadrotor's physics if wanted; the CPU library alone. On CUDA,
    :mod:`pydrone.envs.fused`, which describes the arguments, launches Triton by itself.

    pos, vel, ang_vel [N, 3], quat [N, 4]: with substeps, the drones before the step, vel in the world; they receive
    their state after it, and after the reset of those whose episode ended. substeps 0: the drones after a simulator's
    step, vel in the body frame; rows may be strided, and are only read.  actions: [N, 4], clipped or not.
    The tensors of the tuples Task, Varied, Draws and Outputs follow, in their order; all are contiguous. Without drawn,
    wind, history, rpm and normal are None; leg, waypoints and the fourth row of sums belong together. initial [K, 16]:
    if K is 1, uniform lacks the column that picks a row.
    numbers: float32 [TASK_NUMBERS], see :func:`pydrone.envs.fused.flat`.  max_age, hold_steps: of TaskNumbers.
    resample: whether a target that is reached is replaced.  near: whether there is a reward near it.  tilt: whether
    max_tilt is checked.  Sums of the log are added in an order that no number of threads changes.

``cursor``: None, or int64 [CURSOR_SIZE] on the tensors' device, from which a captured CUDA graph derives slot, start
and rollout instead of taking the host's.  A captured append that would overwrite a rollout not yet discarded writes
nothing and sets the flag.
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
    "off_policy": (
        "(Tensor rewards, Tensor values, Tensor dones, Tensor? truncated, Tensor? valid, Tensor last_values, "
        "Tensor? final_values, Tensor? final_rows, Tensor log_rhos, Tensor? q_values, float gamma, float lam, "
        "float rho_clip, float c_clip, int start, bool coded, int bootstrap, Tensor? cursor, Tensor(a!)? advantages, "
        "Tensor(b!) targets, Tensor(c!)? stats, Tensor(d!)? workspace) -> ()"
    ),
    "append": (
        "(Tensor(a!)[] memory, Tensor[] sources, Tensor layout, Tensor? dones, Tensor? truncated, Tensor? valid, "
        "int slot, int pool_slot, Tensor(b!)? cursor, bool commit) -> ()"
    ),
    "gather": (
        "(Tensor rows, int[] offsets, int[] dtypes, Tensor(a!)[] outputs, int value_offset, Tensor? advantages, "
        "Tensor? returns, Tensor? stats, Tensor? subset, int num_steps, int start, int num_samples, int key, "
        "int rollout, int epoch, bool shuffle, int first, Tensor? cursor, Tensor(b!)? advantages_out, "
        "Tensor(c!)? returns_out, Tensor(d!)? indices_out) -> ()"
    ),
}

# Implemented by the CPU library and, on CUDA, by Triton; callers have an alternative where a kernel is missing.
PPO_SCHEMAS = {
    "ppo_act": (
        "(Tensor[] obs, Tensor[] critic_obs, Tensor noise, Tensor[] actor, Tensor[] critic, Tensor? std, "
        "int activation, int matmul, Tensor? obs_shift, Tensor? obs_std, Tensor? critic_shift, Tensor? critic_std, "
        "float obs_clip, Tensor? value_shift, Tensor? value_std, Tensor(a!)? packed, Tensor(b!) actions, "
        "Tensor(c!) log_probs, Tensor(d!) values, Tensor(e!) mean, int[] categories=[]) -> ()"
    ),
    "ppo_step": (
        "(Tensor(a!)[] end_memory, Tensor[] end_sources, Tensor? end_layout, Tensor? dones, Tensor? truncated, "
        "Tensor? valid, int end_slot, int end_pool_slot, Tensor[] obs, Tensor[] critic_obs, Tensor noise, "
        "Tensor[] actor, Tensor[] critic, Tensor std, int activation, int matmul, Tensor? obs_shift, Tensor? obs_std, "
        "Tensor? critic_shift, Tensor? critic_std, float obs_clip, Tensor? value_shift, Tensor? value_std, "
        "Tensor(b!)? packed, Tensor(c!) actions, Tensor(d!) log_probs, Tensor(e!) values, Tensor(f!) mean, "
        "Tensor sigma, Tensor(g!)[] memory, Tensor[] stored_obs, Tensor layout, int slot, int pool_slot, "
        "Tensor(h!)? cursor=None) -> ()"
    ),
    "ppo_gradients": (
        "(Tensor[] obs, Tensor[] critic_obs, Tensor actions, Tensor log_probs, Tensor advantages, Tensor? returns, "
        "Tensor values, Tensor? mu, Tensor? sigma, Tensor[] actor, Tensor[] critic, Tensor? std, int activation, "
        "int matmul, float clip, float value_clip, float value_loss_coef, float entropy_coef, Tensor? obs_shift, "
        "Tensor? obs_std, Tensor? critic_shift, Tensor? critic_std, float obs_clip, Tensor? value_shift, "
        "Tensor? value_std, Tensor(a!)[] grads, Tensor(b!) metrics, int[] drawn=[], Tensor? stats=None, "
        "Tensor? subset=None, Tensor? cursor=None, int[] categories=[], bool value_max=True) -> ()"
    ),
    "clipped_adam": (
        "(Tensor(a!)[] parameters, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, int[] groups, float max_norm, Tensor(f!) learning_rate, float beta1, float beta2, "
        "float epsilon, Tensor(e!) norms, Tensor? kl=None, float[] schedule=[]) -> ()"
    ),
}

# Implemented by the CPU library alone; callers have an alternative where it is missing.
CPU_SCHEMAS = {
    "task_step": (
        "(Tensor(a!) pos, Tensor(b!) quat, Tensor(c!) vel, Tensor(d!) ang_vel, Tensor actions, Tensor(e!) target, "
        "Tensor(f!) last_pos, Tensor(g!) last_actions, Tensor(h!) age, Tensor(i!)? held, Tensor(j!)? leg, "
        "Tensor? waypoints, Tensor(k!) sums, Tensor initial, Tensor(l!)? drawn, Tensor(m!)? wind, Tensor(n!)? history, "
        "Tensor(o!)? rpm, Tensor uniform, Tensor? normal, Tensor(p!) obs, Tensor(q!) final_obs, Tensor(r!) rewards, "
        "Tensor(s!) dones, Tensor(t!) truncated, Tensor(u!) log, Tensor numbers, int max_age, int hold_steps, "
        "int substeps, bool resample, bool near, bool tilt) -> ()"
    ),
}

# Queries about the CPU library.
CPU_QUERIES = {
    "has_bf16": "() -> bool",
    "append_plan": (
        "(Tensor[] memory, Tensor[] sources, Tensor layout, Tensor? dones, Tensor? truncated, Tensor? valid, "
        "int[] places) -> Tensor"
    ),
}

# For every device, with no version in the native libraries.
LEARNER_SCHEMAS = {
    "ppo_loss": (
        "(Tensor mean, Tensor std, Tensor actions, Tensor log_probs, Tensor advantages, Tensor new_values, "
        "Tensor values, Tensor returns, Tensor? mu, Tensor? sigma, float clip, float value_clip, "
        "float value_loss_coef, float entropy_coef, Tensor? value_shift, Tensor? value_std, int num_samples, "
        "Tensor(a!) mean_grad, Tensor(b!) value_grad, Tensor(c!) std_grad, Tensor(d!) metrics, "
        "Tensor(e!)? workspace) -> ()"
    ),
    "activate": "(Tensor(a!) x, Tensor bias, int activation, Tensor(b!)? out) -> ()",
    "activate_backward": (
        "(Tensor grad, Tensor? kept, int activation, Tensor(a!)? out, Tensor(b!) bias_grad, "
        "Tensor(c!)? workspace) -> ()"
    ),
}

ACTIVATIONS = ("tanh", "elu", "relu", "silu")

# The numbers of task_step: of the task, of the body, and three for each column of the randomizer's draws.
TASK_NUMBERS = 26 + 25 + 3 * 13

# What ppo_gradients measures.
NUM_METRICS = 6

# What operands of the networks' matrix products are rounded to; sums are float32.
MATMUL = ("float32", "tf32", "bfloat16")

# The value that a truncated step bootstraps from.
BOOTSTRAP = {None: 0, "final_values": 1, "stored_value": 2, "next_value": 3}

# Codes of the stored end flags.
RUNNING, TERMINATED, TRUNCATED, INVALID = 0, 1, 2, 3

# Elements of the cursor.
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
    torch.uint16: 27,
    torch.uint32: 28,
    torch.uint64: 29,
}
DTYPES = {number: dtype for dtype, number in SCALAR_TYPES.items()}
# What every backend reads, as a number and as a flag: float8, int4 and the like are not among them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REALS = (*SCALAR_TYPES, torch.uint16, torch.uint32, torch.uint64)

# Added to the standard deviation, as rsl_rl, skrl, CleanRL and SB3 do.
STD_EPSILON = 1e-8

# The permutation is computed in 32 bits: its domain, a * b, is slightly larger than the number of samples.
MAX_SAMPLES = 2**31 - 1


# The most programs of a launch of ``gae`` with fewer than four environments each; CUDA's have no more.
PARTIALS = 512


def workspace_size(num_envs: int) -> int:
    """Elements of ``gae``'s float64 workspace: a ticket, then at most three sums of each program (CUDA: two, aligned to
    two elements)."""
    return 3 * max((num_envs + 3) // 4, min(num_envs, PARTIALS)) + 1


def packed_size(parameters: Sequence[torch.Tensor]) -> int:
    """Upper bound for one network's elements of ``ppo_act``'s ``packed``: packed in vectors of 16, and a plain copy."""
    return sum(2 * -(-x.shape[0] // 16) * 16 * (x.shape[1] + 1) for x in parameters[::2]) + 16


def loss_workspace_size(num_samples: int, num_actions: int) -> int:
    """Elements of ``ppo_loss``'s float64 workspace: a ticket, then the sums per program of at least 16 samples."""
    return 1 + (num_actions + 3) * ((num_samples + 15) // 16)


# Rows that a program of ``activate_backward`` adds up at a time.
LAYER_ROWS = 32
# Blocks of columns that it has tickets for; at a fixed place, as layers of other widths use the same workspace.
LAYER_TICKETS = 1024


def layer_programs(num_rows: int) -> int:
    """Programs of ``activate_backward`` along the rows, the same on every GPU, so that sums are."""
    return min(-(-num_rows // LAYER_ROWS), 256)


def layer_workspace_size(num_rows: int, width: int) -> int:
    """Elements of ``activate_backward``'s float64 workspace: a ticket per block of columns, then each program's sums.
    Layers of other sizes may share it."""
    return LAYER_TICKETS + layer_programs(num_rows) * width
