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
    BLOCK,
    OnlineHead,
    TiledHead,
    drop_targets,
    exp_,
    softcap_slope,
)

# The bound adds the largest p_v of each skipped column over the block. No single row has them all:
# its mass is smaller, by 4 to 16 on the text of SmolLM2. These factors are tried in this order, and
# each adds columns to the choice before it; the last fails by rounding at most.
OVERSHOOTS = (16.0, 8.0, 4.0, 1.0)
# Gathering and forming the logits again cost more than they save beyond this share of the columns.
LARGEST_SHARE = 0.4
PROBE = 64  # one row in so many is looked at beforehand, and at least half a block
# Columns kept by a block grow with its rows to this power (64 to 1024 rows of SmolLM2's text).
GROWTH = 0.66
STEPS_PER_NAT, LAST_STEP = 8, 320  # bounds on log p, from 0 to -40


class SparseUnitGradient(NamedTuple):
    unit_gradient: Tensor  # [n, H] d logps / d hidden
    sparsity: Tensor  # [3], a SparsityReport
    # [blocks, V] bool, targets included: where a trained head's gradient of the logits is formed.
    kept_columns: Tensor | None


def looks_sharp(head: TiledHead) -> bool:
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


def sparse_unit_gradient(head: OnlineHead) -> SparseUnitGradient:
    """The unit gradient with at most `grad_tolerance` of any row's mass left out."""
    n, vocab = len(head.hidden), len(head.weight)
    sums = torch.zeros(head.hidden.shape, dtype=head.dtype, device=head.hidden.device)
    skipped = torch.zeros(n, dtype=head.dtype, device=head.hidden.device)
    kept_columns = torch.zeros(head.column_max.values.shape, dtype=torch.bool, device=sums.device)
    dense = []
    for block, column_max in enumerate(head.column_max.values):
        r = slice(block * BLOCK, min((block + 1) * BLOCK, n))
        mass = torch.zeros_like(skipped[r])
        for columns in _growing_choice(column_max, head.options.grad_tolerance):
            kept_columns[block, columns] = True
            if len(columns):
                mass += _multiply(head, r, columns, sums[r])
            skipped[r] = (head.one_minus_p[r] - mass / head.total[r]).clamp_min(0.0)
            # Not `>`: a NaN row proves nothing.
            if (skipped[r] <= head.options.grad_tolerance).all():
                break
        else:
            dense.append(r)
            kept_columns[block] = True
            skipped[r] = 0.0
            sums[r].zero_()
    for start, stop, weight_tile in head.weight_tiles() if dense else ():
        columns = torch.arange(start, stop, device=sums.device)
        for r in dense:
            _multiply(head, r, columns, sums[r], weight_tile)
    block_of_row = torch.arange(n, device=sums.device) // BLOCK
    share = kept_columns.sum(1)[block_of_row].sum() / max(n * vocab, 1)
    worst = skipped.max() if n else skipped.sum()
    sparsity = torch.stack([share.to(worst), worst, worst.new_tensor(len(dense))])
    kept_columns[block_of_row, head.targets.clamp(0, vocab - 1)] = True
    return SparseUnitGradient(head.finish_unit_gradient(sums, head.total), sparsity, kept_columns)


def _growing_choice(column_max: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Columns to keep, each time those to be added to the ones before; ends where too many.

    Left out are the columns with the smallest bounds, an overshoot times the tolerance together.
    """
    steps = _steps(column_max)
    before = -1
    for limit in _limits(steps, tolerance):
        if (steps <= limit).sum() > LARGEST_SHARE * len(steps):
            return
        yield ((steps > before) & (steps <= limit)).nonzero()[:, 0]
        before = limit


def _steps(column_max: Tensor) -> Tensor:
    """[V] int32 steps of 1 / STEPS_PER_NAT by which a bound on log p lies below 0; NaN is 0."""
    return (
        (column_max.float() * -STEPS_PER_NAT).nan_to_num(0.0, LAST_STEP).clamp(0, LAST_STEP).int()
    )


def _limits(steps: Tensor, tolerance: float) -> list[int]:
    """For each overshoot, the step up to which columns have to be kept.

    Whole numbers, so the choice is deterministic. A histogram instead of a sort: a bound counts as
    its step's largest, e^(1/8) too much at most.
    """
    counts = steps.bincount(minlength=LAST_STEP + 1)
    largest = torch.arange(LAST_STEP + 1, device=steps.device).div(-STEPS_PER_NAT).exp()
    beyond = (counts * largest).flip(0).cumsum(0).flip(0)  # of this step and those below it
    budgets = beyond.new_tensor(OVERSHOOTS) * tolerance
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
