"""The certified sparse route: the gradient from the columns that matter, its error checked.

The forward pass notes, per block of rows and column, the largest z_v - max. That bounds p_v for the
whole block. Afterwards each block keeps the columns that may matter, gathers those rows of the
weight, forms their logits again and multiplies. The mass that was kept falls out of that product
exactly, so `grad_tolerance`, the largest mass any row may leave out, is checked and not hoped for;
rows of a block that fails are done over the whole vocabulary. For a sharp policy two products and a
little remain of the exact route's three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from powerflow_fast.backend_torch import OnlineHead

BLOCK = 128  # rows that share one choice of columns
# The bound adds the largest p_v of each skipped column over the block. No single row has them
# all: its mass is smaller by a factor like these, which are tried in this order.
SLACKS = (16.0, 2.0)


class Peaks:
    """[blocks, V] largest z_v - max over a block's rows, targets left out: bounds log p_v."""

    def __init__(self, rows: int, weight: Tensor) -> None:
        shape = (-(-rows // BLOCK), len(weight))
        self.values = torch.full(shape, -torch.inf, dtype=torch.bfloat16, device=weight.device)

    def update(self, z: Tensor, first_row: int, start: int, stop: int) -> None:
        """Note columns start:stop of the rows from `first_row` (a multiple of BLOCK); z - max."""
        for offset in range(0, len(z), BLOCK):
            block = (first_row + offset) // BLOCK
            self.values[block, start:stop] = z[offset : offset + BLOCK].amax(0)


def certified_direction(head: OnlineHead) -> tuple[Tensor, Tensor]:
    """d logps / d hidden [n, H] with at most `grad_tolerance` of any row's mass left out.

    Returns it with the certificate [3]: the share of columns kept, the largest mass left out of any
    row, and the number of blocks that went over the whole vocabulary.
    """
    n, vocab = len(head.hidden), len(head.weight)
    sums = torch.zeros(head.hidden.shape, dtype=head.dtype, device=head.hidden.device)
    skipped = torch.zeros(n, dtype=head.dtype, device=head.hidden.device)
    kept_columns, dense = 0, []
    for block in range(len(head.peaks.values)):
        r = slice(block * BLOCK, min((block + 1) * BLOCK, n))
        for slack in SLACKS:
            columns = _columns(head.peaks.values[block], slack * head.options.grad_tolerance)
            if len(columns) > vocab // 2:  # gathering costs more than it saves
                continue
            mass = _multiply(head, r, columns, sums[r].zero_())
            skipped[r] = (head.other_share[r] - mass).clamp_min(0.0)
            # Not `>`: a NaN row proves nothing.
            if (skipped[r] <= head.options.grad_tolerance).all():
                kept_columns += len(columns) * (r.stop - r.start)
                break
        else:
            dense.append(r)
            kept_columns += vocab * (r.stop - r.start)
    for r in dense:
        skipped[r] = 0.0
        sums[r].zero_()
    for start, stop, weight_tile in head.weight_tiles() if dense else ():
        columns = torch.arange(start, stop, device=sums.device)
        for r in dense:
            _multiply(head, r, columns, sums[r], weight_tile)
    share = kept_columns / max(n * vocab, 1)
    worst = skipped.max() if n else skipped.sum()
    certificate = torch.stack([worst.new_tensor(share), worst, worst.new_tensor(len(dense))])
    return head.finish_direction(sums, torch.ones_like(skipped)), certificate


def _columns(peaks: Tensor, budget: float) -> Tensor:
    """The columns that stay when those with the smallest bounds, `budget` together, are skipped."""
    bounds, order = peaks.float().exp_().sort()
    first = int(torch.searchsorted(bounds.cumsum(0), budget))
    return order[first:].sort().values


def _multiply(
    head: OnlineHead, r: slice, columns: Tensor, sums: Tensor, weight_tile: Tensor | None = None
) -> Tensor:
    """sums += sum over `columns`, targets left out, of p_v J_v W_v; returns their mass [rows]."""
    from powerflow_fast.backend_torch import softcap_slope

    if weight_tile is None:
        weight_tile = head.weight[columns].to(head.product_dtype)
    z = head.logits(r, weight_tile, None if head.bias is None else head.bias[columns])
    slope = None if head.options.softcap is None else softcap_slope(z, head.options)
    p = z.sub_(head.maximum[r][:, None]).sub_(head.log_total[r][:, None]).exp_()
    p.masked_fill_(columns == head.targets[r][:, None], 0.0)
    mass = p.sum(1)
    head.accumulate(sums, p if slope is None else p.mul_(slope), weight_tile)
    return mass
