"""Probabilities of the columns that each block of rows keeps, and their mass.

The eager code it replaces, for one block of rows with its `columns`:

    z = logits(hidden, weight[columns])
    p = softmax of the row at these columns, 0 at the target
    mass = p.sum(1)                                                           # float32
    exp_logits = (p * softcap_slope).to(hidden.dtype)

The rows of the weight are gathered as they are multiplied; no copy of them is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import ceil_div, stored_exponent
from powerflow_fast.kernels.statistics import Heads
from powerflow_fast.kernels.tiles import (
    above_shift,
    form_logits,
    logit_form,
    multiply_transposed,
    round_to,
    rounding,
    split_columns,
    strides_of,
)
from powerflow_fast.kernels.unit_gradient import KeptColumns


@triton.jit
def write_probabilities(
    product,  # [BLOCK_N, part] tile of hidden @ weight[columns].T
    bias_ptr,  # [V] or None
    columns_ptr,  # [most] of this block of rows
    count,
    target,  # [BLOCK_N]
    shift,  # [BLOCK_N] in units of log 2
    total,  # [BLOCK_N] sum of exp2(z - shift) over the whole vocabulary
    rows_exp,  # [BLOCK_N] pointers to the rows of exp_logits
    start_k,
    mask_n,
    form,
    ROUND_TO: tl.constexpr,
    STORED_EXPONENT: tl.constexpr,
    PART: tl.constexpr,
):
    """Stores the part's exp-logits and returns its mass, [BLOCK_N]."""
    offs_k = start_k + tl.arange(0, PART)
    mask_k = offs_k < count
    offs_v = tl.load(columns_ptr + offs_k, mask=mask_k, other=0)
    logits, slope = form_logits(product, bias_ptr, offs_v, mask_k, form, ROUND_TO)
    p = tl.exp2(above_shift(logits, shift[:, None])) / total[:, None]
    p = tl.where(offs_v[None, :] == target[:, None], 0.0, p)
    exp_logits = p * slope
    if STORED_EXPONENT != 0:
        exp_logits *= 2.0**STORED_EXPONENT
    exp_logits = round_to(exp_logits, rows_exp.dtype.element_ty)
    tl.store(rows_exp[:, None] + offs_k[None, :], exp_logits, mask=mask_n[:, None])
    return tl.sum(p, 1)


@triton.jit
def kept_probabilities_kernel(
    hidden,  # [N, H]
    weight,  # [V, H]
    bias_ptr,  # [V] or None
    strides,  # of hidden, of weight
    targets_ptr,  # [N]
    row_shift_ptr,  # [N]
    row_total_ptr,  # [N]
    kept,  # Kept
    most,  # columns of a row of kept.columns
    mass_ptr,  # [tiles, N] zeros: a block that keeps fewer columns leaves some
    exp_logits_ptr,  # [N, padded columns]
    stride_en,
    num_n,
    num_h,
    form,
    ROUND_TO: tl.constexpr,
    STORED_EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    PART: tl.constexpr = BLOCK_V // PARTS
    # Tiles of one block are neighbours: they share its rows of hidden through L2.
    start_k = tl.program_id(0) * BLOCK_V
    block = tl.program_id(1)
    count = tl.load(kept.counts + block)
    if start_k >= count:
        return
    columns_ptr = kept.columns + block.to(tl.int64) * most
    start_n = block * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_n
    offs_k = start_k + tl.arange(0, BLOCK_V)
    mask_k = offs_k < count
    acc = multiply_transposed(
        hidden,
        weight,
        start_n,
        0,
        tl.load(columns_ptr + offs_k, mask=mask_k, other=0),
        mask_k,
        num_n,
        num_h,
        strides,
        False,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
    )
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    shift = tl.load(row_shift_ptr + offs_n, mask=mask_n, other=0.0)
    total = tl.load(row_total_ptr + offs_n, mask=mask_n, other=1.0)
    mass = tl.zeros([BLOCK_N], tl.float32)
    rows_exp = exp_logits_ptr + offs_n.to(tl.int64) * stride_en
    parts = split_columns(acc, PARTS)
    for index in tl.static_range(PARTS):
        mass += write_probabilities(
            parts[index],
            bias_ptr,
            columns_ptr,
            count,
            target,
            shift,
            total,
            rows_exp,
            start_k + index * PART,
            mask_n,
            form,
            ROUND_TO,
            STORED_EXPONENT,
            PART,
        )
    tl.store(mass_ptr + tl.program_id(0).to(tl.int64) * num_n + offs_n, mass, mask=mask_n)


def kept_probabilities(
    heads: Heads,  # the policy alone is read
    row_shift: torch.Tensor,  # [N] as `combine` left it
    row_total: torch.Tensor,  # [N] likewise
    kept: KeptColumns,
    most: int,  # the largest count
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> exp_logits [N, most padded to whole tiles] in the dtype of hidden, mass [N] float32."""
    (hidden, weight, bias), options, tile = heads.policy, heads.options, heads.tile
    num_n, num_h = hidden.shape
    tiles = ceil_div(most, tile.columns)
    exp_logits = hidden.new_empty((num_n, tiles * tile.columns))
    mass = torch.zeros((tiles, num_n), dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        kept_probabilities_kernel[(tiles, ceil_div(num_n, tile.rows))](
            hidden=hidden,
            weight=weight,
            bias_ptr=bias,
            strides=strides_of(hidden, weight),
            targets_ptr=heads.targets,
            row_shift_ptr=row_shift,
            row_total_ptr=row_total,
            kept=kept,
            most=kept.columns.stride(0),
            mass_ptr=mass,
            exp_logits_ptr=exp_logits,
            stride_en=exp_logits.stride(0),
            num_n=num_n,
            num_h=num_h,
            form=logit_form(options),
            ROUND_TO=rounding(options, hidden.dtype),
            STORED_EXPONENT=stored_exponent(hidden.dtype),
            **tile.constants,
            **tile.launch_options,
        )
    return exp_logits, mass.sum(0)
