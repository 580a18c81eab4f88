"""The unit gradient d logps / d hidden where the vendor's product does not serve.

The eager code it replaces, with p the softmax and J the softcap's slope:

    unit_gradient = dlogit_dproduct * (J_y * weight[y] - (p * J) @ weight)    # [N, H]

`exp_logits` holds p * J but for a factor. In float16 each part of a row is relative to that part's
shift. A multiplication by a power of two brings it to the row's shift on its way into the matrix
unit. (On Hopper, Triton waits for that unit at every such step.) The target's column is absent, so
weight[y] enters once, with J_y * (1 - p_y) in float32.

On the certified route `exp_logits` holds p * J of the columns that each block of rows keeps, and
the kernel gathers those rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.active_blocks import ActiveBlocks, active_blocks
from powerflow_fast.kernels.config import GROUP, ceil_div, stored_exponent
from powerflow_fast.kernels.statistics import Heads
from powerflow_fast.kernels.tiles import (
    as_factor,
    can_describe,
    describe,
    logit_form,
    round_to,
    split_columns,
    walk_in_groups,
    write_idle_zeros,
)


@triton.jit
def at_targets(
    weight_ptr,  # [V, H]
    rows,  # TargetRows
    offs_n,
    mask_n,
    num_v,
    stride_wv,
    form,
    ignore_index,
):
    """-> of each row: target, (1 - p) J, pointer to weight[target], whether there is such a row.

    Where a target is outside the vocabulary 1 - p is NaN, so the gradient is: nothing is read.
    """
    target = tl.load(rows.targets + offs_n, mask=mask_n, other=ignore_index)
    slope = tl.load(rows.one_minus_p + offs_n, mask=mask_n, other=0.0)
    if form.cap is not None:
        capped = tl.load(rows.target_logit + offs_n, mask=mask_n, other=0.0) / form.cap
        slope *= 1.0 - capped * capped
    inside = mask_n & (target >= 0) & (target < num_v)
    return target, slope, weight_ptr + tl.where(inside, target, 0) * stride_wv, inside


@triton.jit
def write_unit_gradient(
    mean,  # [BLOCK_N, WIDTH] tile of exp_logits @ weight
    rows_y,  # [BLOCK_N] pointers to the rows weight[target]
    rows_out,  # [BLOCK_N] pointers to the rows of unit gradient
    factor_y,  # [BLOCK_N]
    factor_mean,  # [BLOCK_N]
    counted,  # [BLOCK_N]
    inside,
    mask_n,
    start_h,
    num_h,
    stride_wh,
    WIDTH: tl.constexpr,
):
    offs_h = start_h + tl.arange(0, WIDTH)
    mask_h = offs_h < num_h
    tile_y = tl.load(
        rows_y[:, None] + offs_h.to(tl.int64)[None, :] * stride_wh,
        mask=inside[:, None] & mask_h[None, :],
        other=0.0,
    )
    result = tile_y.to(tl.float32) * factor_y[:, None] - mean * factor_mean[:, None]
    result = tl.where(counted[:, None], result, 0.0)
    result = round_to(result, rows_out.dtype.element_ty)
    tl.store(rows_out[:, None] + offs_h[None, :], result, mask=mask_n[:, None] & mask_h[None, :])


@triton.jit
def unit_gradient_kernel(
    exp_logits,  # [N, columns] pointer, or tensor descriptor if USE_TMA
    stride_en,
    weight,  # [V, H] likewise
    weight_ptr,  # [V, H] the rows of the targets are gathered from here
    stride_wv,
    stride_wh,
    rows,  # TargetRows
    active,  # ActiveBlocks
    shifts,  # Shifts, or None: `exp_logits` is relative to the row's total already
    kept,  # Kept columns, for which alone `exp_logits` stands, or None: all
    most,  # columns of a row of kept.columns
    unit_gradient_ptr,  # [N, H] contiguous
    num_n,
    num_v,
    num_h,
    num_rows,  # of the shifts
    form,
    stored_scale,
    ignore_index,
    USE_TMA: tl.constexpr,
    PART: tl.constexpr,  # columns that share a shift
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    # Groups of row blocks share each column block of the weight through L2.
    program = tl.program_id(0)
    num_blocks = tl.load(active.count)
    num_columns = tl.cdiv(num_h, BLOCK_H)
    idle = program - num_blocks * num_columns
    if idle >= 0:
        write_idle_zeros(
            unit_gradient_ptr,
            num_h,
            active.blocks,
            num_blocks,
            idle,
            num_n,
            num_h,
            BLOCK_N,
            BLOCK_H,
        )
        return
    position, column = walk_in_groups(program, num_blocks, num_columns, GROUP)
    start_n = tl.load(active.blocks + position) * BLOCK_N
    start_h = column * BLOCK_H

    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_h = start_h + tl.arange(0, BLOCK_H)
    offs_v = tl.arange(0, BLOCK_V)
    mask_n = offs_n < num_n
    mask_h = offs_h < num_h
    if shifts is not None:
        row_shift = tl.load(shifts.row_shift + offs_n, mask=mask_n, other=0.0)
        total = tl.load(shifts.row_total + offs_n, mask=mask_n, other=1.0)
    else:
        total = tl.full([BLOCK_N], 1.0, tl.float32)
    num_kept = num_v
    if kept is not None:
        num_kept = tl.load(kept.counts + start_n // BLOCK_N)
        block_columns = kept.columns + (start_n // BLOCK_N).to(tl.int64) * most

    acc = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for step in range(tl.cdiv(num_kept, BLOCK_V)):
        start_v = step * BLOCK_V
        if USE_TMA:
            tile_e = exp_logits.load([start_n, start_v])
            tile_w = weight.load([start_v, start_h])
        else:
            offs = start_v + offs_v
            mask_v = offs < num_kept
            rows_e = exp_logits + offs_n.to(tl.int64)[:, None] * stride_en
            tile_e = tl.load(rows_e + offs[None, :], mask=mask_n[:, None], other=0.0)
            if kept is not None:
                offs = tl.load(block_columns + offs, mask=mask_v, other=0)
            rows_w = weight + offs.to(tl.int64)[:, None] * stride_wv
            tile_w = tl.load(
                rows_w + offs_h.to(tl.int64)[None, :] * stride_wh,
                mask=mask_v[:, None] & mask_h[None, :],
                other=0.0,
            )
        tile_e = as_factor(tile_e)
        if shifts is not None:
            part = (start_v // PART).to(tl.int64)
            shift = tl.load(shifts.tile_shift + part * num_rows + offs_n, mask=mask_n, other=0.0)
            # In float32: the factor itself may be below float16's smallest number.
            scaled = tile_e.to(tl.float32) * tl.exp2(shift - row_shift)[:, None]
            tile_e = round_to(scaled, tile_e.dtype)
        acc = tl.dot(tile_e, as_factor(tile_w), acc, input_precision="ieee")

    target, slope, rows_y, inside = at_targets(
        weight_ptr, rows, offs_n, mask_n, num_v, stride_wv, form, ignore_index
    )
    rows_out = unit_gradient_ptr + offs_n.to(tl.int64) * num_h
    WIDTH: tl.constexpr = BLOCK_H // PARTS
    parts = split_columns(acc, PARTS)
    for index in tl.static_range(PARTS):
        write_unit_gradient(
            parts[index],
            rows_y,
            rows_out,
            slope * form.dlogit_dproduct,
            stored_scale * form.dlogit_dproduct / total,
            target != ignore_index,
            inside,
            mask_n,
            start_h + index * WIDTH,
            num_h,
            stride_wh,
            WIDTH,
        )


class Shifts(NamedTuple):
    """Shifts of exp-logits that are relative to their own part's, and what to bring them to."""

    tile_shift: torch.Tensor  # [parts, rows]
    row_shift: torch.Tensor  # [rows]
    row_total: torch.Tensor  # [rows]


