"""Gradient of a loss with respect to a chunk of logits columns, from the softmax cache.

The eager code it replaces, with g the gradient of logps and J the softcap's slope:

    p = exp_logits * factors[columns // CACHE_TILE].T                         # p J, 0 at the target
    dlogits = g * (one_hot(targets) * one_minus_p - p)                        # in the inputs' dtype

A row that is not active is written as zeros whatever its cache holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import CACHE_TILE, LAUNCH, ceil_div
from powerflow_fast.kernels.tiles import round_to

BLOCK = 64  # rows of one program, which takes CACHE_TILE columns: no shape was timed


@triton.jit
def cached_dlogits_kernel(
    exp_logits_ptr,  # [N, columns]
    factors_ptr,  # [tiles, N]
    one_minus_p_ptr,  # [N]
    targets_ptr,  # [N] relative to the chunk's first column
    grad_ptr,  # [N]
    active_ptr,  # [N]
    dlogits_ptr,  # [N, V]
    num_n,
    num_v,
    stride_en,
    stride_ft,
    stride_dn,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_blocks = tl.cdiv(num_n, BLOCK_N)
    tile = tl.program_id(0) // num_blocks
    offs_n = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tile * TILE + tl.arange(0, TILE)
    mask_n = offs_n < num_n
    active = tl.load(active_ptr + offs_n, mask=mask_n, other=0) != 0
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0)
    factor = tl.load(factors_ptr + tile.to(tl.int64) * stride_ft + offs_n, mask=mask_n, other=0.0)
    one_minus_p = tl.load(one_minus_p_ptr + offs_n, mask=mask_n, other=0.0)
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    rows = offs_n.to(tl.int64)[:, None]
    mask = active[:, None] & (offs_v < num_v)[None, :]
    exp_logits = tl.load(exp_logits_ptr + rows * stride_en + offs_v[None, :], mask=mask, other=0.0)
    share = tl.where(
        offs_v[None, :] == target[:, None],
        one_minus_p[:, None],
        -exp_logits.to(tl.float32) * factor[:, None],
    )
    dlogits = tl.where(active[:, None], grad[:, None] * share, 0.0)
    tl.store(
        dlogits_ptr + rows * stride_dn + offs_v[None, :],
        round_to(dlogits, dlogits_ptr.dtype.element_ty),
        mask=mask_n[:, None] & (offs_v < num_v)[None, :],
    )


def write_cached_dlogits(
    exp_logits: torch.Tensor,  # [N, columns of the chunk or more] of the softmax cache
    factors: torch.Tensor,  # [its tiles of CACHE_TILE columns, N]
    one_minus_p: torch.Tensor,  # [N]
    targets: torch.Tensor,  # [N] contiguous, relative to the chunk's first column
    grad: torch.Tensor,  # [N] contiguous float32 gradient of logps, times what scales dlogits
    active: torch.Tensor,  # [N] bool
    dlogits: torch.Tensor,  # [N, columns of the chunk] to be filled, unit stride along the columns
) -> None:
    num_n, num_v = dlogits.shape
    grid = (ceil_div(num_n, BLOCK) * ceil_div(num_v, CACHE_TILE),)
    with torch.cuda.device_of(exp_logits):
        cached_dlogits_kernel[grid](
            exp_logits_ptr=exp_logits,
            factors_ptr=factors,
            one_minus_p_ptr=one_minus_p,
            targets_ptr=targets,
            grad_ptr=grad,
            active_ptr=active,
            dlogits_ptr=dlogits,
            num_n=num_n,
            num_v=num_v,
            stride_en=exp_logits.stride(0),
            stride_ft=factors.stride(0),
            stride_dn=dlogits.stride(0),
            TILE=CACHE_TILE,
            BLOCK_N=BLOCK,
            **LAUNCH,
        )
