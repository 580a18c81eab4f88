"""Softmax numerators that a trained head keeps from the forward pass to the backward pass.

The gradient of the weight is dlogits.T @ hidden, and dlogits wait for the upstream gradient. If the
logits are formed once more for them, a step with a reference takes five products; rows whose
numerators are kept take four. What is kept is bounded by the size of the weight's own gradient in
float32, [V, H], for which a step that trains the head has room anyway, and by `LARGEST_BYTES`: H
rows in float32, 2 H in a 16-bit type. The rows beyond are recomputed. The head is the last of the
forward pass and the first of the backward pass, so the numerators live briefly, but at its peak.

They are stored in the type of the operands: rounded once, as dlogits are before a product in that
type. The target's, 1 - p, is kept in float32: a confident policy needs its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_BYTES = 2 << 30


class Layout(NamedTuple):
    """How a back end cuts the vocabulary."""

    piece: int  # columns that share a factor
    multiple: int  # of which the stored columns are a whole number


class Numerators(NamedTuple):
    """Of the first rows that count; filled by a back end's `forward`, read by its `backward`."""

    values: Tensor  # [rows, columns] e^(z - shift) J 2^exponent of each piece; 0 at the target
    factors: Tensor  # [pieces, rows] values * factors = p J
    own: Tensor  # [rows] (1 - p) J of the target

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    def of_rows(self, r: slice) -> Numerators:
        return Numerators(self.values[r], self.factors[:, r], self.own[r])


def new_numerators(hidden: Tensor, weight: Tensor, layout: Layout, wanted: bool) -> Numerators:
    """Uninitialised, or without a row if not wanted; the sizes depend on shapes and types alone."""
    (num_n, num_h), num_v = hidden.shape, weight.shape[0]
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    columns = -(-num_v // layout.multiple) * layout.multiple
    budget = min(LARGEST_BYTES, 4 * num_v * num_h)
    rows = torch.sym_min(num_n, budget // (columns * hidden.element_size())) if wanted else 0
    return Numerators(
        hidden.new_empty(rows, columns),
        hidden.new_empty(-(-columns // layout.piece), rows, dtype=statistics),
        hidden.new_empty(rows, dtype=statistics),
    )
