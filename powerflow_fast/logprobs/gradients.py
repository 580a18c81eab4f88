"""From tiles of d loss / d logits to the gradients of hidden, weight and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.backend import Gradients
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.products import add_product_, matmul


class GradientSums:
    """Sums of the gradients that are needed, in float32 (float64 for float64), each cast once.

    The vocabulary goes tile by tile: `start` one, `add` rows and columns of it, `store` it.

    Args:
        head: with hidden states that are finite on every row that is added.
        needs: whether hidden, weight, bias need a gradient.
        out_scale: [1] by which d loss / d logits are enlarged; None: they are not.
    """

    def __init__(self, head: Head, needs: Sequence[bool], out_scale: Tensor | None = None) -> None:
        self.head, self.out_scale = head, out_scale
        hidden, weight, bias = head
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.zeros_like(hidden, dtype=self.dtype) if needs[0] else None
        self.weight = torch.empty_like(weight) if needs[1] else None
        self.bias = torch.empty_like(bias) if needs[2] and bias is not None else None
        self._place = slice(0, 0)  # of the tile in the vocabulary
        self._weight_sums: Tensor | None = None  # [columns of the tile, H]
        self._bias_sums: Tensor | None = None  # [columns of the tile]

    def start(self, start: int, stop: int) -> None:
        """Columns start:stop of the vocabulary are next."""
        self._place, self._weight_sums = slice(start, stop), None
        if self.weight is not None and self.weight.dtype == self.dtype:
            self._weight_sums = self.weight[start:stop].zero_()  # summed where they belong
        if self.bias is not None:
            self._bias_sums = torch.zeros_like(self.bias[start:stop], dtype=self.dtype)

    def add(
        self,
        dlogits: Tensor,  # [rows, columns]
        rows: slice,
        columns: Tensor | None,  # [columns] ascending places in the tile; None: all of it
        weight_tile: Tensor,  # [columns, H] in the product's type
    ) -> None:
        if self._bias_sums is not None:
            _add(self._bias_sums, columns, dlogits.sum(0, dtype=self.dtype))
        dlogits = dlogits.to(weight_tile.dtype)
        if self.hidden is not None:
            add_product_(self.hidden[rows], dlogits, weight_tile)
        if self.weight is None:
            return
        hidden = self.head.hidden[rows].to(weight_tile.dtype)
        if columns is None and self._weight_sums is None:
            self._weight_sums = matmul(dlogits.T, hidden)
        elif columns is None:
            add_product_(self._weight_sums, dlogits.T, hidden)
        else:
            if self._weight_sums is None:
                tile = self.weight[self._place]
                self._weight_sums = torch.zeros_like(tile, dtype=self.dtype)
            _add(self._weight_sums, columns, matmul(dlogits.T, hidden))

    def store(self) -> None:
        """The tile's columns are whole; a tile to which nothing was added is 0."""
        for gradient, sums in ((self.weight, self._weight_sums), (self.bias, self._bias_sums)):
            if gradient is None:
                continue
            tile = gradient[self._place]
            if sums is None:
                tile.zero_()
            elif self.out_scale is not None:
                torch.div(sums, self.out_scale, out=tile)  # cast as it is written
            elif sums.data_ptr() != tile.data_ptr():
                tile.copy_(sums)
        self._weight_sums = self._bias_sums = None  # their memory is the next tile's

    def results(self) -> Gradients:
        """The gradient of hidden stays in float32, as ranks may have to sum it."""
        if self.hidden is not None and self.out_scale is not None:
            self.hidden /= self.out_scale
        return Gradients(self.hidden, self.weight, self.bias)


def _add(sums: Tensor, places: Tensor | None, values: Tensor) -> None:
    """The places differ from one another, so the order of the sums is one."""
    if places is None:
        sums += values
    else:
        sums.index_add_(0, places, values)


def dlogits_scale(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    num_v: int,
    options: HeadOptions,
) -> Tensor:  # [1] float32
    """A power of two that puts the largest d loss / d logits near 2^13, for float16.

    A TB coefficient of 1e-6 on a probability of 1e-3 is below float16's smallest number. bfloat16
    would hold it, but with 8 bits of mantissa, and hidden and weight would have to be cast to it.
    """
    largest = grad_logps.abs().amax()
    if grad_entropy is not None:
        # |p (log p + entropy)| is at most about the largest entropy, log V.
        largest = largest + grad_entropy.abs().amax() * (math.log(num_v) + 1.0)
    largest = largest * abs(options.scale)
    exponent = 13.0 - torch.ceil(torch.log2(largest))
    usable = torch.isfinite(exponent)  # not where every gradient is 0, or one is inf or NaN
    return torch.where(usable, torch.exp2(exponent.clamp(-100, 100)), 1.0).reshape(1)
