"""The softmax of a trained head, as it waits for the backward pass.

The gradient of the weight is dlogits.T @ hidden, and dlogits wait for the upstream gradient. If the
logits are formed once more for them, a step with a reference takes five products; rows whose
softmax is cached take four. The cache is no larger than the weight's own gradient in float32,
[V, H], for which a step that trains the head has room anyway, and no larger than `LARGEST_BYTES`:
H rows in float32, 2 H in a 16-bit type. The rows beyond are recomputed. The head is the last of the
forward pass and the first of the backward pass, so the cache lives briefly, but when memory peaks.

Exp-logits are stored in the type of the operands: rounded once, as dlogits are before a product in
that type. The target's 1 - p is float32: a confident policy needs its digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from powerflow_fast.kernels.config import ceil_div

LARGEST_BYTES = 2 << 30


class VocabTiling(NamedTuple):
    """How a back end cuts the vocabulary for the cache."""

    tile_columns: int  # that share a factor
    padded_to: int  # the number of stored columns is a multiple of this


class SoftmaxCache(NamedTuple):
    """The first rows that count; a back end's `forward` fills it, its `backward` reads it.

    J is the slope of the softcap, 1 without one.
    """

    exp_logits: Tensor  # [rows, columns] e^(z - shift) J 2^exponent of each tile; 0 at the target
    factors: Tensor  # [tiles, rows] exp_logits * factors = p J
    one_minus_p: Tensor  # [rows] (1 - p) J of the target

    @property
    def rows(self) -> int:
        return len(self.one_minus_p)

    def of_rows(self, r: slice) -> SoftmaxCache:
        return SoftmaxCache(self.exp_logits[r], self.factors[:, r], self.one_minus_p[r])


def new_softmax_cache(hidden: Tensor, weight: Tensor, tiling: VocabTiling) -> SoftmaxCache:
    """Uninitialised; the sizes depend on shapes and types alone."""
    (num_n, num_h), num_v = hidden.shape, weight.shape[0]
    statistics = torch.promote_types(hidden.dtype, torch.float32)
    columns = ceil_div(num_v, tiling.padded_to) * tiling.padded_to
    budget = min(LARGEST_BYTES, 4 * num_v * num_h)
    rows = torch.sym_min(num_n, budget // (columns * hidden.element_size()))
    return SoftmaxCache(
        hidden.new_empty(rows, columns),
        hidden.new_empty(ceil_div(columns, tiling.tile_columns), rows, dtype=statistics),
        hidden.new_empty(rows, dtype=statistics),
    )
