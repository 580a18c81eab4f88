"""Gradient of a loss with respect to a chunk of logits columns, from kept softmax numerators.

The eager code it replaces, with g the gradient of logps and J the softcap's slope:

    p = soft * factors[columns // piece].T                                    # p J, 0 at the target
    dlogits = g * (one_hot(targets) * own - p)                                # in the inputs' dtype

A row that is not active is written as zeros whatever its numerators hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH, ceil_div, numerators_layout
from powerflow_fast.kernels.tiles import round_to
from powerflow_fast.logprobs.softmax_cache import Numerators

BLOCK = 64  # rows of one program, which takes one piece of columns: no shape was timed


@triton.jit
def kept_dlogits_kernel(
    soft_ptr,  # [N, columns]
    factors_ptr,  # [pieces, N]
    own_ptr,  # [N]
    targets_ptr,  # [N] relative to the chunk's first column
    grad_ptr,  # [N]
    active_ptr,  # [N]
    dlogits_ptr,  # [N, V]
    num_n,
    num_v,
    stride_sn,
    stride_fp,
    stride_dn,
    PIECE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_blocks = tl.cdiv(num_n, BLOCK_N)
    piece = tl.program_id(0) // num_blocks
    offs_n = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = piece * PIECE + tl.arange(0, PIECE)
    mask_n = offs_n < num_n
    active = tl.load(active_ptr + offs_n, mask=mask_n, other=0) != 0
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0)
    factor = tl.load(factors_ptr + piece.to(tl.int64) * stride_fp + offs_n, mask=mask_n, other=0.0)
    own = tl.load(own_ptr + offs_n, mask=mask_n, other=0.0)
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    rows = offs_n.to(tl.int64)[:, None]
    mask = active[:, None] & (offs_v < num_v)[None, :]
    soft = tl.load(soft_ptr + rows * stride_sn + offs_v[None, :], mask=mask, other=0.0)
    share = tl.where(
        offs_v[None, :] == target[:, None], own[:, None], -soft.to(tl.float32) * factor[:, None]
    )
    dlogits = tl.where(active[:, None], grad[:, None] * share, 0.0)
    tl.store(
        dlogits_ptr + rows * stride_dn + offs_v[None, :],
        round_to(dlogits, dlogits_ptr.dtype.element_ty),
        mask=mask_n[:, None] & (offs_v < num_v)[None, :],
    )


def write_kept_dlogits(
    numerators: Numerators,  # of the whole vocabulary
    start: int,  # first column of the chunk
    targets: torch.Tensor,  # [N] contiguous, relative to the chunk's first column
    grad: torch.Tensor,  # [N] contiguous float32 gradient of logps, times what scales dlogits
    active: torch.Tensor,  # [N] bool
    dlogits: torch.Tensor,  # [N, columns of the chunk] to be filled, unit stride along the columns
) -> None:
    num_n, num_v = dlogits.shape
    piece = numerators_layout().piece
    assert start % piece == 0
    soft, factors = numerators.values[:, start:], numerators.factors[start // piece :]
    grid = (ceil_div(num_n, BLOCK) * ceil_div(num_v, piece),)
    with torch.cuda.device_of(soft):
        kept_dlogits_kernel[grid](
            soft_ptr=soft,
            factors_ptr=factors,
            own_ptr=numerators.own,
            targets_ptr=targets,
            grad_ptr=grad,
            active_ptr=active,
            dlogits_ptr=dlogits,
            num_n=num_n,
            num_v=num_v,
            stride_sn=soft.stride(0),
            stride_fp=factors.stride(0),
            stride_dn=dlogits.stride(0),
            PIECE=piece,
            BLOCK_N=BLOCK,
            **LAUNCH,
        )
