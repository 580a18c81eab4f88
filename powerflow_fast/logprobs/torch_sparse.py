"""The certified sparse route: the gradient from the columns that matter, its error checked.

The forward pass notes, per block of rows and column, the largest z_v - max. That bounds p_v for the
whole block. Afterwards each block keeps the columns that may matter, gathers those rows of the
weight, forms their logits again and multiplies. The mass that was kept falls out of that product
exactly, so `grad_tolerance`, the largest mass any row may leave out, is checked and not hoped for;
rows of a block that fails are done over the whole vocabulary. For a sharp policy two products and a
little remain of the exact route's three; a flat one is recognised on a few rows beforehand and
takes the exact route.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from powerflow_fast.logprobs.torch_tiles import (
    Head,
    OnlineHead,
    drop_targets,
    exp_,
    softcap_slope,
)

# Rows that share one choice of columns. 64 keep about half of what 128 keep, and cost least of 32,
# 64 and 128 on two CPU cores.
BLOCK = 64
# The bound adds the largest p_v of each skipped column over the block. No single row has them all:
# its mass is smaller, by 4 to 16 on the text of SmolLM2. These factors are tried in this order, and
# each adds its columns to those of the one before; the last fails by rounding at most.
SLACKS = (16.0, 8.0, 4.0, 1.0)
# Gathering and forming the logits again cost more than they save beyond this share of the columns.
LARGEST_SHARE = 0.4
PROBE = 64  # one row in so many is looked at beforehand, and at least half a block
# Columns kept by a block grow with its rows to this power (64 to 1024 rows of SmolLM2's text).
GROWTH = 0.66
STEPS_PER_NAT, LAST_STEP = 8, 320  # bounds on log p, from 0 to -40


class SparseDirection(NamedTuple):
    direction: Tensor  # [n, H] d logps / d hidden
    certificate: Tensor  # [3] share of columns kept, worst mass left out of a row, dense blocks
    # [blocks, V] bool, targets included: where the gradient of the logits is formed, if wanted.
    kept: Tensor | None


class Peaks:
    """[blocks, V] largest z_v - max over a block's rows, targets left out: bounds log p_v."""

    def __init__(self, rows: int, weight: Tensor) -> None:
        shape = (num_blocks(rows), len(weight))
        self.values = torch.full(shape, -torch.inf, dtype=torch.float16, device=weight.device)

    def update(self, z: Tensor, first_row: int, start: int, stop: int) -> None:
        """Note columns start:stop of the rows from `first_row` (a multiple of BLOCK); z - max."""
        first, whole = first_row // BLOCK, len(z) // BLOCK
        blocks = z[: whole * BLOCK].view(whole, BLOCK, z.shape[1])
        self.values[first : first + whole, start:stop] = blocks.amax(1)
        if whole * BLOCK < len(z):  # the batch's last rows
            self.values[first + whole, start:stop] = z[whole * BLOCK :].amax(0)


