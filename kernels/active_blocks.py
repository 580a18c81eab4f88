"""Blocks of rows with work in them first, those without after them.

The eager code it replaces, with `counted` = values != idle:

    works = pad(counted, rows).view(-1, rows).any(1)                          # [row blocks]
    blocks = cat([works.nonzero(), (~works).nonzero().flip(0)])
    count = works.sum()

A kernel whose programs go by this list knows at its start how much there is to do: every tile has
the same steps, which a loop over tiles needs to be pipelined as one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

AT_ONCE = 16  # blocks


class ActiveBlocks(NamedTuple):
    blocks: torch.Tensor  # [row blocks] int32: those with work ascending, then those without
    count: torch.Tensor  # [1] int32 of those with work


@triton.jit
def active_blocks_kernel(
    values_ptr,  # [N]
    blocks_ptr,  # [row blocks] int32
    count_ptr,  # [1] int32
    num_n,
    idle,  # value of a row without work
    ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    num_blocks = tl.cdiv(num_n, ROWS)
    count = 0
    for start in range(0, num_blocks, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)
        rows = block[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        counted = tl.load(values_ptr + rows, mask=rows < num_n, other=idle) != idle
        works = tl.max(counted.to(tl.int32), 1)
        before = count + tl.cumsum(works, 0) - works  # blocks with work before this one
        last = num_blocks - 1 - (block - before)  # from the end: those without work before it
        place = tl.where(works != 0, before, last)
        tl.store(blocks_ptr + place, block, mask=block < num_blocks)
        count += tl.sum(works, 0)
    tl.store(count_ptr, count)


def active_blocks(
    values: torch.Tensor,  # [N] contiguous: targets, or a mask
    idle: int,  # the value of a row without work: ignore_index, or 0
    rows: int,  # of a block
) -> ActiveBlocks:
    num_n = values.shape[0]
    if values.dtype == torch.bool:
        values = values.view(torch.uint8)
    blocks, count = (
        torch.empty(size, dtype=torch.int32, device=values.device)
        for size in (triton.cdiv(num_n, rows), 1)
    )
    with torch.cuda.device_of(values):
        active_blocks_kernel[(1,)](
            values_ptr=values,
            blocks_ptr=blocks,
            count_ptr=count,
            num_n=num_n,
            idle=idle,
            ROWS=rows,
            AT_ONCE=AT_ONCE,
            num_warps=8,
        )
    return ActiveBlocks(blocks, count)
