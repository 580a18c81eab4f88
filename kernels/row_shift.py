"""One shift for every row, known before the pass over the vocabulary.

The eager code it replaces, with z the logits in units of log 2:

    shift = ceil(z[:, pilot].amax(1))                                         # [N]
    shift = where(total within bounds, shift, ceil(z.amax(1)))

The pilot columns lie evenly over the vocabulary; they cost PILOT / V of a product. A shift may be
off by 100 powers of two before a float32 total of exp2(z - shift) is out of range: only exponents
differ, no digit does. Rows that are further off are done again with their true maximum, by programs
that mostly find, on the device, that there is nothing to do: no host waits. A block of rows is done
as a whole; those that were right get the same numbers again.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.active_blocks import ActiveBlocks, active_blocks
from powerflow_fast.kernels.combine import Rows, combine
from powerflow_fast.kernels.config import LAUNCH, Tile
from powerflow_fast.kernels.statistics import Statistics, logit_statistics, row_maxima
from powerflow_fast.kernels.tiles import Operands

PILOT = 256  # columns
BLOCKS = {"BLOCK_R": 64, "BLOCK_T": 32}


@triton.jit
def true_shift_kernel(
    maxima_ptr,  # [tiles, rows], read where a row was misled
    misled_ptr,  # [N] int32; row r belongs to token r % N
    pilot_ptr,  # [rows]
    shift_ptr,  # [rows] to be filled
    num_tiles,
    num_rows,
    num_n,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    misled = tl.load(misled_ptr + offs_r % num_n, mask=mask_r, other=0) != 0
    shift = tl.load(pilot_ptr + offs_r, mask=mask_r, other=0.0)
    if tl.max(misled.to(tl.int32), 0) != 0:
        highest = tl.full([BLOCK_T, BLOCK_R], float("-inf"), tl.float32)
        for start in range(0, num_tiles, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            offs = tile.to(tl.int64)[:, None] * num_rows + offs_r[None, :]
            mask = (tile < num_tiles)[:, None] & misled[None, :]
            tile_maxima = tl.load(maxima_ptr + offs, mask=mask, other=float("-inf"))
            highest = tl.maximum(highest, tile_maxima)
        shift = tl.where(misled, tl.max(highest, 0), shift)
    tl.store(shift_ptr + offs_r, shift, mask=mask_r)


def true_shift(
    maxima: torch.Tensor,  # [tiles, models * N]
    misled: torch.Tensor,  # [N] int32
    pilot: torch.Tensor,  # [models * N]
) -> torch.Tensor:
    """-> [models * N], the pilot's where it did not mislead."""
    shift = torch.empty_like(pilot)
    num_tiles, num_rows = maxima.shape
    with torch.cuda.device_of(maxima):
        true_shift_kernel[(triton.cdiv(num_rows, BLOCKS["BLOCK_R"]),)](
            maxima_ptr=maxima,
            misled_ptr=misled,
            pilot_ptr=pilot,
            shift_ptr=shift,
            num_tiles=num_tiles,
            num_rows=num_rows,
            num_n=len(misled),
            **BLOCKS,
            **LAUNCH,
        )
    return shift


def pilot_shift(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    active: ActiveBlocks,
    options,
    tile: Tile,
    use_tma: bool,
) -> torch.Tensor:
    """-> [models * N], unwritten in blocks that are not active."""
    models = _pilot(policy), None if reference is None else _pilot(reference)
    maxima = row_maxima(*models, targets, active, options, tile, use_tma)
    return maxima[0] if len(maxima) == 1 else maxima.amax(0)


def _pilot(model: Operands) -> Operands:
    """Of the same hidden states, with the pilot columns alone; a view of the weight."""
    step = max(1, len(model.weight) // PILOT)
    columns = slice(0, PILOT * step, step)
    bias = None if model.bias is None else model.bias[columns].contiguous()
    return model._replace(weight=model.weight[columns], bias=bias)


def redo_misled(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    misled: torch.Tensor,  # [N] int32 as `combine` left it
    statistics: Statistics,  # as all that follows, written again where rows were misled
    rows: Rows,
    logps: torch.Tensor,  # [models, N]
    lse: torch.Tensor,  # [models, N]
    entropy: torch.Tensor | None,  # [models, N]
    soft: torch.Tensor | None,  # [N, padded_columns]
    search,
    options,
    tile: Tile,
    use_tma: bool,
) -> None:
    blocks = active_blocks(misled, 0, tile.rows)
    models = (policy, reference, targets)
    maxima = row_maxima(*models, blocks, options, tile, use_tma, out=statistics.tile_total)
    shift = true_shift(maxima, misled, statistics.row_shift)
    statistics = statistics._replace(row_shift=shift)
    few = replace(tile, persistent=True)  # as many programs as run at once: most find no work
    logit_statistics(*models, soft, options, few, use_tma, search, shift, blocks, statistics)
    results = (logps, lse, entropy)
    num_v = len(policy.weight)
    combine(statistics, targets, num_v, options.ignore_index, *results, only=misled, out=rows)
