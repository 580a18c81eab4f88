"""The kernel of statistics.py: tiles of logits, one after another, and what each leaves."""

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
    place,  # first row and column of the tile; [BLOCK_N] each: token, row, whether there is one
    row,  # [BLOCK_N] each: target, estimate of the log-sum-exp in units of log 2
    row_shift,  # [BLOCK_N], or None: each part has its own
    highest_ptr,  # [rows] raised to the row's largest logit, or None
    wanted,  # [BLOCK_N] rows whose largest logit is wanted
    out,  # Statistics, to be filled unless the largest logits are
    exp_logits,  # [N, tiles * columns] pointer, or tensor descriptor if STORE_TMA, or None
    stride_en,
    column_max_ptr,  # [V] float16 of this block of rows, or None
    sizes,  # V, rows; rows that store exp_logits: N or 0; columns whose maximum is: V or 0
    form,
    MARKED: tl.constexpr,  # whether the tile may hold targets, or end past the vocabulary
    ROUND_TO: tl.constexpr,
    STORED_EXPONENT: tl.constexpr,
    STORE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    start_n, start_v, offs_n, offs_r, mask_n = place
    target, lse_estimate = row
    num_v, num_rows, exp_rows, column_max_v = sizes
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted_sum = tl.zeros([BLOCK_N], tl.float32)
    row_highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for index in tl.static_range(PARTS):
        start = start_v + index * PART
        offs_v = start + tl.arange(0, PART)
        mask_v = offs_v < num_v if MARKED else None
        logits, slope = form_logits(parts[index], bias_ptr, offs_v, mask_v, form, ROUND_TO)
        if highest_ptr is not None:
            row_highest = tl.maximum(row_highest, tl.max(logits, 1))
        else:
            shift = row_shift
            if row_shift is None:
                shift = tl.ceil(tl.max(logits, 1) * LOG2E)
            # A part of -inf alone has shift -inf and total 0; that shift taken off would give NaN.
            finite_shift = tl.where(shift == float("-inf"), 0.0, shift)
            centred = above_shift(logits, finite_shift[:, None])
            exp_part = tl.exp2(centred)
            if MARKED:
                is_target = offs_v[None, :] == target[:, None]
                here = (target >= start) & (target < min(start + PART, num_v))
                target_logit = tl.sum(tl.where(is_target, logits, 0.0), 1)
                tl.store(out.target_logit + offs_r, target_logit, mask=mask_n & here)
                exp_part = tl.where(is_target, 0.0, exp_part)
            part_total = tl.sum(exp_part, 1)
            total += part_total
            if out.tile_weighted_sum is not None:
                # 0 * -inf counts as 0
                part_weighted_sum = tl.sum(tl.where(exp_part == 0, 0.0, exp_part * centred), 1)
                weighted_sum += part_weighted_sum
            if row_shift is None:
                # A product with the row count: int64, as V / PART * rows can be large.
                offs = (start // PART).to(tl.int64) * num_rows + offs_r
                tl.store(out.tile_shift + offs, shift, mask=mask_n)
                tl.store(out.tile_total + offs, part_total, mask=mask_n)
                if out.tile_weighted_sum is not None:
                    tl.store(out.tile_weighted_sum + offs, part_weighted_sum, mask=mask_n)
            if column_max_ptr is not None:
                above = above_shift(logits, lse_estimate[:, None])
                if MARKED:
                    above = tl.where(is_target, float("-inf"), above)
                tl.store(
                    column_max_ptr + offs_v,
                    tl.max(above, 0).to(tl.float16),
                    mask=offs_v < column_max_v,
                )
            if exp_logits is not None:
                if STORED_EXPONENT != 0:
                    exp_part *= 2.0**STORED_EXPONENT
                exp_part *= slope
                if STORE_TMA:
                    if exp_rows != 0:
                        exp_logits.store([start_n, start], round_to(exp_part, exp_logits.dtype))
                else:
                    rows_exp = exp_logits + offs_n.to(tl.int64)[:, None] * stride_en
                    tl.store(
                        rows_exp + offs_v[None, :],
                        round_to(exp_part, exp_logits.dtype.element_ty),
                        mask=(offs_n < exp_rows)[:, None],
                    )
    offs = (start_v // (PARTS * PART)).to(tl.int64) * num_rows + offs_r
    if highest_ptr is not None:
        # + 0: of the zeros, atomic_max may take -0 for less than -inf.
        row_highest = tl.ceil(row_highest * LOG2E) + 0.0
        tl.atomic_max(highest_ptr + offs_r, row_highest, mask=wanted, sem="relaxed")
    elif row_shift is not None:
        tl.store(out.tile_total + offs, total, mask=mask_n)
        if out.tile_weighted_sum is not None:
            tl.store(out.tile_weighted_sum + offs, weighted_sum, mask=mask_n)


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
    exp_logits,  # [N, tiles * columns] of the policy: pointer, or descriptor if STORE_TMA, or None
    stride_en,
    search,  # Search, of the policy, or None
    num_n,
    num_v,
    num_h,
    form,
    ignore_index,
    MODELS: tl.constexpr,
    USE_TMA: tl.constexpr,
    ROUND_TO: tl.constexpr,
    STORED_EXPONENT: tl.constexpr,
    STORE_TMA: tl.constexpr,
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
        # Policy and reference of a row block are neighbours: a shared weight tile is read once.
        unit, tile_v = walk_in_groups(program, num_units, num_tiles, GROUP)
        start_v = tile_v * BLOCK_V
        model = unit % MODELS
        block = tl.load(active.blocks + unit // MODELS)
        start_n = block * BLOCK_N
        listed = block >= 0 if PERSISTENT else True
        if listed:
            # Names apart: what a loop assigns to is carried from tile to tile.
            model_hidden, model_weight, model_bias = hidden, weight, bias_ptr
            model_strides = strides
            if MODELS == 2:
                model_strides = select(model == 1, ref_strides, strides)
                if model == 1:
                    model_hidden = ref_hidden
                    model_weight = ref_weight
                    if bias_ptr is not None:
                        model_bias = ref_bias_ptr
            offs_n = start_n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < num_n
            offs_v = start_v + tl.arange(0, BLOCK_V)
            acc = multiply_transposed(
                model_hidden,
                model_weight,
                start_n,
                start_v,
                offs_v,
                offs_v < num_v,
                num_n,
                num_h,
                model_strides,
                USE_TMA,
                BLOCK_N,
                BLOCK_V,
                BLOCK_H,
            )
            target = tl.load(targets_ptr + offs_n, mask=mask_n, other=ignore_index)
            offs_r = model * num_n + offs_n
            lse_estimate = 0.0
            block_column_max = None
            if search is not None:
                block_column_max = search.column_max + block.to(tl.int64) * num_v
                lse_estimate = tl.load(search.lse_estimate + offs_n, mask=mask_n, other=0.0) * LOG2E
                counted = mask_n & (target != ignore_index)
                lse_estimate = tl.where(counted, lse_estimate, float("inf"))
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
                        model_bias,
                        (start_n, start_v, offs_n, offs_r, mask_n),
                        (target, lse_estimate),
                        row_shift,
                        highest_ptr,
                        wanted,
                        out,
                        exp_logits,
                        stride_en,
                        block_column_max,
                        # Of exp_logits and column maxima the policy's rows alone.
                        (num_v, num_n * MODELS, num_n * (1 - model), num_v * (1 - model)),
                        form,
                        kind == 1,
                        ROUND_TO,
                        STORED_EXPONENT,
                        STORE_TMA,
                        BLOCK_N,
                        BLOCK_V // PARTS,
                        PARTS,
                    )
