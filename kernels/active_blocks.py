"""Which blocks of rows have anything to compute: those that count come first.

The eager code it replaces, with `active` [row blocks] whether any row of a block counts:

    blocks = (~active).sort(stable=True).indices                              # int32
    count = active.sum()                                                      # int32

once for each chunk of rows, whose blocks are numbered from 0.

The kernels with a product take a block by its position in this list. So the number of steps of a
product depends on no row, and groups of blocks that share the weight through L2 have no holes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH, ceil_div

AT_ONCE = 64  # blocks that a chunk's one program looks at: two rounds for 16384 rows


@triton.jit
def any_row_counts(rows_ptr, idle, block, num_n, BLOCK_N: tl.constexpr):
    """[AT_ONCE] int32, 0 for blocks past the last row."""
    offs_n = block[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    rows = tl.load(rows_ptr + offs_n, mask=offs_n < num_n, other=idle)
    return tl.max((rows != idle).to(tl.int32), 1)


@triton.jit
def active_blocks_kernel(
    rows_ptr,  # [N]
    blocks_ptr,  # [row blocks] int32
    count_ptr,  # [chunks] int32
    idle,
    num_n,
    chunk_rows,  # a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    chunk = tl.program_id(0)
    first = chunk * chunk_rows
    num_n = min(num_n - first, chunk_rows)
    rows_ptr += first
    blocks_ptr += first // BLOCK_N
    num_blocks = tl.cdiv(num_n, BLOCK_N)
    offs = tl.arange(0, AT_ONCE)
    count = 0
    for start in range(0, num_blocks, AT_ONCE):
        count += tl.sum(any_row_counts(rows_ptr, idle, start + offs, num_n, BLOCK_N), 0)
    tl.store(count_ptr + chunk, count)
    before = 0
    for start in range(0, num_blocks, AT_ONCE):
        block = start + offs
        active = any_row_counts(rows_ptr, idle, block, num_n, BLOCK_N)
        place = before + tl.cumsum(active, 0) - active  # among the active ones
        place = tl.where(active != 0, place, count + block - place)
        tl.store(blocks_ptr + place, block, mask=block < num_blocks)
        before += tl.sum(active, 0)


class ActiveBlocks(NamedTuple):
    blocks: torch.Tensor  # [row blocks] int32: active ones ascending, then idle ones ascending
    count: torch.Tensor  # [1] int32 of the active ones; of several chunks [chunks]

    def of_chunk(self, chunk: int, blocks: int) -> ActiveBlocks:
        """The list of one chunk; each chunk but the last has `blocks` row blocks."""
        places = slice(chunk * blocks, (chunk + 1) * blocks)
        return ActiveBlocks(self.blocks[places], self.count[chunk : chunk + 1])


def active_blocks(
    rows: torch.Tensor,  # [N] contiguous integers or bool
    idle: int,  # of a row that does not count
    block: int,  # rows of a block
    chunk_rows: int | None = None,  # a multiple of `block`; None: all rows are one chunk
) -> ActiveBlocks:
    num_n = rows.shape[0]
    chunk_rows = chunk_rows or max(num_n, 1)
    chunks = max(ceil_div(num_n, chunk_rows), 1)
    blocks = torch.empty(ceil_div(num_n, block), dtype=torch.int32, device=rows.device)
    count = torch.empty(chunks, dtype=torch.int32, device=rows.device)
    with torch.cuda.device_of(rows):
        active_blocks_kernel[(chunks,)](
            rows_ptr=rows,
            blocks_ptr=blocks,
            count_ptr=count,
            idle=idle,
            num_n=num_n,
            chunk_rows=chunk_rows,
            BLOCK_N=block,
            AT_ONCE=AT_ONCE,
            num_warps=8,
            **LAUNCH,
        )
    return ActiveBlocks(blocks, count)
