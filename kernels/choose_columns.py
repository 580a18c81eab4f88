"""Which columns of the vocabulary each block of rows keeps, on the certified route.

The eager code it replaces, for one block with `column_max` [V], bounds on log2 p:

    order = column_max.sort().indices
    skipped = order[column_max[order].exp2().cumsum(0) <= budget]
    columns = all others, ascending

The threshold is found by bisection instead of a sort, so it keeps a few columns too many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH
from powerflow_fast.kernels.unit_gradient import KeptColumns

BLOCK = 4096
LOWEST = -40.0  # a threshold of 2^-40 skips nothing that float32 would notice
STEPS = 10  # 41 / 2^10: the threshold is exact to 3 %


@triton.jit
def choose_columns_kernel(
    column_max_ptr,  # [row blocks, V] float16
    columns_ptr,  # [row blocks, most] int32
    counts_ptr,  # [row blocks] int32
    threshold_ptr,  # [row blocks] float32
    num_v,
    most,
    budget,
    LOWEST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    column_max_ptr += block * num_v
    columns_ptr += block * most
    offs = tl.arange(0, BLOCK)
    low = LOWEST
    high = 1.0
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        skipped = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_v, BLOCK):
            offs_v = start + offs
            bound = tl.load(column_max_ptr + offs_v, mask=offs_v < num_v, other=float("-inf"))
            bound = bound.to(tl.float32)
            skipped += tl.where(bound < middle, tl.exp2(bound), 0.0)
        fits = tl.sum(skipped, 0) <= budget
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)

    count = 0
    for start in range(0, num_v, BLOCK):
        offs_v = start + offs
        bound = tl.load(column_max_ptr + offs_v, mask=offs_v < num_v, other=float("-inf"))
        # Not `>=`: a NaN proves nothing, so its column is kept.
        keep = ((bound.to(tl.float32) < low) == 0) & (offs_v < num_v)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(columns_ptr + place, offs_v, mask=keep & (place < most))
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts_ptr + block, count)
    tl.store(threshold_ptr + block, low)


def choose_columns(
    column_max: torch.Tensor,  # [row blocks, V] float16, contiguous
    budget: float,  # sum of the bounds of the columns that are left out
    most: int,
) -> KeptColumns:
    """A block that would keep more than `most` columns has the right count and a cut list."""
    blocks, num_v = column_max.shape
    columns = torch.empty((blocks, most), dtype=torch.int32, device=column_max.device)
    counts = torch.empty(blocks, dtype=torch.int32, device=column_max.device)
    threshold = torch.empty(blocks, dtype=torch.float32, device=column_max.device)
    with torch.cuda.device_of(column_max):
        choose_columns_kernel[(blocks,)](
            column_max_ptr=column_max,
            columns_ptr=columns,
            counts_ptr=counts,
            threshold_ptr=threshold,
            num_v=num_v,
            most=most,
            budget=budget,
            LOWEST=LOWEST,
            STEPS=STEPS,
            BLOCK=BLOCK,
            num_warps=8,
            **LAUNCH,
        )
    return KeptColumns(columns, counts, threshold)
