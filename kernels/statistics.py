"""Softmax statistics of the logits, tile by tile, for the policy and the reference in one launch.

The eager code it replaces, with z the logits of `HeadOptions` in units of log 2:

    shift = ceil(z_tile.amax(1)); total = exp2(z_tile - shift).sum(1)         # [N], each tile
    spread = (exp2(z_tile - shift) * (z_tile - shift)).sum(1)                 # if entropy is wanted
    target_logit = logits.gather(1, targets)
    soft = exp2(z_tile - shift) * softcap_slope, 0 at the target              # if `soft` is given
    peaks = (z_block - lse_guess).amax(0), without targets                    # if `peaks` is given

The shift is an integer, so bringing tiles to a common shift multiplies by a power of two: exact.
Every vocabulary tile is a unit of its own: few tokens still fill the chip, and nothing is carried
from tile to tile, which at this tile size would spill registers. A program takes one tile, or, with
a persistent tile shape, every so many-th.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.active_blocks import active_blocks
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
def write_statistics(
    product,  # [BLOCK_N, PART] tile of hidden @ weight.T
    bias_ptr,  # [V] or None
    target,  # [BLOCK_N]
    tile_shift_ptr,  # [parts, rows]
    tile_total_ptr,  # [parts, rows]
    tile_spread_ptr,  # [parts, rows] or None
    target_logit_ptr,  # [rows]
    soft_ptr,  # [N, parts * PART] or None
    peaks_ptr,  # [V] float16 of this block of rows, or None
    guess,  # [BLOCK_N] rough log-sum-exp, in units of log 2; +inf on rows that do not count
    peaks_v,  # V, or 0 if these rows write no peaks
    start_v,
    offs_n,
    offs_r,
    mask_n,
    mask_soft,
    num_v,
    num_rows,
    stride_sn,
    scale,
    cap,
    ROUND_TO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SOFT_EXPONENT: tl.constexpr,
    PART: tl.constexpr,
):
    offs_v = start_v + tl.arange(0, PART)
    logits, slope = form_logits(
        product, bias_ptr, offs_v, offs_v < num_v, scale, cap, ROUND_TO, SOFTCAP
    )
    is_target = offs_v[None, :] == target[:, None]
    target_here = (target >= start_v) & (target < min(start_v + PART, num_v))
    target_logit = tl.sum(tl.where(is_target, logits, 0.0), 1)
    tl.store(target_logit_ptr + offs_r, target_logit, mask=mask_n & target_here)

    shift = tl.ceil(tl.max(logits, 1) * LOG2E)
    # A tile of -inf alone has shift -inf and total 0; subtracting that shift would give NaN.
    centred = above_shift(logits, tl.where(shift == float("-inf"), 0.0, shift)[:, None])
    soft = tl.exp2(centred)
    # The part's index is a product with the row count: int64, as V / PART * rows can be large.
    offs = (start_v // PART).to(tl.int64) * num_rows + offs_r
    tl.store(tile_shift_ptr + offs, shift, mask=mask_n)
    tl.store(tile_total_ptr + offs, tl.sum(soft, 1), mask=mask_n)
    if tile_spread_ptr is not None:
        spread = tl.sum(tl.where(soft == 0, 0.0, soft * centred), 1)  # 0 * -inf counts as 0
        tl.store(tile_spread_ptr + offs, spread, mask=mask_n)
    if peaks_ptr is not None:
        above = tl.where(is_target, float("-inf"), above_shift(logits, guess[:, None]))
        tl.store(peaks_ptr + offs_v, tl.max(above, 0).to(tl.float16), mask=offs_v < peaks_v)
    if soft_ptr is not None:
        # The target's column is left out: it enters the direction as 1 - p in float32, which a
        # confident policy needs, as 1 minus a rounded p would lose it.
        if SOFT_EXPONENT != 0:
            soft *= 2.0**SOFT_EXPONENT
        soft = tl.where(is_target, 0.0, soft * slope)
        soft_ptrs = soft_ptr + offs_n.to(tl.int64)[:, None] * stride_sn + offs_v[None, :]
        tl.store(soft_ptrs, round_to(soft, soft_ptr.dtype.element_ty), mask=mask_soft[:, None])


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
    tile_shift_ptr,  # [parts, MODELS * N] row r = model * N + n
    tile_total_ptr,  # [parts, MODELS * N]
    tile_spread_ptr,  # [parts, MODELS * N] or None
    target_logit_ptr,  # [MODELS * N]
    soft_ptr,  # [N, parts * part] or None, of the policy
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
    for program in tl.range(first, stop, step, flatten=PERSISTENT):
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
        mask_soft = offs_n < num_n * (1 - model)  # the policy's rows alone
        num_rows = num_n * MODELS
        guess = 0.0
        own_peaks = peaks_ptr
        if peaks_ptr is not None:
            own_peaks += (start_n // BLOCK_N).to(tl.int64) * num_v
            guess = tl.load(guess_ptr + offs_n, mask=mask_n, other=0.0) * LOG2E
            guess = tl.where(mask_n & (target != ignore_index), guess, float("inf"))
        PART: tl.constexpr = BLOCK_V // PARTS
        parts = split_columns(acc, PARTS)
        for index in tl.static_range(PARTS):
            write_statistics(
                parts[index],
                own_bias,
                target,
                tile_shift_ptr,
                tile_total_ptr,
                tile_spread_ptr,
                target_logit_ptr,
                soft_ptr,
                own_peaks,
                guess,
                num_v * (1 - model),
                start_v + index * PART,
                offs_n,
                offs_r,
                mask_n,
                mask_soft,
                num_v,
                num_rows,
                stride_sn,
                scale,
                cap,
                ROUND_TO,
                SOFTCAP,
                SOFT_EXPONENT,
                PART,
            )


class Statistics(NamedTuple):
    """What the kernel leaves for `combine`; a row is one token of one model.

    Nothing is written for a block of rows of which none counts.
    """

    tile_shift: torch.Tensor  # [parts, rows]
    tile_total: torch.Tensor  # [parts, rows]
    tile_spread: torch.Tensor | None  # [parts, rows]
    target_logit: torch.Tensor  # [rows], NaN where the target is outside the vocabulary


def _allocate(parts: int, rows: int, entropy: bool, device: torch.device) -> Statistics:
    tile_shift = torch.empty((parts, rows), dtype=torch.float32, device=device)
    return Statistics(
        tile_shift,
        torch.empty_like(tile_shift),
        torch.empty_like(tile_shift) if entropy else None,
        # No program owns an out-of-range target: its row stays NaN, never a plausible number.
        torch.full((rows,), float("nan"), dtype=torch.float32, device=device),
    )


def padded_columns(num_v: int, tile: Tile) -> int:
    """Columns of the buffer of softmax numerators: every tile is stored whole."""
    return triton.cdiv(num_v, tile.columns) * tile.columns


def logit_statistics(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    soft: torch.Tensor | None,  # [N, padded_columns] to be filled
    options,
    tile: Tile,
    use_tma: bool,
    search=None,  # certified_triton.Search, whose peaks [row blocks, V] are to be filled
) -> Statistics:
    """One launch over both models, whose shapes and dtypes must agree."""
    hidden, weight, _ = policy
    ref_hidden, ref_weight, ref_bias = reference or policy
    models = 1 + (reference is not None)
    (num_n, num_h), num_v = hidden.shape, weight.shape[0]
    num_tiles = triton.cdiv(num_v, tile.columns)
    out = _allocate(num_tiles * tile.parts, models * num_n, options.entropy, hidden.device)
    use_tma = use_tma and all(map(can_describe, (hidden, weight, ref_hidden, ref_weight)))
    form = logit_form(options)
    active = active_blocks(targets, options.ignore_index, tile.rows)
    programs = triton.cdiv(num_n, tile.rows) * models * num_tiles
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
            tile_shift_ptr=out.tile_shift,
            tile_total_ptr=out.tile_total,
            tile_spread_ptr=out.tile_spread,
            target_logit_ptr=out.target_logit,
            soft_ptr=soft,
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
            GROUP=GROUP,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.columns,
            BLOCK_H=tile.depth,
            PARTS=tile.parts,
            PERSISTENT=tile.persistent,
            **tile.launch_options,
        )
    return out
