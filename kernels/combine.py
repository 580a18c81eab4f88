"""Per-tile softmax statistics to log-probabilities, log-sum-exp and entropy.

The eager code it replaces:

    lse = torch.logsumexp(logits, 1)                                          # [rows]
    logps = logits.gather(1, targets) - lse                                   # 0 where ignored
    entropy = lse - (torch.softmax(logits, 1) * logits).sum(1)                # 0 where ignored
    one_minus_p = 1 - logps.exp()                                             # NaN where logps are

Nothing is read of a row that is ignored, as the statistics may leave it unwritten: its lse and
shift are 0, its total is 1.

The statistics leave the target out. So 1 - p = others / total has all its digits, and log p where
the target has most of the mass, -log(1 + others / p). Elsewhere logps is (target_logit - shift) -
log(total), not target_logit - lse: under a large common offset the first difference is small and
exact, the second loses the digits lse has spent on the offset.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH, ceil_div
from powerflow_fast.kernels.statistics import Heads, Statistics
from powerflow_fast.kernels.tiles import LN2, above_shift, sum_rows

BLOCKS = {"BLOCK_R": 32, "BLOCK_P": 32}
# Powers of two between which a row's total may lie. The column that set its shift adds a half or
# more, unless it is the target; float32 ends at 2^128, and totals of tiles are summed.
LOWEST, HIGHEST = tl.constexpr(-100.0), tl.constexpr(120.0)


@triton.jit
def log1p2(x):
    """log2(1 + x) to all digits: what 1 + x lost to rounding is made up for (x >= 0)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x / LN2, tl.log2(above) * (x / (above - 1.0)))


