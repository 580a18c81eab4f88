"""From chunks of d loss / d logits to gradients, by products of the vendor library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from powerflow_fast.logprobs.options import HeadOptions


def dlogits_scale(
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    num_v: int,
    options: HeadOptions,
    dtype: torch.dtype,
) -> Tensor:  # [1]
    """A power of two that puts the largest d loss / d logits near 2^13, in float16.

    A TB coefficient of 1e-6 on a probability of 1e-3 is below float16's smallest number. bfloat16
    would hold it, but with 8 bits of mantissa, and hidden and weight would have to be cast to it.
    The other dtypes have float32's range and need no scale.
    """
    one = torch.ones(1, dtype=torch.float32, device=grad_logps.device)
    if dtype != torch.float16 or grad_logps.numel() == 0:
        return one
    largest = grad_logps.abs().amax()
    if grad_entropy is not None:
        # |p (log p + entropy)| is at most about the largest entropy, log V.
        largest = largest + grad_entropy.abs().amax() * (math.log(num_v) + 1.0)
    largest = largest * abs(options.logit_scale / options.temperature)
    exponent = 13.0 - torch.ceil(torch.log2(largest))
    usable = torch.isfinite(exponent)  # not where every gradient is 0, or one is inf or NaN
    return torch.where(usable, torch.exp2(exponent.clamp(-100, 100)), one)


class GradientSums:
    """Turns chunks of d loss / d logits into the gradients that are needed."""

    def __init__(
        self,
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        active: Tensor,  # [N] bool
        out_scale: Tensor,  # [1]
        needs: tuple[bool, bool, bool],
    ) -> None:
        need_hidden, need_weight, need_bias = needs
        self.unscale = 1.0 / out_scale
        self.weight = weight
        # 0 * inf is NaN: inactive rows must be 0 in the product over the tokens.
        self.hidden = hidden.where(active[:, None], 0) if need_weight else None
        self.grad_hidden = (
            torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
            if need_hidden
            else None
        )
        self.grad_weight = torch.zeros_like(weight) if need_weight else None
        self.grad_bias = torch.zeros_like(bias) if need_bias and bias is not None else None

    def add(self, dlogits: Tensor, start: int, stop: int) -> None:  # dlogits [N, stop - start]
        if self.grad_hidden is not None:
            add_product(self.grad_hidden, dlogits, self.weight[start:stop])
        if self.grad_weight is not None:
            sums = product(dlogits.T, self.hidden)
            torch.mul(sums, self.unscale, out=self.grad_weight[start:stop])  # cast as written
        if self.grad_bias is not None:
            sums = dlogits.sum(0, dtype=torch.float32)
            torch.mul(sums, self.unscale, out=self.grad_bias[start:stop])

    def results(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_hidden = self.grad_hidden
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(self.unscale)
        return grad_hidden, self.grad_weight, self.grad_bias


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in float32, which for 16-bit operands PyTorch offers on CUDA only."""
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.float(), right.float(), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in float32, by the product itself where it can."""
    if left.is_cuda and left.dtype != torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