def num_blocks(rows: int) -> int:
    return -(-rows // BLOCK)


def exact_certificate(rows: int, block: int, like: Tensor) -> Tensor:
    """That of a direction formed over the whole vocabulary for every block of rows."""
    certificate = like.new_zeros(3)
    # fill_ takes the number along; an assignment would copy it from the host, which waits.
    certificate[:1].fill_(1.0)
    certificate[2:].fill_(-(-rows // block))
    return certificate


def looks_sharp(head: Head) -> bool:
    """Whether blocks would keep few enough columns, from one made of rows all over the batch."""
    n, vocab = len(head.hidden), len(head.weight)
    if n < 4 * BLOCK:  # the look would cost as much as it saves
        return True
    sample = head.of_rows(slice(0, n, n // max(BLOCK // 2, n // PROBE)))
    rows = len(sample.hidden)
    z = sample.hidden.new_empty((rows, vocab), dtype=head.dtype)
    for start, stop, weight_tile in sample.weight_tiles():
        for r in sample.row_slices():
            z[r, start:stop] = sample.logits(r, weight_tile, sample.bias_tile(start, stop))
    p = z.softmax(1).scatter_(1, sample.targets.clamp(0, vocab - 1)[:, None], 0.0)
    steps = _steps(p.amax(0).log())
    kept = (steps <= _limits(steps, head.options.grad_tolerance)[-2]).sum()
    return bool(kept <= LARGEST_SHARE * min(1.0, rows / BLOCK) ** GROWTH * vocab)


def sparse_direction(head: OnlineHead) -> SparseDirection:
    """The direction with at most `grad_tolerance` of any row's mass left out."""
    n, vocab = len(head.hidden), len(head.weight)
    sums = torch.zeros(head.hidden.shape, dtype=head.dtype, device=head.hidden.device)
    skipped = torch.zeros(n, dtype=head.dtype, device=head.hidden.device)
    kept = torch.zeros(head.peaks.values.shape, dtype=torch.bool, device=sums.device)
    total = head.others + head.target_share  # sum_v e^(z_v - max)
    dense = []
    for block, peaks in enumerate(head.peaks.values):
        r = slice(block * BLOCK, min((block + 1) * BLOCK, n))
        mass = torch.zeros_like(skipped[r])
        for columns in _growing_choice(peaks, head.options.grad_tolerance):
            kept[block, columns] = True
            if len(columns):
                mass += _multiply(head, r, columns, sums[r])
            skipped[r] = (head.other_share[r] - mass / total[r]).clamp_min(0.0)
            # Not `>`: a NaN row proves nothing.
            if (skipped[r] <= head.options.grad_tolerance).all():
                break
        else:
            dense.append(r)
            kept[block] = True
            skipped[r] = 0.0
            sums[r].zero_()
    for start, stop, weight_tile in head.weight_tiles() if dense else ():
        columns = torch.arange(start, stop, device=sums.device)
        for r in dense:
            _multiply(head, r, columns, sums[r], weight_tile)
    block_of_row = torch.arange(n, device=sums.device) // BLOCK
    share = kept.sum(1)[block_of_row].sum() / max(n * vocab, 1)
    worst = skipped.max() if n else skipped.sum()
    certificate = torch.stack([share.to(worst), worst, worst.new_tensor(len(dense))])
    kept[block_of_row, head.targets.clamp(0, vocab - 1)] = True
    return SparseDirection(head.finish_direction(sums, total), certificate, kept)


def _growing_choice(peaks: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Columns to keep, each time those to be added to the ones before; ends where too many.

    Left out are the columns with the smallest bounds, a slack times the tolerance together.
    """
    steps = _steps(peaks)
    before = -1
    for limit in _limits(steps, tolerance):
        if (steps <= limit).sum() > LARGEST_SHARE * len(steps):
            return
        yield ((steps > before) & (steps <= limit)).nonzero()[:, 0]
        before = limit


def _steps(peaks: Tensor) -> Tensor:
    """[V] int32 steps of 1 / STEPS_PER_NAT by which a bound on log p lies below 0; NaN is 0."""
    return (peaks.float() * -STEPS_PER_NAT).nan_to_num(0.0, LAST_STEP).clamp(0, LAST_STEP).int()


def _limits(steps: Tensor, tolerance: float) -> list[int]:
    """For each slack, the step up to which columns have to be kept. Whole numbers: deterministic.

    A histogram instead of a sort; a bound counts as its step's largest, e^(1/8) too much at most.
    """
    counts = steps.bincount(minlength=LAST_STEP + 1)
    largest = torch.arange(LAST_STEP + 1, device=steps.device).div(-STEPS_PER_NAT).exp()
    beyond = (counts * largest).flip(0).cumsum(0).flip(0)  # of this step and those below it
    budgets = beyond.new_tensor(SLACKS) * tolerance
    # A step may go if it and all below fit; the last that may not is the limit.
    return ((beyond > budgets[:, None]).sum(1) - 1).tolist()


def _multiply(
    head: OnlineHead, r: slice, columns: Tensor, sums: Tensor, weight_tile: Tensor | None = None
) -> Tensor:
    """sums += sum over `columns`, targets left out, of e^(z_v - max) J_v W_v; returns the masses.

    `columns` are ascending.
    """
    if weight_tile is None:
        weight_tile = head.factor(head.weight.index_select(0, columns))
    z = head.logits(r, weight_tile, None if head.bias is None else head.bias[columns])
    slope = None if head.options.softcap is None else softcap_slope(z, head.options)
    drop_targets(z, head.targets[r], columns)
    e = exp_(z.sub_(head.maximum[r][:, None]))
    mass = e.sum(1)
    head.accumulate(sums, e if slope is None else e.mul_(slope), weight_tile)
    return mass
