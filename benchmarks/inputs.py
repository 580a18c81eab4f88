"""Inputs of the benchmarks: hidden states, head and targets of N tokens in S sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

INPUT_SETS = 3  # of each case, used in turn, so that no cache holds them


@dataclass(frozen=True)
class Shape:
    """Tokens N, hidden size H, vocabulary V; sequences of `length` tokens, `group` to a prompt."""

    n: int
    h: int
    v: int
    length: int
    group: int | None = None  # each sequence for itself

    @property
    def sequences(self) -> int:
        return self.n // self.length

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
    group: int | None = None  # consecutive sequences of a prompt, which have one log Z'

    def sharpened(self, alpha: float) -> Inputs:
        """The policy's logits times `alpha`, as of one that was trained towards p^alpha."""
        return replace(self, hidden=(alpha * self.hidden.detach()).requires_grad_())

    def sequences(self, count: int) -> Inputs:
        """The first `count` sequences alone."""
        n = int(self.cu_seqlens[count])
        return replace(
            self,
            hidden=self.hidden[:n],
            targets=self.targets[:n],
            ref_hidden=self.ref_hidden[:n],
            cu_seqlens=self.cu_seqlens[: count + 1],
        )


def draw(
    source: str, shape: Shape, dtype: torch.dtype, device: torch.device, *, seed=0, train_head=False
) -> Inputs:
    """Inputs of one set; `source` is "random" or "SmolLM2" (text that the model wrote)."""
    make = {"random": _random, "SmolLM2": _smollm2}[source]
    hidden, weight, targets, ref_hidden = make(shape, device, seed)
    return Inputs(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(train_head),
        targets,
        ref_hidden.to(dtype),
        torch.arange(0, shape.n + 1, shape.length, dtype=torch.int32, device=device),
        shape.group,
    )


def _random(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Logits have a standard deviation of about 3, half the targets are likely."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    hidden = normal(shape.n, shape.h)
    weight = normal(shape.v, shape.h).mul_(3 / shape.h**0.5)
    targets = torch.randint(shape.v, (shape.n,), generator=generator, device=device)
    hidden[::2] += 0.5 * weight[targets[::2]]
    return hidden, weight, targets, hidden + 0.1 * normal(shape.n, shape.h)


def _smollm2(shape: Shape, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """Text at temperature 1 under its own model; the policy is a step away from the reference."""
    from benchmarks.real_text import real_text

    # One text for all shapes up to this, since writing it takes a minute; each set has its part.
    text = real_text(INPUT_SETS * max(shape.n, 1024))
    part = slice(seed * shape.n, (seed + 1) * shape.n)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape.n, shape.h, generator=generator)
    ref_hidden = text.hidden[part]
    hidden = ref_hidden + 0.01 * ref_hidden.std() * noise
    whole = (hidden, text.weight, text.targets[part], ref_hidden)
    return tuple(x.to(device) for x in whole)
