"""The direction d logps / d hidden from the vendor's product of softmax numerators and weight.

The eager code it replaces, with J_y the softcap's slope at the target's logit:

    direction = derivative * (J_y * others * weight[y] - factor * mean)       # [N, H], 0 if ignored

`mean` is soft @ weight, in float32; the target's column is absent from `soft`, so that weight[y]
enters once, with 1 - p_y in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH, ceil_div
from powerflow_fast.kernels.direction import TargetRows, at_targets, write_direction
from powerflow_fast.kernels.tiles import logit_form

BLOCKS = {"BLOCK_N": 16, "WIDTH": 256}


@triton.jit
def mean_direction_kernel(
    mean_ptr,  # [N, H] rows of stride_mn
    stride_mn,
    weight_ptr,  # [V, H]
    stride_wv,
    stride_wh,
    rows,  # TargetRows
    factor_ptr,  # [N] p of a numerator of 1
    direction_ptr,  # [N, H] rows of stride_dn
    stride_dn,
    num_n,
    num_v,
    num_h,
    form,
    ignore_index,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start_h = tl.program_id(1) * WIDTH
    offs_h = start_h + tl.arange(0, WIDTH)
    mask_n = offs_n < num_n
    target, slope, rows_y, inside = at_targets(
        weight_ptr, rows, offs_n, mask_n, num_v, stride_wv, form, ignore_index
    )
    factor = tl.load(factor_ptr + offs_n, mask=mask_n, other=0.0)
    rows_mean = mean_ptr + offs_n.to(tl.int64) * stride_mn
    mask = mask_n[:, None] & (offs_h < num_h)[None, :]
    mean = tl.load(rows_mean[:, None] + offs_h[None, :], mask=mask, other=0.0)
    write_direction(
        mean,
        rows_y,
        direction_ptr + offs_n.to(tl.int64) * stride_dn,
        slope * form.derivative,
        factor * form.derivative,
        target != ignore_index,
        inside,
        mask_n,
        start_h,
        num_h,
        stride_wh,
        WIDTH,
    )


def write_mean_directions(
    mean: torch.Tensor,  # [N, H] float32, unit stride along H
    weight: torch.Tensor,  # [V, H]
    rows: TargetRows,
    factor: torch.Tensor,  # [N] p of a numerator of 1
    direction: torch.Tensor,  # [N, H] of any float type, to be filled; may be `mean`
    options,
) -> None:
    num_n, num_h = mean.shape
    grid = (ceil_div(num_n, BLOCKS["BLOCK_N"]), ceil_div(num_h, BLOCKS["WIDTH"]))
    with torch.cuda.device_of(mean):
        mean_direction_kernel[grid](
            mean_ptr=mean,
            stride_mn=mean.stride(0),
            weight_ptr=weight,
            stride_wv=weight.stride(0),
            stride_wh=weight.stride(1),
            rows=rows,
            factor_ptr=factor,
            direction_ptr=direction,
            stride_dn=direction.stride(0),
            num_n=num_n,
            num_v=len(weight),
            num_h=num_h,
            form=logit_form(options),
            ignore_index=options.ignore_index,
            **BLOCKS,
            **LAUNCH,
        )
