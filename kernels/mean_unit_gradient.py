"""The unit gradient d logps / d hidden from the vendor's product of exp-logits and weight.

The eager code it replaces, with J_y the softcap's slope at the target's logit:

    unit_gradient = dlogit_dproduct * (J_y * one_minus_p * weight[y] - factor * mean)    # [N, H]

`mean` is exp_logits @ weight, in float32. The target's column is absent from exp_logits, so
weight[y] enters once, with 1 - p_y in float32. Rows that are ignored are 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH, ceil_div
from powerflow_fast.kernels.statistics import Heads
from powerflow_fast.kernels.tiles import logit_form
from powerflow_fast.kernels.unit_gradient import TargetRows, at_targets, write_unit_gradient

BLOCKS = {"BLOCK_N": 16, "WIDTH": 256}


@triton.jit
def mean_unit_gradient_kernel(
    mean_ptr,  # [N, H] rows of stride_mn
    stride_mn,
    weight_ptr,  # [V, H]
    stride_wv,
    stride_wh,
    rows,  # TargetRows
    factor_ptr,  # [N] p of an exp-logit of 1
    unit_gradient_ptr,  # [N, H] rows of stride_dn
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
    write_unit_gradient(
        mean,
        rows_y,
        unit_gradient_ptr + offs_n.to(tl.int64) * stride_dn,
        slope * form.dlogit_dproduct,
        factor * form.dlogit_dproduct,
        target != ignore_index,
        inside,
        mask_n,
        start_h,
        num_h,
        stride_wh,
        WIDTH,
    )


def write_mean_unit_gradients(
    mean: torch.Tensor,  # [N, H] float32, unit stride along H
    heads: Heads,  # the policy alone is read
    rows: TargetRows,
    factor: torch.Tensor,  # [N] p of an exp-logit of 1
    unit_gradient: torch.Tensor,  # [N, H] of any float type, to be filled; may be `mean`
) -> None:
    weight, options = heads.policy.weight, heads.options
    num_n, num_h = mean.shape
    grid = (ceil_div(num_n, BLOCKS["BLOCK_N"]), ceil_div(num_h, BLOCKS["WIDTH"]))
    with torch.cuda.device_of(mean):
        mean_unit_gradient_kernel[grid](
            mean_ptr=mean,
            stride_mn=mean.stride(0),
            weight_ptr=weight,
            stride_wv=weight.stride(0),
            stride_wh=weight.stride(1),
            rows=rows,
            factor_ptr=factor,
            unit_gradient_ptr=unit_gradient,
            stride_dn=unit_gradient.stride(0),
            num_n=num_n,
            num_v=len(weight),
            num_h=num_h,
            form=logit_form(options),
            ignore_index=options.ignore_index,
            **BLOCKS,
            **LAUNCH,
        )