@triton.jit
def combine_kernel(
    statistics,  # Statistics; without a row_shift each part has its own
    targets_ptr,  # [N]; row r belongs to token r % N
    misled,  # Misled, to be filled, or read if AGAIN; or None
    results,  # Results, model stride stride_model
    out,  # Rows
    num_parts,
    num_rows,
    num_n,
    num_v,
    stride_model,
    ignore_index,
    AGAIN: tl.constexpr,  # misled rows alone
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, BLOCK_P)
    mask_r = offs_r < num_rows
    offs_n = offs_r % num_n
    if AGAIN:
        mask_r &= tl.load(misled.rows + offs_r, mask=mask_r, other=0) != 0
        if tl.max(mask_r.to(tl.int32), 0) == 0:
            return
    target = tl.load(targets_ptr + offs_n, mask=mask_r, other=ignore_index)
    counted = mask_r & (target != ignore_index)
    if statistics.row_shift is not None:
        row_shift = tl.load(statistics.row_shift + offs_r, mask=counted, other=0.0)
    else:
        # Running maxima start at -inf, and so count parts that do not exist.
        highest = tl.full([BLOCK_P, BLOCK_R], float("-inf"), tl.float32)
        for start in range(0, num_parts, BLOCK_P):
            part = start + offs_p
            mask = (part < num_parts)[:, None] & counted[None, :]
            offs = part.to(tl.int64)[:, None] * num_rows + offs_r[None, :]
            highest = tl.maximum(
                highest, tl.load(statistics.tile_shift + offs, mask=mask, other=float("-inf"))
            )
        row_shift = tl.where(counted, tl.max(highest, 0), 0.0)
    base = tl.where(row_shift == float("-inf"), 0.0, row_shift)

    totals = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    weighted_sums = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        part = start + offs_p
        mask = (part < num_parts)[:, None] & counted[None, :]
        offs = part.to(tl.int64)[:, None] * num_rows + offs_r[None, :]
        total = tl.load(statistics.tile_total + offs, mask=mask, other=0.0)
        if statistics.row_shift is not None:
            totals += total
            if statistics.tile_weighted_sum is not None:
                weighted_sums += tl.load(statistics.tile_weighted_sum + offs, mask=mask, other=0.0)
        else:
            moved = (
                tl.load(statistics.tile_shift + offs, mask=mask, other=float("-inf"))
                - base[None, :]
            )
            factor = tl.exp2(moved)  # of an integer: exact
            totals += factor * total
            if statistics.tile_weighted_sum is not None:
                weighted = tl.load(statistics.tile_weighted_sum + offs, mask=mask, other=0.0)
                weighted_sums += factor * (weighted + total * tl.where(factor == 0, 0.0, moved))
    others = sum_rows(totals)
    inside = counted & (target >= 0) & (target < num_v)
    target_logit = tl.load(statistics.target_logit + offs_r, mask=mask_r, other=0.0)
    target_centred = above_shift(target_logit, base)
    target_exp = tl.where(inside, tl.exp2(target_centred), 0.0)
    total = tl.where(counted, others + target_exp, 1.0)
    log_total = tl.log2(total)
    if misled is not None and not AGAIN:
        # Not `<`: NaN is out of bounds, too.
        wrong = counted & ~((log_total > LOWEST) & (log_total < HIGHEST))
        tl.store(misled.rows + offs_r, wrong.to(tl.int32), mask=mask_r)
        shift = tl.where(wrong, float("-inf"), row_shift)
        tl.store(misled.shift + offs_r, shift, mask=mask_r)
        block = offs_n // misled.block  # of several misled rows all store the same
        tl.store(misled.blocks + block, block, mask=wrong)
        tl.store(misled.count + 0 * block, tl.cdiv(num_n, misled.block), mask=wrong)

    # The total's own power of two goes to the shift: the rest that is rounded is small.
    power = tl.where((total > 0.0) & (log_total < HIGHEST), tl.floor(log_total), 0.0)
    near = total * tl.exp2(-power)
    log_near = tl.log2(near)
    logps = (above_shift(target_logit, base + power) - log_near) * LN2
    logps = tl.where(target_exp > others, -log1p2(others / target_exp) * LN2, logps)
    offs_out = (offs_r // num_n).to(tl.int64) * stride_model + offs_n
    tl.store(results.logps + offs_out, tl.where(counted, logps, 0.0), mask=mask_r)
    tl.store(results.lse + offs_out, (base + power + log_near) * LN2, mask=mask_r)
    tl.store(out.shift + offs_r, base + power, mask=mask_r)
    tl.store(out.total + offs_r, near, mask=mask_r)
    one_minus_p = tl.where(inside, others / total, float("nan"))
    tl.store(out.one_minus_p + offs_r, tl.where(counted, one_minus_p, 0.0), mask=mask_r)
    if out.factor is not None:
        tl.store(out.factor + offs_r, 1.0 / total, mask=mask_r)
    if results.entropy is not None:
        weighted = sum_rows(weighted_sums)
        weighted += tl.where(target_exp == 0, 0.0, target_exp * target_centred)
        entropy = (log_total - weighted / total) * LN2
        tl.store(results.entropy + offs_out, tl.where(counted, entropy, 0.0), mask=mask_r)


class Rows(NamedTuple):
    """What the kernel leaves of every row beside its results; p = exp2(z - shift) / total."""

    shift: torch.Tensor  # [rows], in units of log 2
    total: torch.Tensor  # [rows]
    one_minus_p: torch.Tensor  # [rows] 1 - p of the target, NaN where it is outside the vocabulary
    factor: torch.Tensor | None  # [rows] p of an exp-logit of 1, where the row's shift was given


class Misled(NamedTuple):
    """Rows whose given shift led their total out of bounds, and what doing them again takes."""

    rows: torch.Tensor  # [rows] int32
    shift: torch.Tensor  # [rows] -inf where a row was misled, elsewhere the given shift
    blocks: torch.Tensor  # [row blocks] int32, -1 where no row was misled
    count: torch.Tensor  # [1] int32 of all row blocks, -1 where no block has such a row
    block: int  # rows of a block


def new_misled(shift: torch.Tensor, heads: Heads) -> Misled:
    """For `combine` to fill."""
    block = heads.tile.rows
    none = shift.new_full((ceil_div(len(heads.targets), block) + 1,), -1, dtype=torch.int32)
    rows = torch.empty_like(shift, dtype=torch.int32)
    return Misled(rows, torch.empty_like(shift), none[:-1], none[-1:], block)


class Results(NamedTuple):
    """To be filled for both models; unit stride along N, one stride along the models."""

    logps: torch.Tensor  # [models, N]
    lse: torch.Tensor  # [models, N]
    entropy: torch.Tensor | None  # [models, N]


def new_results(heads: Heads) -> Results:
    shape = (heads.models, len(heads.targets))
    logps = heads.targets.new_empty(shape, dtype=torch.float32)
    entropy = torch.empty_like(logps) if heads.options.entropy else None
    return Results(logps, torch.empty_like(logps), entropy)


def combine(
    statistics: Statistics,
    heads: Heads,
    results: Results,  # to be filled
    misled: Misled | None = None,  # to be filled
    again: bool = False,  # misled rows alone, of a `misled` that is filled
    out: Rows | None = None,  # to be filled
) -> Rows:
    num_parts, num_rows = statistics.tile_total.shape
    if out is None:
        new = [torch.empty_like(statistics.target_logit) for _ in range(4)]
        out = Rows(*new[:3], new[3] if statistics.row_shift is not None else None)
    with torch.cuda.device_of(heads.targets):
        combine_kernel[(ceil_div(num_rows, BLOCKS["BLOCK_R"]),)](
            statistics=statistics,
            targets_ptr=heads.targets,
            misled=misled,
            results=results,
            out=out,
            num_parts=num_parts,
            num_rows=num_rows,
            num_n=len(heads.targets),
            num_v=heads.num_v,
            stride_model=results.logps.stride(0),
            ignore_index=heads.options.ignore_index,
            AGAIN=again,
            **BLOCKS,
            **LAUNCH,
        )
    return out
