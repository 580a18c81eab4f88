"""Gradient of a loss with respect to a chunk of logits columns, recomputed from the hidden states.

The eager code it replaces, with g, e the gradients of logps and entropy, J the softcap's slope:

    log_p = logits - lse; log_p[targets] = logps                              # [N, columns]
    dlogits = g * (one_hot(targets) - exp(log_p)) - e * exp(log_p) * (log_p + entropy)
    dlogits = dlogits * J * derivative * out_scale                            # in the inputs' dtype

The target's log-prob is the forward pass's, and 1 - p is formed from it by expm1: of a confident
target logits - lse has no digit left. A row whose g and e are 0 is written as zeros whatever its
hidden state holds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.active_blocks import ActiveBlocks
from powerflow_fast.kernels.config import GROUP, ceil_div
from powerflow_fast.kernels.statistics import Heads
from powerflow_fast.kernels.tiles import (
    LOG2E,
    can_describe,
    describe,
    form_logits,
    logit_form,
    multiply_transposed,
    round_to,
    rounding,
    split_columns,
    strides_of,
    tile_is_marked,
    walk_in_groups,
    write_idle_zeros,
)


@triton.jit
def write_dlogits(
    product,  # [BLOCK_N, part] tile of hidden @ weight.T
    bias_ptr,  # [V] or None
    rows_out,  # [BLOCK_N] pointers to the rows of dlogits
    target,  # [BLOCK_N]
    grad_logp,  # [BLOCK_N] times derivative and out_scale
    grad_entropy,  # [BLOCK_N] likewise, or None
    target_logp,  # [BLOCK_N]
    one_minus_p,  # [BLOCK_N] 1 - p of the target
    lse,  # [BLOCK_N]
    entropy,  # [BLOCK_N]
    active,  # [BLOCK_N]
    start_v,
    mask_n,
    num_v,
    form,
    MARKED: tl.constexpr,  # whether the tile may hold targets, or end past the vocabulary
    ROUND_TO: tl.constexpr,
    PART: tl.constexpr,
):
    offs_v = start_v + tl.arange(0, PART)
    mask_v = offs_v < num_v if MARKED else None
    logits, slope = form_logits(product, bias_ptr, offs_v, mask_v, form, ROUND_TO)
    logp = logits - lse[:, None]
    p = tl.exp2(logp * LOG2E)
    share = -p
    if MARKED:
        is_target = offs_v[None, :] == target[:, None]
        share = tl.where(is_target, one_minus_p[:, None], share)
        if grad_entropy is not None:
            logp = tl.where(is_target, target_logp[:, None], logp)
            p = tl.where(is_target, 1.0 - one_minus_p[:, None], p)
    grad = grad_logp[:, None] * share
    if grad_entropy is not None:
        pull = tl.where(p == 0, 0.0, p * (logp + entropy[:, None]))  # 0 * -inf counts as 0
        grad -= grad_entropy[:, None] * pull
    grad = tl.where(active[:, None], grad * slope, 0.0)
    mask = mask_n[:, None]
    if MARKED:
        mask &= mask_v[None, :]
    tl.store(
        rows_out[:, None] + offs_v[None, :], round_to(grad, rows_out.dtype.element_ty), mask=mask
    )


@triton.jit
def dlogits_kernel(
    hidden,  # [N, H] pointer, or tensor descriptor if USE_TMA
    weight,  # [V, H] likewise; here V counts the columns of this chunk
    bias_ptr,  # [V] or None
    strides,  # of hidden, of weight
    targets_ptr,  # [N] relative to the chunk's first column
    rows,  # UpstreamRows
    blocks,  # ActiveBlocks
    out_scale_ptr,  # [1]
    dlogits_ptr,  # [N, V]
    stride_dn,
    num_n,
    num_v,
    num_h,
    form,
    USE_TMA: tl.constexpr,
    ROUND_TO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    PART: tl.constexpr = BLOCK_V // PARTS
    program = tl.program_id(0)
    num_blocks = tl.load(blocks.count)
    num_tiles = tl.cdiv(num_v, BLOCK_V)
    idle = program - num_blocks * num_tiles
    if idle >= 0:
        write_idle_zeros(
            dlogits_ptr, stride_dn, blocks.blocks, num_blocks, idle, num_n, num_v, BLOCK_N, BLOCK_V
        )
        return
    position, tile_v = walk_in_groups(program, num_blocks, num_tiles, GROUP)
    start_n = tl.load(blocks.blocks + position) * BLOCK_N
    start_v = tile_v * BLOCK_V

    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_n
    offs_v = start_v + tl.arange(0, BLOCK_V)
    acc = multiply_transposed(
        hidden,
        weight,
        start_n,
        start_v,
        offs_v,
        offs_v < num_v,
        num_n,
        num_h,
        strides,
        USE_TMA,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
    )
    active = tl.load(rows.active + offs_n, mask=mask_n, other=0) != 0
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    target_logp = tl.load(rows.logps + offs_n, mask=mask_n, other=0.0)
    one_minus_p = tl.load(rows.one_minus_p + offs_n, mask=mask_n, other=0.0)
    lse = tl.load(rows.lse + offs_n, mask=mask_n, other=0.0)
    factor = form.dlogit_dproduct * tl.load(out_scale_ptr)
    grad_logp = tl.load(rows.grad_logps + offs_n, mask=mask_n, other=0.0) * factor
    grad_entropy = None
    entropy = None
    if rows.grad_entropy is not None:
        grad_entropy = tl.load(rows.grad_entropy + offs_n, mask=mask_n, other=0.0) * factor
        entropy = tl.load(rows.entropy + offs_n, mask=mask_n, other=0.0)
    rows_out = dlogits_ptr + offs_n.to(tl.int64) * stride_dn
    parts = split_columns(acc, PARTS)
    marked = tile_is_marked(target, mask_n, start_v, num_v, BLOCK_V)
    for kind in tl.static_range(2):
        if marked == (kind == 1):
            for index in tl.static_range(PARTS):
                write_dlogits(
                    parts[index],
                    bias_ptr,
                    rows_out,
                    target,
                    grad_logp,
                    grad_entropy,
                    target_logp,
                    one_minus_p,
                    lse,
                    entropy,
                    active,
                    start_v + index * PART,
                    mask_n,
                    num_v,
                    form,
                    kind == 1,
                    ROUND_TO,
                    PART,
                )


class UpstreamRows(NamedTuple):
    """What the gradient of a row's logits takes beside its logits; [N] contiguous float32."""

    grad_logps: torch.Tensor
    grad_entropy: torch.Tensor | None
    logps: torch.Tensor  # of the targets
    one_minus_p: torch.Tensor  # 1 - p, -expm1(logps)
    lse: torch.Tensor
    entropy: torch.Tensor | None  # needed with grad_entropy
    active: torch.Tensor  # bool


