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

from powerflow_fast.tiled_head import Head, OnlineHead, softcap_slope

BLOCK = 128  # rows that share one choice of columns
# The bound adds the largest p_v of each skipped column over the block. No single row has them all:
# its mass is smaller, by 4 to 16 on the text of SmolLM2. These factors are tried in this order, and
# each adds its columns to those of the one before; the last fails by rounding at most.
SLACKS = (16.0, 8.0, 4.0, 1.0)
# Gathering and forming the logits again cost more than they save beyond this share of the columns.
LARGEST_SHARE = 0.4
PROBE = 32  # one row in so many is looked at beforehand


class SparseDirection(NamedTuple):
    direction: Tensor  # [n, H] d logps / d hidden
    certificate: Tensor  # [3] share of columns kept, worst mass left out of a row, dense blocks
    kept: Tensor  # [blocks, V] bool, targets included: where the gradient of the logits is formed


class Peaks:
    """[blocks, V] largest z_v - max over a block's rows, targets left out: bounds log p_v."""

    def __init__(self, rows: int, weight: Tensor) -> None:
        shape = (num_blocks(rows), len(weight))
        self.values = torch.full(shape, -torch.inf, dtype=torch.float16, device=weight.device)

    def update(self, z: Tensor, first_row: int, start: int, stop: int) -> None:
        """Note columns start:stop of the rows from `first_row` (a multiple of BLOCK); z - max."""
        for offset in range(0, len(z), BLOCK):
            block = (first_row + offset) // BLOCK
            self.values[block, start:stop] = z[offset : offset + BLOCK].amax(0)


def num_blocks(rows: int) -> int:
    return -(-rows // BLOCK)


def exact_certificate(rows: int, block: int, like: Tensor) -> Tensor:
    """That of a direction formed over the whole vocabulary for every block of rows."""
    certificate = like.new_zeros(3)
    certificate[0], certificate[2] = 1.0, -(-rows // block)  # fills: no copy from the host
    return certificate


def looks_sharp(head: Head) -> bool:
    """Whether a block made of every PROBE-th row would keep few enough columns."""
    n, vocab = len(head.hidden), len(head.weight)
    if n < 4 * BLOCK:  # the look would cost as much as it saves
        return True
    sample = head.of_rows(slice(0, n, PROBE))
    z = sample.hidden.new_empty((len(sample.hidden), vocab), dtype=head.dtype)
    for start, stop, weight_tile in sample.weight_tiles():
        for r in sample.row_slices():
            z[r, start:stop] = sample.logits(r, weight_tile, sample.bias_tile(start, stop))
    p = z.softmax(1).scatter_(1, sample.targets.clamp(0, vocab - 1)[:, None], 0.0)
    skipped = p.amax(0).sort().values.cumsum(0)
    kept = (skipped > SLACKS[-2] * head.options.grad_tolerance).sum()
    return bool(kept <= LARGEST_SHARE * vocab)


def sparse_direction(head: OnlineHead) -> SparseDirection:
    """The direction with at most `grad_tolerance` of any row's mass left out."""
    n, vocab = len(head.hidden), len(head.weight)
    sums = torch.zeros(head.hidden.shape, dtype=head.dtype, device=head.hidden.device)
    skipped = torch.zeros(n, dtype=head.dtype, device=head.hidden.device)
    kept = torch.zeros(head.peaks.values.shape, dtype=torch.bool, device=sums.device)
    dense = []
    for block, peaks in enumerate(head.peaks.values):
        r = slice(block * BLOCK, min((block + 1) * BLOCK, n))
        mass = torch.zeros_like(skipped[r])
        for columns in _growing_choice(peaks, head.options.grad_tolerance):
            kept[block, columns] = True
            mass += _multiply(head, r, columns, sums[r])
            skipped[r] = (head.other_share[r] - mass).clamp_min(0.0)
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
    return SparseDirection(head.finish_direction(sums, torch.ones_like(skipped)), certificate, kept)


def _growing_choice(peaks: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Columns to keep, each time those to be added to the ones before; ends where too many.

    Left out are the columns with the smallest bounds, a slack times the tolerance together.
    """
    vocab = len(peaks)
    bounds, order = peaks.float().exp_().sort()
    budgets = bounds.new_tensor([slack * tolerance for slack in SLACKS])
    last = vocab
    for first in torch.searchsorted(bounds.cumsum(0), budgets).tolist():
        if vocab - first > LARGEST_SHARE * vocab:
            return
        if first < last or last == vocab:
            yield order[first:last].sort().values
        last = first


def _multiply(
    head: OnlineHead, r: slice, columns: Tensor, sums: Tensor, weight_tile: Tensor | None = None
) -> Tensor:
    """sums += sum over `columns`, targets left out, of p_v J_v W_v; returns their mass [rows]."""
    if weight_tile is None:
        weight_tile = head.weight[columns].to(head.product_dtype)
    z = head.logits(r, weight_tile, None if head.bias is None else head.bias[columns])
    slope = None if head.options.softcap is None else softcap_slope(z, head.options)
    p = z.sub_(head.maximum[r][:, None]).sub_(head.log_total[r][:, None]).exp_()
    p.masked_fill_(columns == head.targets[r][:, None], 0.0)
    mass = p.sum(1)
    head.accumulate(sums, p if slope is None else p.mul_(slope), weight_tile)
    return mass
