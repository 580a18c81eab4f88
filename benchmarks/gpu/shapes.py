"""Sizes of the staged benchmark."""

from __future__ import annotations

import torch

from benchmarks.cases import ANCHOR, model_head
from benchmarks.inputs import Shape

# The others have a small hidden size, where the product over the vocabulary has few tiles.
SHAPES = {
    "anchor": ANCHOR,
    "Qwen2.5-1.5B": model_head("Qwen2.5-1.5B", n=16384, length=512),
    "Qwen2.5-7B": model_head("Qwen2.5-7B", n=16384, length=512),
}
TINY = {"tiny": Shape(32, 32, 130, length=16)}
ODD = ((1, 33, 257), (130, 96, 600), (300, 200, 1031))  # N, H, V: for correctness
ODD_TINY = ((1, 33, 257), (20, 40, 130), (17, 24, 70))


def shapes(tiny: bool) -> dict[str, Shape]:
    return TINY if tiny else SHAPES


def device_here() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(device: torch.device) -> torch.dtype:
    """What is timed: bf16 on a GPU; the dry run's in float32, which every CPU multiplies."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