class TargetRows(NamedTuple):
    """What the unit gradient takes of each row's target."""

    targets: torch.Tensor  # [N] contiguous
    one_minus_p: torch.Tensor  # [N] 1 - p of the target, NaN where it is outside the vocabulary
    target_logit: torch.Tensor  # [N]


class KeptColumns(NamedTuple):
    """Columns of the vocabulary that each block of rows keeps."""

    columns: torch.Tensor  # [row blocks, most] int32, ascending
    counts: torch.Tensor  # [row blocks] int32, at most `most`
    threshold: torch.Tensor  # [row blocks] float32: those whose maximum is not below this


def write_unit_gradients(
    exp_logits: torch.Tensor,  # [N, padded columns]
    heads: Heads,  # the policy alone is read
    rows: TargetRows,
    unit_gradient: torch.Tensor,  # [N, H] contiguous, of any float type, to be filled
    shifts: Shifts | None = None,  # None: `exp_logits` is relative to its row's total
    kept: KeptColumns | None = None,  # None: `exp_logits` covers the whole vocabulary
    active: ActiveBlocks | None = None,  # None: blocks with a row that counts
) -> None:
    """Rows past N in the shifts are the reference's and are not read."""
    weight, options, config = heads.policy.weight, heads.options, heads.config
    (num_v, num_h), num_n, tile = weight.shape, len(rows.targets), config.unit_gradient
    use_tma = config.tma and kept is None and can_describe(exp_logits) and can_describe(weight)
    active = active or active_blocks(rows.targets, options.ignore_index, tile.rows)
    grid = (ceil_div(num_n, tile.rows) * ceil_div(num_h, tile.columns),)
    with torch.cuda.device_of(exp_logits):
        unit_gradient_kernel[grid](
            exp_logits=describe(exp_logits, tile.rows, tile.depth, use_tma),
            stride_en=exp_logits.stride(0),
            weight=describe(weight, tile.depth, tile.columns, use_tma),
            weight_ptr=weight,
            stride_wv=weight.stride(0),
            stride_wh=weight.stride(1),
            rows=rows,
            active=active,
            shifts=shifts,
            kept=kept,
            most=kept.columns.stride(0) if kept else 0,
            unit_gradient_ptr=unit_gradient,
            num_n=num_n,
            num_v=num_v,
            num_h=num_h,
            num_rows=shifts.tile_shift.shape[1] if shifts else 0,
            form=logit_form(options),
            stored_scale=2.0 ** -stored_exponent(exp_logits.dtype),
            ignore_index=options.ignore_index,
            USE_TMA=use_tma,
            PART=config.statistics.part,
            GROUP=GROUP,
            BLOCK_N=tile.rows,
            BLOCK_H=tile.columns,
            BLOCK_V=tile.depth,
            PARTS=tile.parts,
            **tile.launch_options,
        )
