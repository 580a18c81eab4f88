"""What a back end is: the interface that the PyTorch one and the Triton one share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import SoftmaxCache, VocabTiling


class HeadForward(NamedTuple):
    """What `forward` returns; all statistics float32 (float64 for float64 inputs)."""

    logps: Tensor  # [N] NaN where the target is outside [0, V); any value where ignored
    lse: Tensor  # [N] log-sum-exp of the policy's logits; any value where ignored
    entropy: Tensor | None  # [N] if options.entropy
    unit_gradient: Tensor | None  # [N, H] d logps / d hidden
    ref_logps: Tensor | None  # [N] as logps, for the reference
    sparsity: Tensor | None = None  # [3], a SparsityReport, with a gradient tolerance
    kept_columns: Tensor | None = None  # [blocks, V] bool, see torch_sparse.py; None: every column


class SparsityReport(NamedTuple):
    """What the certified route left out, 0-dim each; the exact route's is (1, 0, 0)."""

    columns_kept: Tensor  # share
    skipped_mass: Tensor  # the largest of any row
    dense_blocks: Tensor  # blocks of rows that were done over the whole vocabulary


class Upstream(NamedTuple):
    """What `backward` goes by, [N] each: upstream gradients, and what `forward` left."""

    grad_logps: Tensor  # 0 on ignored rows
    grad_entropy: Tensor | None  # likewise
    targets: Tensor  # int64
    logps: Tensor  # of the targets, over the whole vocabulary
    lse: Tensor  # likewise
    entropy: Tensor | None  # likewise; needed with grad_entropy


class Gradients(NamedTuple):
    """None where not needed."""

    hidden: Tensor | None  # [N, H] in float32 (float64 for float64)
    weight: Tensor | None  # [V, H] in the weight's type
    bias: Tensor | None  # [V] in the bias's type


class Backend(Protocol):
    """A module that computes log-probs and their gradients without ever holding [N, V]."""

    CONVERTS_TILES: bool  # it takes a weight of another type than hidden's

    def vocab_tiling(self, device: torch.device) -> VocabTiling: ...

    def unit_gradient_dtype(self, hidden: Tensor, options: HeadOptions) -> torch.dtype: ...

    def forward(
        self,
        policy: Head,
        reference: Head | None,
        targets: Tensor,  # [N] int64
        options: HeadOptions,
        cache: SoftmaxCache | None = None,
    ) -> HeadForward:
        """Log-probs of the targets under both models, and what `options.route` takes.

        `cache`, if given, is filled for as many rows that count as it has.
        """

    def backward(
        self,
        head: Head,
        upstream: Upstream,
        options: HeadOptions,
        needs: Sequence[bool],  # hidden, weight, bias
        kept_columns: Tensor | None = None,  # [blocks, V] bool as `forward` left it
        cache: SoftmaxCache | None = None,  # likewise, without grad_entropy
    ) -> Gradients:
        """By recomputing the logits of rows without a cache; of the kept columns alone, if given.

        A confident target's 1 - p comes from `upstream.logps`: recomputed logits have lost its
        digits.
        """
