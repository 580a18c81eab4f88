"""Inputs of the benchmarks: one LA-TB step over N tokens of S sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Tokens N, hidden size H, vocabulary V; sequences of `length` tokens."""

    n: int = 1024
    h: int = 576
    v: int = 49152
    length: int = 64

    @property
    def product_flops(self) -> int:
        """Floating-point operations of one product of hidden states and head."""
        return 2 * self.n * self.h * self.v


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    ref_hidden: Tensor  # [N, H]
    cu_seqlens: Tensor  # [S + 1]


def draw(
    shape: Shape, dtype: torch.dtype, device: str, *, seed: int = 0, train_head=False
) -> Inputs:
    """Random inputs; logits have a standard deviation of about 3, half the targets are likely."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.n, shape.h)
    weight = normal(shape.v, shape.h) * (3 / shape.h**0.5)
    targets = torch.randint(shape.v, (shape.n,), generator=generator, device=device)
    hidden[::2] += 0.5 * weight[targets[::2]]
    ref_hidden = hidden + 0.1 * normal(shape.n, shape.h)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(train_head),
        targets,
        ref_hidden.to(dtype),
        torch.arange(0, shape.n + 1, shape.length, dtype=torch.int32, device=device),
    )
