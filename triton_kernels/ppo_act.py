"""Acts for one step in one launch: both networks, actions and their log-probabilities (ppo_act). ppo_step does so
between the end of the previous step, which it stores, and the beginning of the next, in the same launch.

A program takes a tile of environments through one of the two networks: the actor's stores the observations and what it
computes, the critic's the values and how the previous step ended. Layers are computed in blocks of CHUNK units, so that
weights of any width pass through registers and shared memory a block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pydrone.ops.schema import MATMUL

from .append import LENGTH, NARROW, TILE, copy_fields, place, store_field, store_step, taken_apart
from .categorical import check_categories, choices_of, draw_choice
from .launch import CURSOR_APPENDED, CURSOR_DISCARDED, CURSOR_FLAG, CURSOR_TICKET, generation, on_device_of, take_ticket
from .networks import activate, load_input, multiply_add, operand, padded
from .ppo_loss import HALF_LOG_2PI

# Environments of a tile: sixteen for each of the warps, as products of tensor cores take them.
ENVS, WARPS = 64, 4
# Units of a block, by generation. wgmma and tcgen05 read weights in shared memory; elsewhere each warp holds a block of
# them in registers, where no larger one fits.
CHUNKS, FEWEST = {9: 64, 10: 64}, 32
# Most inputs and units in a layer: a tile's activations stay in registers. Most actions: they are one block.
MOST_WIDTH, MOST_ACTIONS = 128, 32
# Triton's name for each of MATMUL. Three products of TF32 are as accurate as one of float32.
PRECISIONS = dict(zip(MATMUL, ("tf32x3", "tf32", "bfloat16"), strict=True))


@triton.jit
def load_block(weight, first_output, first_input, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """An operand [ROWS, COLUMNS] of a weight [OUT, IN]; 0 outside."""
    o = first_output + tl.arange(0, ROWS)[:, None]
    i = first_input + tl.arange(0, COLUMNS)[None, :]
    return operand(tl.load(weight + o * IN + i, mask=(o < OUT) & (i < IN), other=0.0), PRECISION)


@triton.jit
def layer_by_blocks(
    blocks, weight, bias, IN: tl.constexpr, OUT: tl.constexpr, HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A layer's outputs, in blocks [samples, CHUNK], of its inputs in such blocks."""
    COLUMNS: tl.constexpr = blocks[0].shape[1]
    ROWS: tl.constexpr = min(CHUNK, padded(OUT))
    SPLIT: tl.constexpr = PRECISION == "tf32x3"
    if SPLIT:
        # Input by input: an operand is split in two, which fill the registers if they are kept for the next output.
        totals = ()
        for _ in tl.static_range(0, OUT, ROWS):
            totals = totals + (tl.zeros([blocks[0].shape[0], ROWS], tl.float32),)
        for k in tl.static_range(len(blocks)):
            sums = ()
            for j in tl.static_range(len(totals)):
                w = load_block(weight, j * ROWS, k * COLUMNS, IN, OUT, ROWS, COLUMNS, PRECISION)
                sums = sums + (multiply_add(blocks[k], tl.trans(w), totals[j], PRECISION),)
            totals = sums
    else:
        operands = ()
        for k in tl.static_range(len(blocks)):
            operands = operands + (operand(blocks[k], PRECISION),)
    outputs = ()
    for first in tl.static_range(0, OUT, ROWS):
        o = first + tl.arange(0, ROWS)
        if SPLIT:
            total = totals[first // ROWS]
        else:
            total = tl.zeros([blocks[0].shape[0], ROWS], tl.float32)
            for k in tl.static_range(len(blocks)):
                w = load_block(weight, first, k * COLUMNS, IN, OUT, ROWS, COLUMNS, PRECISION)
                total = multiply_add(operands[k], tl.trans(w), total, PRECISION)
        total += tl.load(bias + o, mask=o < OUT, other=0.0)[None, :]
        if HIDDEN:
            total = activate(total, ACTIVATION)
        outputs = outputs + (total,)
    return outputs


@triton.jit
def forward_by_blocks(
    x, parameters, WIDTHS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr
):
    """As :func:`networks.forward`, for a network whose outputs fit a block; ``parameters``: weight and bias of each
    layer in turn, contiguous."""
    blocks = (x,)
    for i in tl.static_range(len(WIDTHS) - 1):
        blocks = layer_by_blocks(
            blocks, parameters[2 * i], parameters[2 * i + 1], WIDTHS[i], WIDTHS[i + 1], i + 2 < len(WIDTHS), ACTIVATION,
            PRECISION, CHUNK,
        )  # fmt: skip
    return blocks[0]


@triton.jit(
    do_not_specialize=[
        "num_envs", "capacity", "end_slot", "end_pool_slot", "slot", "pool_slot", "end_rollouts", "rollouts",
        "pool_rows",
    ]
)  # fmt: skip
def step_kernel(
    obs, critic_obs, noise, actor, critic, std, obs_moments, critic_moments, value_moments, obs_clip, outputs, end_rows,
    end_sources, end_planes, end_plane_sources, codes, flags, pool, final_sources, pool_count, final_rows, end_strides,
    rows, sources, plane, not_finite, plane_strides, cursor, num_envs, capacity, end_slot, end_pool_slot, slot,
    pool_slot, end_rollouts, rollouts, pool_rows, OBS: tl.constexpr, OBS_STRIDES: tl.constexpr,
    CRITIC_OBS: tl.constexpr, CRITIC_STRIDES: tl.constexpr, ACTOR: tl.constexpr, CRITIC: tl.constexpr,
    STRIDES: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, END_ROW_BYTES: tl.constexpr,
    END_FIELDS: tl.constexpr, POOL_ROW_BYTES: tl.constexpr, FINAL_FIELDS: tl.constexpr, ROW_BYTES: tl.constexpr,
    FIELDS: tl.constexpr, OUTPUT_FIELDS: tl.constexpr, LOOKED_AT: tl.constexpr, ENVS: tl.constexpr, CHUNK: tl.constexpr,
    NARROW: tl.constexpr, CATEGORIES: tl.constexpr,
):  # fmt: skip
    """``outputs``: actions, log_probs, values, mean; STRIDES: of noise and these. end_rows to end_strides: of the end,
    as store_step takes them; rows to plane_strides: of the beginning, with the values' plane; end_rows or rows None:
    there is none. OBS, CRITIC_OBS: widths of the groups; ACTOR, CRITIC: of input and layers. OUTPUT_FIELDS: as FIELDS,
    of the outputs."""
    env = (tl.program_id(0) * ENVS + tl.arange(0, ENVS)).to(tl.int64)
    exists = env < num_envs
    ends = True
    begins = True
    if cursor is not None:
        appended = tl.load(cursor + CURSOR_APPENDED)
        first = appended
        room = tl.load(cursor + CURSOR_DISCARDED) + capacity
        if end_rows is not None:
            ends = appended < room
            end_slot, end_pool_slot = place(cursor, appended, capacity, end_rollouts)
            first = appended + 1
        begins = first < room
        slot, pool_slot = place(cursor, first, capacity, rollouts)
        if first >= room:
            tl.store(cursor + CURSOR_FLAG, 1)
    if tl.program_id(1) == 0:
        x = load_input(
            obs, OBS_STRIDES, env, env, exists, obs_moments[0], obs_moments[1], obs_clip, OBS, ACTOR[0]
        )  # fmt: skip
        mean = forward_by_blocks(x, actor, ACTOR, ACTIVATION, PRECISION, CHUNK)
        NUM_ACTIONS: tl.constexpr = ACTOR[len(ACTOR) - 1]
        action = tl.arange(0, mean.shape[1])
        mask = exists[:, None] & (action < NUM_ACTIONS)[None, :]
        at = env[:, None]
        z = tl.load(noise + at * STRIDES[0] + action[None, :] * STRIDES[1], mask=mask, other=0.0).to(tl.float32)
        if std is not None:
            deviation = tl.load(std + action, mask=action < NUM_ACTIONS, other=1.0)
            lacking = tl.sum(tl.where(action < NUM_ACTIONS, tl.log(deviation) + HALF_LOG_2PI, 0.0), 0)
            actions = mean + z * deviation[None, :]
            log_probs = -0.5 * tl.sum(z * z, 1) - lacking
            tl.store(outputs[0] + at * STRIDES[2] + action[None, :] * STRIDES[3], actions, mask=mask)
        else:
            head, choice = choices_of(action, CATEGORIES)
            log_probs = tl.zeros([ENVS], tl.float32)
            for i in range(len(CATEGORIES)):
                best, log_prob = draw_choice(mean, z, (head == i)[None, :])
                drawn = tl.sum(tl.where(action[None, :] == best[:, None], choice[None, :], 0), 1)
                tl.store(outputs[0] + env * STRIDES[2] + i * STRIDES[3], drawn.to(tl.float32), mask=exists)
                log_probs += log_prob
        tl.store(outputs[1] + env * STRIDES[4], log_probs, mask=exists)
        tl.store(outputs[3] + at * STRIDES[6] + action[None, :] * STRIDES[7], mean, mask=mask)
        if rows is not None:  # noqa: SIM102, known when the kernel is compiled
            if begins:
                looked = None
                if not_finite is not None:
                    looked = not_finite + pool_slot
                row = slot.to(tl.int64) * num_envs + env
                copy_fields(rows, row, sources, env, exists, looked, ROW_BYTES, FIELDS, LOOKED_AT, NARROW)
                store_field(rows, row, exists, 0, actions, None, ROW_BYTES, OUTPUT_FIELDS, 0)
                store_field(rows, row, exists, 0, log_probs[:, None], None, ROW_BYTES, OUTPUT_FIELDS, LENGTH)
                store_field(rows, row, exists, 0, mean, None, ROW_BYTES, OUTPUT_FIELDS, 3 * LENGTH)
    else:
        if end_rows is not None:  # noqa: SIM102
            if ends:
                store_step(
                    end_rows, end_sources, end_planes, end_plane_sources, codes, flags, pool, final_sources, pool_count,
                    final_rows, None, end_strides, env, exists, num_envs, end_slot, end_pool_slot, pool_rows,
                    END_ROW_BYTES, END_FIELDS, 0, POOL_ROW_BYTES, FINAL_FIELDS, NARROW,
                )  # fmt: skip
        x = load_input(
            critic_obs, CRITIC_STRIDES, env, env, exists, critic_moments[0], critic_moments[1], obs_clip, CRITIC_OBS,
            CRITIC[0],
        )  # fmt: skip
        # The first of the padded outputs; a sum of one number and zeros.
        values = tl.sum(forward_by_blocks(x, critic, CRITIC, ACTIVATION, PRECISION, CHUNK), 1)
        if value_moments[0] is not None:
            values = values * tl.load(value_moments[1]) + tl.load(value_moments[0])
        tl.store(outputs[2] + env * STRIDES[5], values, mask=exists)
        if rows is not None:  # noqa: SIM102
            if begins:
                row = slot.to(tl.int64) * num_envs + env
                store_field(rows, row, exists, 0, values[:, None], None, ROW_BYTES, OUTPUT_FIELDS, 2 * LENGTH)
                place_of = plane + env * plane_strides[0] + slot.to(tl.int64) * plane_strides[1]
                tl.store(place_of, values.to(plane.dtype.element_ty), mask=exists)
    if (cursor is not None) and (end_rows is not None):  # noqa: SIM102
        if ends:  # noqa: SIM102
            # The last program moves the head; all others have read it by then.
            if take_ticket(cursor + CURSOR_TICKET) == tl.num_programs(0) * 2 - 1:
                tl.store(cursor + CURSOR_APPENDED, appended + 1)
                tl.store(cursor + CURSOR_TICKET, 0)


def why_not(actor: Sequence[Tensor], critic: Sequence[Tensor], matmul: int) -> str | None:
    """Why torch has to act with these networks, or None where :func:`ppo_act` can, with each of MATMUL."""
    for name, parameters in (("actor", actor), ("critic", critic)):
        *widths, outputs = _widths(parameters)
        if max(widths) > MOST_WIDTH:
            return f"{name}: expected at most {MOST_WIDTH} inputs and units in a layer, got {max(widths)}"
        if outputs > MOST_ACTIONS:
            return f"{name}: expected at most {MOST_ACTIONS} outputs, got {outputs}"
    return None


def ppo_act(
    obs,
    critic_obs,
    noise,
    actor,
    critic,
    std,
    activation,
    matmul,
    obs_shift,
    obs_std,
    critic_shift,
    critic_std,
    obs_clip,
    value_shift,
    value_std,
    packed,
    actions,
    log_probs,
    values,
    mean,
    categories=(),
) -> None:
    """Acts for one step, see :mod:`pydrone.ops.schema`. ``packed`` is not used."""
    moments = (obs_shift, obs_std), (critic_shift, critic_std), (value_shift, value_std)
    policy = obs, critic_obs, noise, actor, critic, std, *moments, obs_clip, (actions, log_probs, values, mean)
    _launch(policy, activation, matmul, categories=categories)


def ppo_step(
    end_memory,
    end_sources,
    end_layout,
    dones,
    truncated,
    valid,
    end_slot,
    end_pool_slot,
    obs,
    critic_obs,
    noise,
    actor,
    critic,
    std,
    activation,
    matmul,
    obs_shift,
    obs_std,
    critic_shift,
    critic_std,
    obs_clip,
    value_shift,
    value_std,
    packed,
    actions,
    log_probs,
    values,
    mean,
    sigma,
    memory,
    stored_obs,
    layout,
    slot,
    pool_slot,
    cursor=None,
) -> None:
    """Ends a step, acts, and begins the next, see :mod:`pydrone.ops.schema`. ``packed`` is not used."""
    moments = (obs_shift, obs_std), (critic_shift, critic_std), (value_shift, value_std)
    outputs = actions, log_probs, values, mean
    policy = obs, critic_obs, noise, actor, critic, std, *moments, obs_clip, outputs
    end = None
    if end_layout is not None:
        end = taken_apart(end_memory, end_sources, end_layout.tolist(), dones, truncated, valid, NARROW)
    sources = [*stored_obs, *outputs[:3], mean, sigma, values]
    begin = taken_apart(memory, sources, layout.tolist(), None, None, None, NARROW)
    _launch(policy, activation, matmul, end, begin, cursor, (end_slot, end_pool_slot, slot, pool_slot))


def _launch(
    policy: tuple, activation, matmul, end=None, begin=None, cursor=None, slots=(0, 0, 0, 0), categories=()
) -> None:
    obs, critic_obs, noise, actor, critic, std, obs_moments, critic_moments, value_moments, obs_clip, outputs = policy
    num_envs, num_outputs = noise.shape
    if std is None:
        check_categories(categories, outputs[0].shape[1], num_outputs)
    if num_envs == 0:
        return
    critic_obs = critic_obs or obs
    reason = why_not(actor, critic, matmul)
    if reason is not None:
        raise RuntimeError(reason)
    widths = _widths(actor), _widths(critic)
    constants = {"END_ROW_BYTES": 1, "END_FIELDS": (), "POOL_ROW_BYTES": 1, "FINAL_FIELDS": ()}
    constants |= {"ROW_BYTES": 1, "FIELDS": (), "OUTPUT_FIELDS": (), "LOOKED_AT": 0}
    capacity, into, plane_strides = 0, (None,) * 4, None
    ended, end_strides = (None,) * 10, None
    if end is not None:
        constants |= {"END_ROW_BYTES": end.constants["ROW_BYTES"], "END_FIELDS": end.constants["FIELDS"]}
        constants |= {name: end.constants[name] for name in ("POOL_ROW_BYTES", "FINAL_FIELDS")}
        ended, end_strides = end.tensors[:10], end.strides
    if begin is not None:
        rows, sources, (plane,), *_, not_finite = begin.tensors
        capacity, plane_strides = rows.shape[0], begin.strides[1][0]
        fields, length = list(begin.constants["FIELDS"]), LENGTH.value
        at = len(fields) - 5 * length  # the outputs and sigma come last
        produced = fields[at : at + 4 * length]
        for i in (0, 3):  # actions and mean, as wide as the network's padded outputs
            produced[i * length + TILE.value] = max(16, triton.next_power_of_2(num_outputs))
        constants |= {"ROW_BYTES": begin.constants["ROW_BYTES"], "LOOKED_AT": begin.constants["LOOKED_AT"]}
        constants |= {"FIELDS": (*fields[:at], *fields[-length:]), "OUTPUT_FIELDS": tuple(produced)}
        into = rows, (*sources[:-5], sources[-1]), plane, not_finite
    with on_device_of(noise):
        step_kernel[(triton.cdiv(num_envs, ENVS), 2)](
            tuple(obs), tuple(critic_obs), noise, tuple(actor), tuple(critic), std, obs_moments, critic_moments,
            value_moments, obs_clip, outputs, *ended, end_strides, *into, plane_strides, cursor, num_envs, capacity,
            *slots, 1 if end is None else end.num_rollouts, 1 if begin is None else begin.num_rollouts,
            0 if end is None else end.pool_rows,
            OBS=tuple(x.shape[1] for x in obs), OBS_STRIDES=_strides(obs),
            CRITIC_OBS=tuple(x.shape[1] for x in critic_obs), CRITIC_STRIDES=_strides(critic_obs),
            ACTOR=widths[0], CRITIC=widths[1], STRIDES=(*noise.stride(), *(n for x in outputs for n in x.stride())),
            ACTIVATION=activation, PRECISION=PRECISIONS[MATMUL[matmul]], ENVS=ENVS,
            CHUNK=CHUNKS.get(generation(noise.device), FEWEST), NARROW=NARROW, CATEGORIES=tuple(categories),
            **constants, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def _widths(parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Of a network's input and of each layer."""
    return parameters[0].shape[1], *(weight.shape[0] for weight in parameters[::2])


def _strides(groups) -> tuple[int, ...]:
    """Of environment, nothing and column, for load_input."""
    return tuple(n for x in groups for n in (x.stride(0), 0, x.stride(1)))
