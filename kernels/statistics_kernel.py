"""The kernel of statistics.py: one tile of logits after another, and what is kept of each."""

from __future__ import annotations

import triton
import triton.language as tl

from powerflow_fast.kernels.tiles import (
    LOG2E,
    above_shift,
    form_logits,
    multiply_transposed,
    round_to,
    select,
    split_columns,
    tile_is_marked,
    walk_in_groups,
)


@triton.jit
def write_tile(
    parts,  # PARTS pieces [BLOCK_N, PART] of a tile of hidden @ weight.T, left to right
    bias_ptr,  # [V] or None
    target,  # [BLOCK_N]
    row_shift,  # [BLOCK_N], or None: each part has its own
    highest_ptr,  # [rows] raised to the row's largest logit, or None
    wanted,  # [BLOCK_N] rows of which it is
    out,  # Statistics, to be filled unless highest_ptr is given
    soft,  # [N, tiles * columns] pointer, or tensor descriptor if SOFT_TMA, or None
    stride_sn,
    soft_n,  # rows that store `soft`: N, or 0
    peaks_ptr,  # [V] float16 of this block of rows, or None
    guess,  # [BLOCK_N] rough log-sum-exp, in units of log 2; +inf on rows that do not count
    peaks_v,  # V, or 0 if these rows write no peaks
    start_n,
    start_v,
    offs_n,
    offs_r,
    mask_n,
    num_v,
    num_rows,
    form,
    MARKED: tl.constexpr,  # whether the tile may hold targets, or end past the vocabulary
    ROUND_TO: tl.constexpr,
    SOFT_EXPONENT: tl.constexpr,
    SOFT_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    total = tl.zeros([BLOCK_N], tl.float32)
    spread = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for index in tl.static_range(PARTS):
        start = start_v + index * PART
        offs_v = start + tl.arange(0, PART)
        mask_v = offs_v < num_v if MARKED else None
        logits, slope = form_logits(parts[index], bias_ptr, offs_v, mask_v, form, ROUND_TO)
        if highest_ptr is not None:
            highest = tl.maximum(highest, tl.max(logits, 1))
        else:
            shift = row_shift
            if row_shift is None:
                shift = tl.ceil(tl.max(logits, 1) * LOG2E)
            # A part of -inf alone has shift -inf and total 0; that shift taken off would give NaN.
            finite_shift = tl.where(shift == float("-inf"), 0.0, shift)
            centred = above_shift(logits, finite_shift[:, None])
            soft_part = tl.exp2(centred)
            if MARKED:
                is_target = offs_v[None, :] == target[:, None]
                here = (target >= start) & (target < min(start + PART, num_v))
                target_logit = tl.sum(tl.where(is_target, logits, 0.0), 1)
                tl.store(out.target_logit + offs_r, target_logit, mask=mask_n & here)
                soft_part = tl.where(is_target, 0.0, soft_part)
            part_total = tl.sum(soft_part, 1)
            total += part_total
            if out.tile_spread is not None:
                # 0 * -inf counts as 0
                part_spread = tl.sum(tl.where(soft_part == 0, 0.0, soft_part * centred), 1)
                spread += part_spread
            if row_shift is None:
                # A product with the row count: int64, as V / PART * rows can be large.
                offs = (start // PART).to(tl.int64) * num_rows + offs_r
                tl.store(out.tile_shift + offs, shift, mask=mask_n)
                tl.store(out.tile_total + offs, part_total, mask=mask_n)
                if out.tile_spread is not None:
                    tl.store(out.tile_spread + offs, part_spread, mask=mask_n)
            if peaks_ptr is not None:
                above = above_shift(logits, guess[:, None])
                if MARKED:
                    above = tl.where(is_target, float("-inf"), above)
                tl.store(peaks_ptr + offs_v, tl.max(above, 0).to(tl.float16), mask=offs_v < peaks_v)
            if soft is not None:
                if SOFT_EXPONENT != 0:
                    soft_part *= 2.0**SOFT_EXPONENT
                soft_part *= slope
                if SOFT_TMA:
                    if soft_n != 0:
                        soft.store([start_n, start], round_to(soft_part, soft.dtype))
                else:
                    rows_soft = soft + offs_n.to(tl.int64)[:, None] * stride_sn
                    tl.store(
                        rows_soft + offs_v[None, :],
                        round_to(soft_part, soft.dtype.element_ty),
                        mask=(offs_n < soft_n)[:, None],
                    )
    offs = (start_v // (PARTS * PART)).to(tl.int64) * num_rows + offs_r
    if highest_ptr is not None:
        # + 0: of the zeros, atomic_max may take -0 for less than -inf.
        highest = tl.ceil(highest * LOG2E) + 0.0
        tl.atomic_max(highest_ptr + offs_r, highest, mask=wanted, sem="relaxed")
    elif row_shift is not None:
        tl.store(out.tile_total + offs, total, mask=mask_n)
        if out.tile_spread is not None:
            tl.store(out.tile_spread + offs, spread, mask=mask_n)


@triton.jit
def statistics_kernel(
    hidden,  # [N, H] pointer, or tensor descriptor if USE_TMA
    weight,  # [V, H] likewise
    bias_ptr,  # [V] or None
    strides,  # of hidden, of weight
    ref_hidden,  # [N, H] as hidden; unused if MODELS == 1
    ref_weight,  # [V, H]
    ref_bias_ptr,  # [V] or None, as bias
    ref_strides,
    targets_ptr,  # [N]
    active,  # ActiveBlocks; blocks below 0 are passed by, if the tile is persistent
    highest_ptr,  # [MODELS * N] row r = model * N + n, as `write_tile` says
    wanted_ptr,  # [MODELS * N] int32: rows with a 0 are left as they are; None: all are wanted
    out,  # Statistics, as `write_tile` says
    soft,  # [N, tiles * columns] of the policy: pointer, or descriptor if SOFT_TMA, or None
    stride_sn,
    search,  # Search, of the policy, or None
    num_n,
    num_v,
    num_h,
    form,
    ignore_index,
    MODELS: tl.constexpr,
    USE_TMA: tl.constexpr,
    ROUND_TO: tl.constexpr,
    SOFT_EXPONENT: tl.constexpr,
    SOFT_TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    num_units = tl.load(active.count) * MODELS
    num_tiles = tl.cdiv(num_v, BLOCK_V)
    first = tl.program_id(0)
    if first >= num_units * num_tiles:
        return
    stop = num_units * num_tiles if PERSISTENT else first + 1
    step = tl.num_programs(0) if PERSISTENT else 1
    for program in tl.range(first, stop, step):
        # A group of row blocks walks the vocabulary; policy and reference of one block are
        # neighbours, so that a shared weight tile is read from memory once.
        unit, tile_v = walk_in_groups(program, num_units, num_tiles, GROUP)
        start_v = tile_v * BLOCK_V
        model = unit % MODELS
        block = tl.load(active.blocks + unit // MODELS)
        start_n = block * BLOCK_N
        listed = block >= 0 if PERSISTENT else True
        if listed:
            # Names of their own: what a loop assigns to is carried from tile to tile.
            own_hidden, own_weight, own_bias = hidden, weight, bias_ptr
            own_strides = strides
            if MODELS == 2:
                own_strides = select(model == 1, ref_strides, strides)
                if model == 1:
                    own_hidden = ref_hidden
                    own_weight = ref_weight
                    if bias_ptr is not None:
                        own_bias = ref_bias_ptr

            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < num_n
            offs_v = start_v + tl.arange(0, BLOCK_V)
            acc = multiply_transposed(
                own_hidden,
                own_weight,
                start_n,
                start_v,
                offs_v,
                offs_v < num_v,
                num_n,
                num_h,
                own_strides,
                USE_TMA,
                BLOCK_N,
                BLOCK_V,
                BLOCK_H,
            )
            target = tl.load(targets_ptr + offs_n, mask=mask_n, other=ignore_index)
            offs_r = model * num_n + offs_n
            guess = 0.0
            own_peaks = None
            if search is not None:
                own_peaks = search.peaks + block.to(tl.int64) * num_v
                guess = tl.load(search.guess + offs_n, mask=mask_n, other=0.0) * LOG2E
                guess = tl.where(mask_n & (target != ignore_index), guess, float("inf"))
            wanted = mask_n
            if wanted_ptr is not None:
                wanted &= tl.load(wanted_ptr + offs_r, mask=mask_n, other=0) != 0
            row_shift = None
            if out.row_shift is not None:
                row_shift = tl.load(out.row_shift + offs_r, mask=mask_n, other=0.0)
            marked = tile_is_marked(target, mask_n, start_v, num_v, BLOCK_V)
            parts = split_columns(acc, PARTS)
            for kind in tl.static_range(2):
                if marked == (kind == 1):
                    write_tile(
                        parts,
                        own_bias,
                        target,
                        row_shift,
                        highest_ptr,
                        wanted,
                        out,
                        soft,
                        stride_sn,
                        num_n * (1 - model),  # of `soft`: the policy's rows alone
                        own_peaks,
                        guess,
                        num_v * (1 - model),
                        start_n,
                        start_v,
                        offs_n,
                        offs_r,
                        mask_n,
                        num_v,
                        num_n * MODELS,
                        form,
                        kind == 1,
                        ROUND_TO,
                        SOFT_EXPONENT,
                        SOFT_TMA,
                        BLOCK_N,
                        BLOCK_V // PARTS,
                        PARTS,
                    )
