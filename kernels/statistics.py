"""Softmax statistics of the logits, tile by tile, for the policy and the reference in one launch.

The eager code it replaces, with z the logits of `HeadOptions` in units of log 2:

    e = exp2(z_tile - shift), 0 at the target
    total = e.sum(1)                                                          # [N], each tile
    spread = (e * (z_tile - shift)).sum(1)                                    # if entropy is wanted
    target_logit = logits.gather(1, targets)
    soft = e * softcap_slope                                                  # if `soft` is given
    peaks = (z_block - lse_guess).amax(0), without targets                    # if `peaks` is given

The shift is an integer, so a change of shift multiplies by a power of two: exact. The target is
left out, as a sum with it would lose the digits of 1 - p: `combine` adds it.

* bfloat16 and float32 have 8 bits of exponent. Their rows have one shift each, which is known
  before the pass (shifts.py) and may be off by 100 powers of two.
* float16 has 5. Its shift is that of a row in one part of a tile: ceil(z_part.amax(1)).

Every vocabulary tile is a unit of its own: few tokens still fill the chip, and nothing is carried
from tile to tile, which at this tile size would spill registers. A program takes one tile, or, with
a persistent tile shape, every so many-th.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.active_blocks import ActiveBlocks, active_blocks
from powerflow_fast.kernels.config import Tile, num_processors, soft_exponent
from powerflow_fast.kernels.tiles import (
    LOG2E,
    Operands,
    above_shift,
    can_describe,
    describe,
    form_logits,
    logit_form,
    multiply_transposed,
    round_to,
    split_columns,
    triton_dtype,
    walk_in_groups,
)

# Row blocks, both models counted, that walk the vocabulary together. 16 blocks of 128 rows of
# H = 4096 in bf16 are 16 MiB: they stay in L2, and each weight tile is read by all 16 at once.
GROUP = 16


@triton.jit
def write_tile(
    parts,  # PARTS pieces [BLOCK_N, PART] of a tile of hidden @ weight.T, left to right
    bias_ptr,  # [V] or None
    target,  # [BLOCK_N]
    row_shift,  # [BLOCK_N], or None: each part has its own
    tile_shift_ptr,  # [parts, rows] if row_shift is None, [tiles, rows] if there are no totals
    tile_total_ptr,  # [parts, rows] if row_shift is None, else [tiles, rows], or None
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
        tl.store(tile_shift_ptr + offs, tl.ceil(highest * LOG2E), mask=mask_n)
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
    blocks_ptr,  # [row blocks] int32, the active ones first
    count_ptr,  # [1] int32 of the active ones
    row_shift_ptr,  # [MODELS * N] row r = model * N + n, or None: each part has its own
    tile_shift_ptr,  # [parts or tiles, MODELS * N], or None, as `write_tile` says
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
        start_n = tl.load(blocks_ptr + unit // MODELS) * BLOCK_N

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
        row_shift = None
        if row_shift_ptr is not None:
            row_shift = tl.load(row_shift_ptr + offs_r, mask=mask_n, other=0.0)
        # Most tiles hold no target and end within the vocabulary: they compare nothing.
        here = mask_n & (target >= start_v) & (target < start_v + BLOCK_V)
        marked = (tl.max(here.to(tl.int32), 0) != 0) | (start_v + BLOCK_V > num_v)
        PART: tl.constexpr = BLOCK_V // PARTS
        parts = split_columns(acc, PARTS)
        for kind in tl.static_range(2):
            if marked == (kind == 1):
                write_tile(
                    parts,
                    own_bias,
                    target,
                    row_shift,
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


class Statistics(NamedTuple):
    """What the kernel leaves for `combine`; a row is one token of one model.

    Of a row with a shift of its own one number a tile, else one a part of a tile. Nothing is
    written for a block of rows of which none counts.
    """

    row_shift: torch.Tensor | None  # [rows]
    tile_shift: torch.Tensor | None  # [parts, rows], if there is no row_shift
    tile_total: torch.Tensor  # [tiles or parts, rows], targets left out
    tile_spread: torch.Tensor | None  # likewise
    target_logit: torch.Tensor  # [rows], NaN where the target is outside the vocabulary


def has_row_shift(dtype: torch.dtype) -> bool:
    """Whether the type's exponent holds softmax numerators of a shift that is far off."""
    return dtype != torch.float16


def padded_columns(num_v: int, tile: Tile) -> int:
    """Columns of the buffer of softmax numerators: every tile is stored whole."""
    return triton.cdiv(num_v, tile.columns) * tile.columns


