"""Padded [B, T] or packed [N] tokens: which of them count, and sums per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_fast.validation import check_cu_seqlens, check_tensor


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a batch lie."""

    shape: torch.Size  # of a tensor of tokens: [B, T] or [N]
    mask: Tensor | None  # same shape, bool
    cu_seqlens: Tensor | None  # [S + 1], packed only
    lengths: Tensor  # [S] counted tokens, int64

    @classmethod
    def of(
        cls, logps: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, validate: bool
    ) -> Layout:
        """The layout of `logps`, with every argument checked."""
        if mask is not None:
            check_tensor("mask", mask)
        if mask is not None and mask.shape != logps.shape:
            raise ValueError(
                f"mask: expected the shape of logps, {tuple(logps.shape)}, got {tuple(mask.shape)}"
            )
        mask = None if mask is None else mask.bool()
        if cu_seqlens is not None:
            if logps.dim() != 1:
                raise ValueError(
                    f"logps: expected packed [N] with cu_seqlens, got {tuple(logps.shape)}"
                )
            check_cu_seqlens(cu_seqlens, len(logps), validate)
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
    def sequences(self) -> int:
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

    def keep(self, values: Tensor) -> Tensor:
        """The counted values; 0 elsewhere, whatever stood there."""
        return values if self.mask is None else values.where(self.mask, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """[S] sums over the counted tokens of each sequence; differentiable and deterministic."""
        kept = self.keep(values)
        return kept.sum(1) if self.cu_seqlens is None else _segment_sum(kept, self.cu_seqlens)


def _segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, axis=0, initial=0.0, unsafe=True)
