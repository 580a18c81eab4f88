"""What goes to the kernels. No Triton here: the PyTorch back end computes with the same."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch

Fields = TypeVar("Fields", bound=tuple)

# The objective's balances: whether a sequence's policy and reference log-probs are averaged, or
# summed.
BALANCES = {"length": (True, True), "trajectory": (False, False), "token": (False, True)}


class Head(NamedTuple):
    """One model's language-model head and its input: policy and reference are two of them."""

    hidden: torch.Tensor  # [N, H]; [..., H] at the public edge
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]


def of_rows(values: Fields, rows: slice | torch.Tensor) -> Fields:
    """A NamedTuple of tensors [..., N] (or None) for some of their N rows."""
    return type(values)(*(None if x is None else x[..., rows] for x in values))