def row_maxima(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    active: ActiveBlocks,
    options,
    tile: Tile,
    use_tma: bool,
    out: torch.Tensor | None = None,  # [tiles, models * N] to be filled
) -> torch.Tensor:
    """-> ceil of each row's largest logit in each tile, in units of log 2, [tiles, models * N]."""
    rows = targets.shape[0] * (1 + (reference is not None))
    if out is None:
        tiles = triton.cdiv(policy.weight.shape[0], tile.columns)
        out = torch.empty((tiles, rows), dtype=torch.float32, device=targets.device)
    _launch(policy, reference, targets, active, options, tile, use_tma, tile_shift=out)
    return out


def logit_statistics(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    soft: torch.Tensor | None,  # [N, padded_columns] to be filled
    options,
    tile: Tile,
    use_tma: bool,
    search=None,  # certified_triton.Search, whose peaks [row blocks, V] are to be filled
    row_shift: torch.Tensor | None = None,  # [models * N] integers; None: each part has its own
    active: ActiveBlocks | None = None,  # None: those with a row that counts
    out: Statistics | None = None,  # to be filled
) -> Statistics:
    """One launch over both models, whose shapes and dtypes must agree."""
    if active is None:
        active = active_blocks(targets, options.ignore_index, tile.rows)
    if out is None:
        rows = targets.shape[0] * (1 + (reference is not None))
        tiles = triton.cdiv(policy.weight.shape[0], tile.columns)
        parts = tiles * tile.parts if row_shift is None else tiles
        total = torch.empty((parts, rows), dtype=torch.float32, device=targets.device)
        out = Statistics(
            row_shift,
            torch.empty_like(total) if row_shift is None else None,
            total,
            torch.empty_like(total) if options.entropy else None,
            # No program owns an out-of-range target: its row stays NaN, never a plausible number.
            torch.full((rows,), float("nan"), dtype=torch.float32, device=targets.device),
        )
    written = dict(out._asdict(), soft=soft, search=search)
    _launch(policy, reference, targets, active, options, tile, use_tma, **written)
    return out


def _launch(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,
    active: ActiveBlocks,
    options,
    tile: Tile,
    use_tma: bool,
    *,
    row_shift: torch.Tensor | None = None,
    tile_shift: torch.Tensor | None = None,
    tile_total: torch.Tensor | None = None,
    tile_spread: torch.Tensor | None = None,
    target_logit: torch.Tensor | None = None,
    soft: torch.Tensor | None = None,
    search=None,
) -> None:
    hidden, weight, _ = policy
    ref_hidden, ref_weight, ref_bias = reference or policy
    models = 1 + (reference is not None)
    (num_n, num_h), num_v = hidden.shape, weight.shape[0]
    use_tma = use_tma and all(map(can_describe, (hidden, weight, ref_hidden, ref_weight)))
    soft_tma = use_tma and soft is not None and can_describe(soft)
    form = logit_form(options)
    programs = triton.cdiv(num_n, tile.rows) * models * triton.cdiv(num_v, tile.columns)
    if tile.persistent:
        programs = min(programs, num_processors(hidden.device))
    with torch.cuda.device_of(hidden):
        statistics_kernel[(programs,)](
            hidden=describe(hidden, tile.rows, tile.depth, use_tma),
            weight=describe(weight, tile.columns, tile.depth, use_tma),
            bias_ptr=policy.bias,
            ref_hidden=describe(ref_hidden, tile.rows, tile.depth, use_tma),
            ref_weight=describe(ref_weight, tile.columns, tile.depth, use_tma),
            ref_bias_ptr=ref_bias,
            targets_ptr=targets,
            blocks_ptr=active.blocks,
            count_ptr=active.count,
            row_shift_ptr=row_shift,
            tile_shift_ptr=tile_shift,
            tile_total_ptr=tile_total,
            tile_spread_ptr=tile_spread,
            target_logit_ptr=target_logit,
            soft=describe(soft, tile.rows, tile.part, soft_tma),
            peaks_ptr=search and search.peaks,
            guess_ptr=search and search.guess,
            num_n=num_n,
            num_v=num_v,
            num_h=num_h,
            stride_hn=hidden.stride(0),
            stride_hh=hidden.stride(1),
            stride_wv=weight.stride(0),
            stride_wh=weight.stride(1),
            stride_ref_hn=ref_hidden.stride(0),
            stride_ref_hh=ref_hidden.stride(1),
            stride_ref_wv=ref_weight.stride(0),
            stride_ref_wh=ref_weight.stride(1),
            stride_sn=0 if soft is None else soft.stride(0),
            scale=form.scale,
            cap=form.cap,
            ignore_index=options.ignore_index,
            MODELS=models,
            USE_TMA=use_tma,
            ROUND_TO=triton_dtype(hidden.dtype) if options.round_logits else None,
            SOFTCAP=form.softcap,
            SOFT_EXPONENT=soft_exponent(hidden.dtype),
            SOFT_TMA=soft_tma,
            GROUP=GROUP,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.columns,
            BLOCK_H=tile.depth,
            PARTS=tile.parts,
            PERSISTENT=tile.persistent,
            **tile.launch_options,
        )
