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

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.active_blocks import ActiveBlocks
from powerflow_fast.kernels.config import Tile, ceil_div
from powerflow_fast.kernels.tiles import (
    LOG2E,
    Operands,
    can_describe,
    describe,
    form_logits,
    logit_form,
    multiply_transposed,
    round_to,
    split_columns,
    tile_is_marked,
    triton_dtype,
    walk_in_groups,
    write_idle_zeros,
)

GROUP = 16


@triton.jit
def write_dlogits(
    product,  # [BLOCK_N, PART] tile of hidden @ weight.T
    bias_ptr,  # [V] or None
    rows_out,  # [BLOCK_N] pointers to the rows of dlogits
    target,  # [BLOCK_N]
    grad_logp,  # [BLOCK_N] times derivative and out_scale
    grad_entropy,  # [BLOCK_N] likewise
    target_logp,  # [BLOCK_N]
    others,  # [BLOCK_N] 1 - p of the target
    lse,  # [BLOCK_N]
    entropy,  # [BLOCK_N]
    active,  # [BLOCK_N]
    start_v,
    mask_n,
    num_v,
    scale,
    cap,
    MARKED: tl.constexpr,  # whether the tile may hold targets, or end past the vocabulary
    HAS_ENTROPY: tl.constexpr,
    ROUND_TO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
):
    offs_v = start_v + tl.arange(0, PART)
    mask_v = offs_v < num_v if MARKED else None
    logits, slope = form_logits(product, bias_ptr, offs_v, mask_v, scale, cap, ROUND_TO, SOFTCAP)
    logp = logits - lse[:, None]
    p = tl.exp2(logp * LOG2E)
    share = -p
    if MARKED:
        is_target = offs_v[None, :] == target[:, None]
        share = tl.where(is_target, others[:, None], share)
        if HAS_ENTROPY:
            logp = tl.where(is_target, target_logp[:, None], logp)
            p = tl.where(is_target, 1.0 - others[:, None], p)
    grad = grad_logp[:, None] * share
    if HAS_ENTROPY:
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
    targets_ptr,  # [N] relative to the chunk's first column
    grad_logps_ptr,  # [N]
    grad_entropy_ptr,  # [N] or None
    logps_ptr,  # [N] of the targets
    others_ptr,  # [N] 1 - p of the targets
    lse_ptr,  # [N]
    entropy_ptr,  # [N] or None
    active_ptr,  # [N]
    blocks_ptr,  # [row blocks] int32, the active ones first
    count_ptr,  # [1] int32 of the active ones
    out_scale_ptr,  # [1]
    dlogits_ptr,  # [N, V]
    num_n,
    num_v,
    num_h,
    stride_hn,
    stride_hh,
    stride_wv,
    stride_wh,
    stride_dn,
    scale,
    cap,
    derivative,
    USE_TMA: tl.constexpr,
    ROUND_TO: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    program = tl.program_id(0)
    num_blocks = tl.load(count_ptr)
    num_tiles = tl.cdiv(num_v, BLOCK_V)
    idle = program - num_blocks * num_tiles
    if idle >= 0:
        write_idle_zeros(
            dlogits_ptr, stride_dn, blocks_ptr, num_blocks, idle, num_n, num_v, BLOCK_N, BLOCK_V
        )
        return
    position, tile_v = walk_in_groups(program, num_blocks, num_tiles, GROUP)
    start_n = tl.load(blocks_ptr + position) * BLOCK_N
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
        stride_hn,
        stride_hh,
        stride_wv,
        stride_wh,
        USE_TMA,
        BLOCK_N,
        BLOCK_V,
        BLOCK_H,
    )
    active = tl.load(active_ptr + offs_n, mask=mask_n, other=0) != 0
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    target_logp = tl.load(logps_ptr + offs_n, mask=mask_n, other=0.0)
    others = tl.load(others_ptr + offs_n, mask=mask_n, other=0.0)
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    factor = derivative * tl.load(out_scale_ptr)
    grad_logp = tl.load(grad_logps_ptr + offs_n, mask=mask_n, other=0.0) * factor
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    grad_entropy = grad_logp
    entropy = lse
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + offs_n, mask=mask_n, other=0.0) * factor
        entropy = tl.load(entropy_ptr + offs_n, mask=mask_n, other=0.0)
    rows_out = dlogits_ptr + offs_n.to(tl.int64) * stride_dn
    PART: tl.constexpr = BLOCK_V // PARTS
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
                    others,
                    lse,
                    entropy,
                    active,
                    start_v + index * PART,
                    mask_n,
                    num_v,
                    scale,
                    cap,
                    kind == 1,
                    HAS_ENTROPY,
                    ROUND_TO,
                    SOFTCAP,
                    PART,
                )


def write_dlogits_chunk(
    policy: Operands,  # weight and bias hold this chunk's rows only
    targets: torch.Tensor,  # [N] contiguous, relative to the chunk's first column
    grad_logps: torch.Tensor,  # [N] contiguous float32
    grad_entropy: torch.Tensor | None,  # [N] likewise
    logps: torch.Tensor,  # [N] likewise, of the targets
    others: torch.Tensor,  # [N] likewise: 1 - p, -expm1(logps)
    lse: torch.Tensor,  # [N] likewise
    entropy: torch.Tensor | None,  # [N] likewise
    active: torch.Tensor,  # [N] contiguous bool
    blocks: ActiveBlocks,  # those with an active row, of tile.rows rows
    out_scale: torch.Tensor,  # [1] float32
    dlogits: torch.Tensor,  # [N, columns of the chunk] to be filled, unit stride along the columns
    options,
    tile: Tile,
    use_tma: bool,
) -> None:
    hidden, weight, bias = policy
    num_n, num_h = hidden.shape
    num_v = weight.shape[0]
    use_tma = use_tma and can_describe(hidden) and can_describe(weight)
    form = logit_form(options)
    grid = (ceil_div(num_n, tile.rows) * ceil_div(num_v, tile.columns),)
    with torch.cuda.device_of(hidden):
        dlogits_kernel[grid](
            hidden=describe(hidden, tile.rows, tile.depth, use_tma),
            weight=describe(weight, tile.columns, tile.depth, use_tma),
            bias_ptr=bias,
            targets_ptr=targets,
            grad_logps_ptr=grad_logps,
            grad_entropy_ptr=grad_entropy,
            logps_ptr=logps,
            others_ptr=others,
            lse_ptr=lse,
            entropy_ptr=entropy,
            active_ptr=active,
            blocks_ptr=blocks.blocks,
            count_ptr=blocks.count,
            out_scale_ptr=out_scale,
            dlogits_ptr=dlogits,
            num_n=num_n,
            num_v=num_v,
            num_h=num_h,
            stride_hn=hidden.stride(0),
            stride_hh=hidden.stride(1),
            stride_wv=weight.stride(0),
            stride_wh=weight.stride(1),
            stride_dn=dlogits.stride(0),
            scale=form.scale,
            cap=form.cap,
            derivative=form.derivative,
            USE_TMA=use_tma,
            ROUND_TO=triton_dtype(hidden.dtype) if options.round_logits else None,
            SOFTCAP=form.softcap,
            GROUP=GROUP,
            BLOCK_N=tile.rows,
            BLOCK_V=tile.columns,
            BLOCK_H=tile.depth,
            PARTS=tile.parts,
            **tile.launch_options,
        )
