"""Which columns of the vocabulary each block of rows keeps, on the certified route.

The eager code it replaces, for one block with `peaks` [V], bounds on log2 p:

    order = peaks.sort().indices
    skipped = order[peaks[order].exp2().cumsum(0) <= budget]
    columns = all others, ascending

The threshold is found by bisection instead of a sort, so it keeps a few columns too many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH
from powerflow_fast.kernels.direction import Kept

BLOCK = 4096
LOWEST = -40.0  # a threshold of 2^-40 skips nothing that float32 would notice
STEPS = 10  # 41 / 2^10: the threshold is exact to 3 %


@triton.jit
def choose_columns_kernel(
    peaks_ptr,  # [row blocks, V] float16
    columns_ptr,  # [row blocks, most] int32
    counts_ptr,  # [row blocks] int32
    lowest_ptr,  # [row blocks] float32
    num_v,
    most,
    budget,
    LOWEST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    peaks_ptr += block * num_v
    columns_ptr += block * most
    offs = tl.arange(0, BLOCK)
    low = LOWEST
    high = 1.0
    for _ in range(STEPS):
        middle = 0.5 * (low + high)
        skipped = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_v, BLOCK):
            offs_v = start + offs
            peak = tl.load(peaks_ptr + offs_v, mask=offs_v < num_v, other=float("-inf"))
            peak = peak.to(tl.float32)
            skipped += tl.where(peak < middle, tl.exp2(peak), 0.0)
        fits = tl.sum(skipped, 0) <= budget
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)

    count = 0
    for start in range(0, num_v, BLOCK):
        offs_v = start + offs
        peak = tl.load(peaks_ptr + offs_v, mask=offs_v < num_v, other=float("-inf"))
        # Not `>=`: a NaN proves nothing, so its column is kept.
        keep = ((peak.to(tl.float32) < low) == 0) & (offs_v < num_v)
        place = count + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(columns_ptr + place, offs_v, mask=keep & (place < most))
        count += tl.sum(keep.to(tl.int32), 0)
    tl.store(counts_ptr + block, count)
    tl.store(lowest_ptr + block, low)


def choose_columns(
    peaks: torch.Tensor,  # [row blocks, V] float16, contiguous
    budget: float,  # sum of the bounds of the columns that are left out
    most: int,
) -> Kept:
    """Of a block that would keep more than `most` columns the count is right, the list cut."""
    blocks, num_v = peaks.shape
    columns = torch.empty((blocks, most), dtype=torch.int32, device=peaks.device)
    counts = torch.empty(blocks, dtype=torch.int32, device=peaks.device)
    lowest = torch.empty(blocks, dtype=torch.float32, device=peaks.device)
    with torch.cuda.device_of(peaks):
        choose_columns_kernel[(blocks,)](
            peaks_ptr=peaks,
            columns_ptr=columns,
            counts_ptr=counts,
            lowest_ptr=lowest,
            num_v=num_v,
            most=most,
            budget=budget,
            LOWEST=LOWEST,
            STEPS=STEPS,
            BLOCK=BLOCK,
            num_warps=8,
            **LAUNCH,
        )
    return Kept(columns, counts, lowest)