def write_dlogits_chunk(
    chunk: Heads,  # weight and bias hold this chunk's rows; targets count from its first column
    rows: UpstreamRows,
    blocks: ActiveBlocks,  # those with an active row, of config.dlogits.rows rows
    out_scale: torch.Tensor,  # [1] float32
    dlogits: torch.Tensor,  # [N, columns of the chunk] to be filled, unit stride along the columns
) -> None:
    (hidden, weight, bias), _, targets, options, config = chunk
    (num_n, num_h), num_v, tile = hidden.shape, len(weight), config.dlogits
    use_tma = config.tma and can_describe(hidden) and can_describe(weight)
    grid = (ceil_div(num_n, tile.rows) * ceil_div(num_v, tile.columns),)
    with torch.cuda.device_of(hidden):
        dlogits_kernel[grid](
            hidden=describe(hidden, tile.rows, tile.depth, use_tma),
            weight=describe(weight, tile.columns, tile.depth, use_tma),
            bias_ptr=bias,
            strides=strides_of(hidden, weight),
            targets_ptr=targets,
            rows=rows,
            blocks=blocks,
            out_scale_ptr=out_scale,
            dlogits_ptr=dlogits,
            stride_dn=dlogits.stride(0),
            num_n=num_n,
            num_v=num_v,
            num_h=num_h,
            form=logit_form(options),
            USE_TMA=use_tma,
            ROUND_TO=rounding(options, hidden.dtype),
            GROUP=GROUP,
            **tile.constants,
            **tile.launch_options,
        )
