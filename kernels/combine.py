"""Per-tile softmax statistics to log-probabilities, log-sum-exp and entropy.

The eager code it replaces:

    lse = torch.logsumexp(logits, 1)                                          # [rows]
    logps = logits.gather(1, targets) - lse                                   # 0 where ignored
    entropy = lse - (torch.softmax(logits, 1) * logits).sum(1)                # 0 where ignored

Nothing is read of a row that is ignored, as the statistics may leave it unwritten: its lse and
shift are 0, its total is 1.

logps is (target_logit - shift) - log(total), not target_logit - lse: under a large common offset
the first difference is small and exact, the second loses the digits lse has spent on the offset.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH
from powerflow_fast.kernels.statistics import Statistics
from powerflow_fast.kernels.tiles import LN2, above_shift

BLOCKS = {"BLOCK_R": 32, "BLOCK_P": 32}


@triton.jit
def combine_kernel(
    tile_shift_ptr,  # [parts, rows]
    tile_total_ptr,  # [parts, rows]
    tile_spread_ptr,  # [parts, rows] or None
    target_logit_ptr,  # [rows]
    targets_ptr,  # [N]; row r belongs to token r % N
    logps_ptr,  # [models, N], row stride stride_model
    lse_ptr,  # [models, N] likewise
    entropy_ptr,  # [models, N] likewise, or None
    row_shift_ptr,  # [rows]
    row_total_ptr,  # [rows]
    num_parts,
    num_rows,
    num_n,
    stride_model,
    ignore_index,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, BLOCK_P)
    mask_r = offs_r < num_rows
    offs_n = offs_r % num_n
    counted = tl.load(targets_ptr + offs_n, mask=mask_r, other=ignore_index) != ignore_index
    # Running maxima start at -inf, and so count parts that do not exist.
    highest = tl.full([BLOCK_P, BLOCK_R], float("-inf"), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + offs_p
        mask = (part < num_parts)[:, None] & counted[None, :]
        offs = part.to(tl.int64)[:, None] * num_rows + offs_r[None, :]
        highest = tl.maximum(
            highest, tl.load(tile_shift_ptr + offs, mask=mask, other=float("-inf"))
        )
    row_shift = tl.where(counted, tl.max(highest, 0), 0.0)
    base = tl.where(row_shift == float("-inf"), 0.0, row_shift)

    totals = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    spreads = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + offs_p
        mask = (part < num_parts)[:, None] & counted[None, :]
        offs = part.to(tl.int64)[:, None] * num_rows + offs_r[None, :]
        moved = tl.load(tile_shift_ptr + offs, mask=mask, other=float("-inf")) - base[None, :]
        factor = tl.exp2(moved)  # of an integer: exact
        total = tl.load(tile_total_ptr + offs, mask=mask, other=0.0)
        totals += factor * total
        if tile_spread_ptr is not None:
            spread = tl.load(tile_spread_ptr + offs, mask=mask, other=0.0)
            spreads += factor * (spread + total * tl.where(factor == 0, 0.0, moved))
    row_total = tl.where(counted, tl.sum(totals, 0), 1.0)

    target_logit = tl.load(target_logit_ptr + offs_r, mask=mask_r, other=0.0)
    log_total = tl.log2(row_total)
    logps = (above_shift(target_logit, base) - log_total) * LN2
    offs_out = (offs_r // num_n).to(tl.int64) * stride_model + offs_n
    tl.store(logps_ptr + offs_out, tl.where(counted, logps, 0.0), mask=mask_r)
    tl.store(lse_ptr + offs_out, (row_shift + log_total) * LN2, mask=mask_r)
    tl.store(row_shift_ptr + offs_r, row_shift, mask=mask_r)
    tl.store(row_total_ptr + offs_r, row_total, mask=mask_r)
    if entropy_ptr is not None:
        entropy = (log_total - tl.sum(spreads, 0) / row_total) * LN2
        tl.store(entropy_ptr + offs_out, tl.where(counted, entropy, 0.0), mask=mask_r)


def combine(
    statistics: Statistics,
    targets: torch.Tensor,  # [N] contiguous
    ignore_index: int,
    logps: torch.Tensor,  # [models, N] to be filled, unit stride along N
    lse: torch.Tensor,  # [models, N] likewise, same strides
    entropy: torch.Tensor | None,  # [models, N] likewise
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> shift and total of every row [rows], to which the exact route refers its numerators."""
    num_parts, num_rows = statistics.tile_shift.shape
    row_shift = torch.empty_like(statistics.target_logit)
    row_total = torch.empty_like(row_shift)
    with torch.cuda.device_of(targets):
        combine_kernel[(triton.cdiv(num_rows, BLOCKS["BLOCK_R"]),)](
            tile_shift_ptr=statistics.tile_shift,
            tile_total_ptr=statistics.tile_total,
            tile_spread_ptr=statistics.tile_spread,
            target_logit_ptr=statistics.target_logit,
            targets_ptr=targets,
            logps_ptr=logps,
            lse_ptr=lse,
            entropy_ptr=entropy,
            row_shift_ptr=row_shift,
            row_total_ptr=row_total,
            num_parts=num_parts,
            num_rows=num_rows,
            num_n=targets.shape[0],
            stride_model=logps.stride(0),
            ignore_index=ignore_index,
            **BLOCKS,
            **LAUNCH,
        )
    return row_shift, row_total
