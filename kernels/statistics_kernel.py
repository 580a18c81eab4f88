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
    highest_ptr,  # [rows] raised to the row's largest logit, if there are no totals
    wanted,  # [BLOCK_N] rows of which it is
    tile_shift_ptr,  # [parts, rows] if row_shift is None
    tile_total_ptr,  # [parts, rows] if row_shift is None, else [tiles, rows]; None: highest alone
    tile_spread_ptr,  # likewise, or None
    target_logit_ptr,  # [rows]
    soft,  # [N, tiles * BLOCK_V] pointer, or tensor descriptor if SOFT_TMA, or None
    peaks_ptr,  # [V] float16 of this block of rows, or None
    guess,  # [BLOCK_N] rough log-sum-exp, in units of log 2; +inf on rows that do not count
    peaks_v,  # V, or 0 if these rows write no peaks
    start_n,
    start_v,
    offs_n,
    offs_r,
    mask_n,
    soft_n,  # rows that store `soft`: N, or 0
    num_v,
    num_rows,
    stride_sn,
    scale,
    cap,
    MARKED: tl.constexpr,  # whether the tile may hold targets, or end past the vocabulary
    ROUND_TO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SOFT_EXPONENT: tl.constexpr,
    SOFT_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    total = tl.zeros([BLOCK_N], tl.float32)
    spread = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for index in tl.static_range(PARTS):
        start = start_v + index * PART
        offs_v = start + tl.arange(0, PART)
        mask_v = offs_v < num_v if MARKED else None
        logits, slope = form_logits(
            parts[index], bias_ptr, offs_v, mask_v, scale, cap, ROUND_TO, SOFTCAP
        )
        if tile_total_ptr is None:
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
                tl.store(target_logit_ptr + offs_r, target_logit, mask=mask_n & here)
                soft_part = tl.where(is_target, 0.0, soft_part)
            part_total = tl.sum(soft_part, 1)
            total += part_total
            if tile_spread_ptr is not None:
                # 0 * -inf counts as 0
                part_spread = tl.sum(tl.where(soft_part == 0, 0.0, soft_part * centred), 1)
                spread += part_spread
            if row_shift is None:
                # A product with the row count: int64, as V / PART * rows can be large.
                offs = (start // PART).to(tl.int64) * num_rows + offs_r
                tl.store(tile_shift_ptr + offs, shift, mask=mask_n)
                tl.store(tile_total_ptr + offs, part_total, mask=mask_n)
                if tile_spread_ptr is not None:
                    tl.store(tile_spread_ptr + offs, part_spread, mask=mask_n)
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
    if tile_total_ptr is None:
        # + 0: of the zeros, atomic_max may take -0 for less than -inf.
        tl.atomic_max(highest_ptr + offs_r, tl.ceil(highest * LOG2E) + 0.0, mask=wanted)
    elif row_shift is not None:
        tl.store(tile_total_ptr + offs, total, mask=mask_n)
        if tile_spread_ptr is not None:
            tl.store(tile_spread_ptr + offs, spread, mask=mask_n)


@triton.jit
def statistics_kernel(
    hidden,  # [N, H] pointer, or tensor descriptor if USE_TMA
    weight,  # [V, H] likewise
    bias_ptr,  # [V] or None
    ref_hidden,  # [N, H] as hidden; unused if MODELS == 1
    ref_weight,  # [V, H]
    ref_bias_ptr,  # [V] or None, as bias
    targets_ptr,  # [N]
    blocks_ptr,  # [row blocks] int32; below 0: passed by, if PERSISTENT
    count_ptr,  # [1] int32 of the blocks that are looked at
    row_shift_ptr,  # [MODELS * N] row r = model * N + n, or None: each part has its own
    highest_ptr,  # likewise, as `write_tile` says
    wanted_ptr,  # [MODELS * N] int32: rows with a 0 are left as they are; None: all are wanted
    tile_shift_ptr,  # [parts, MODELS * N], or None, as `write_tile` says
    tile_total_ptr,  # likewise
    tile_spread_ptr,  # likewise
    target_logit_ptr,  # [MODELS * N]
    soft,  # [N, tiles * BLOCK_V] of the policy: pointer, or descriptor if SOFT_TMA, or None
    peaks_ptr,  # [row blocks, V] float16 or None, of the policy
    guess_ptr,  # [N] rough log-sum-exp of the logits, if peaks_ptr is given
    num_n,
    num_v,
    num_h,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    stride_ref_hn,
    stride_ref_hh,
    stride_ref_wv,
    stride_ref_wh,
    stride_sn,
    scale,
    cap,
    ignore_index,
    MODELS: tl.constexpr,
    USE_TMA: tl.constexpr,
    ROUND_TO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SOFT_EXPONENT: tl.constexpr,
    SOFT_TMA: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    num_units = tl.load(count_ptr) * MODELS
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
        block = tl.load(blocks_ptr + unit // MODELS)
        start_n = block * BLOCK_N
        if block >= 0 if PERSISTENT else True:
            # Names of their own: what a loop assigns to is carried from tile to tile.
            own_hidden, own_weight, own_bias = hidden, weight, bias_ptr
            own_hn, own_hh, own_wv, own_wh = stride_hn, stride_hh, stride_wv, stride_wh
            if MODELS == 2:
                own_hn = tl.where(model == 1, stride_ref_hn, stride_hn)
                own_hh = tl.where(model == 1, stride_ref_hh, stride_hh)
                own_wv = tl.where(model == 1, stride_ref_wv, stride_wv)
                own_wh = tl.where(model == 1, stride_ref_wh, stride_wh)
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
                own_hn,
                own_hh,
                own_wv,
                own_wh,
                USE_TMA,
                BLOCK_N,
                BLOCK_V,
                BLOCK_H,
            )
            target = tl.load(targets_ptr + offs_n, mask=mask_n, other=ignore_index)
            offs_r = model * num_n + offs_n
            soft_n = num_n * (1 - model)  # the policy's rows alone
            num_rows = num_n * MODELS
            guess = 0.0
            own_peaks = peaks_ptr
            if peaks_ptr is not None:
                own_peaks += (start_n // BLOCK_N).to(tl.int64) * num_v
                guess = tl.load(guess_ptr + offs_n, mask=mask_n, other=0.0) * LOG2E
                guess = tl.where(mask_n & (target != ignore_index), guess, float("inf"))
            wanted = mask_n
            if wanted_ptr is not None:
                wanted &= tl.load(wanted_ptr + offs_r, mask=mask_n, other=0) != 0
            row_shift = None
            if row_shift_ptr is not None:
                row_shift = tl.load(row_shift_ptr + offs_r, mask=mask_n, other=0.0)
            marked = tile_is_marked(target, mask_n, start_v, num_v, BLOCK_V)
            PART: tl.constexpr = BLOCK_V // PARTS
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
                        tile_shift_ptr,
                        tile_total_ptr,
                        tile_spread_ptr,
                        target_logit_ptr,
                        soft,
                        own_peaks,
                        guess,
                        num_v * (1 - model),
                        start_n,
                        start_v,
                        offs_n,
                        offs_r,
                        mask_n,
                        soft_n,
                        num_v,
                        num_rows,
                        stride_sn,
                        scale,
                        cap,
                        kind == 1,
                        ROUND_TO,
                        SOFTCAP,
                        SOFT_EXPONENT,
                        SOFT_TMA,
                        BLOCK_N,
                        PARTS,
                        PART,
                    )
