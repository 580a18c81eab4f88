"""Padded [B, T] or packed [N] tokens: which of them count, sums per sequence, and the shift."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_fast.logprobs.validation import check_mask, check_packed


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a batch lie, and which of their tokens count."""

    shape: torch.Size  # of a tensor of tokens: [B, T] or [N]
    mask: Tensor | None  # same shape, bool
    cu_seqlens: Tensor | None  # [S + 1], packed only
    lengths: Tensor  # [S] counted tokens, int64

    @classmethod
    def of(
        cls, logps: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, validate: bool
    ) -> Sequences:
        """Those of `logps`, with every argument checked."""
        if mask is not None:
            mask = check_mask("mask", mask, logps.shape, "logps", validate)
        if cu_seqlens is not None:
            check_packed("logps", logps, cu_seqlens, validate)
            cu_seqlens = cu_seqlens.long()
            lengths = cu_seqlens.diff()
            if mask is not None:
                lengths = _segment_sum(mask.float(), cu_seqlens).long()
        elif logps.dim() == 2:
            if mask is not None:
                lengths = mask.sum(1)
            else:
                lengths = torch.full((len(logps),), logps.shape[1], device=logps.device)
        else:
            raise ValueError(
                "logps: expected padded [B, T], or packed [N] with cu_seqlens [S + 1], "
                f"got {tuple(logps.shape)}"
            )
        return cls(logps.shape, mask, cu_seqlens, lengths)

    @property
    def count(self) -> int:
        return len(self.lengths)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """[S] int32 first token of each sequence, and the one behind its last, when flattened."""
        if self.cu_seqlens is not None:
            offsets = self.cu_seqlens.int()
        else:
            rows, width = self.shape
            device = self.lengths.device
            offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
        return offsets[:-1].contiguous(), offsets[1:].contiguous()

    def check_tokens(self, name: str, values: Tensor) -> None:
        if values.shape != self.shape:
            raise ValueError(
                f"{name}: expected the shape of logps, {tuple(self.shape)}, "
                f"got {tuple(values.shape)}"
            )

    def counted_only(self, values: Tensor) -> Tensor:
        """The counted values; 0 elsewhere, whatever stood there."""
        return values if self.mask is None else values.where(self.mask, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """[S] sums over the counted tokens of each sequence; differentiable and deterministic."""
        values = self.counted_only(values)
        return values.sum(1) if self.cu_seqlens is None else _segment_sum(values, self.cu_seqlens)


def _segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, axis=0, initial=0.0, unsafe=True)


def without_first(targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """`targets` with the first token of every sequence ignored: no position predicts that token.

    The last axis is one sequence, or packed ones with `cu_seqlens` [S + 1].
    """
    tokens = targets.shape[-1]
    if cu_seqlens is None:
        first = torch.arange(tokens, device=targets.device) == 0
    else:  # one place more than tokens: there an empty last sequence begins
        first = torch.zeros(tokens + 1, dtype=torch.bool, device=targets.device)
        first = first.index_fill(0, cu_seqlens[:-1].long(), True)[:tokens]
    return targets.where(~first, ignore_index)


def to_predictors(targets: Tensor) -> Tensor:
    """From each token's own place to the place of the position that predicts the token.

    The first token, which `without_first` ignores, comes to the last place.
    """
    return targets.roll(-1, -1)


def to_tokens(values: Tensor) -> Tensor:
    """Back again: what the last position gave, 0 for an ignored token, comes to the first."""
    return values.roll(1, -1)
