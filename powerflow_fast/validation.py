"""Checks at the public edge. Every error names the argument, what came and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wants_values(values: Tensor, validate: bool) -> bool:
    """Whether to read values: always on a CPU, on a GPU only if asked, since it synchronises."""
    if torch.compiler.is_compiling():
        return False
    return validate or values.device.type == "cpu"


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, prefix: str
) -> None:
    """Shapes, dtypes and devices of one model's head; `prefix` is "ref_" for the reference."""
    for name, x in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight), ("targets", targets)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
        _refuse_dtensor(name, x)
        if x.device != hidden.device:
            raise ValueError(
                f"{name}: expected it on {hidden.device} as {prefix}hidden, got {x.device}"
            )
    for name, x in ((f"{prefix}hidden", hidden), (f"{prefix}weight", weight)):
        if x.dtype not in FLOAT_TYPES:
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"{prefix}weight: expected [V, H] with V >= 1, got {tuple(weight.shape)}; a sharded "
            "weight (ZeRO-3, FSDP) must be gathered, or the loss called inside the wrapped forward"
        )
    vocab, size = weight.shape
    if hidden.dim() < 1 or hidden.shape[-1] != size:
        raise ValueError(
            f"{prefix}hidden: expected [..., H] with H = {size} as in {prefix}weight [V, H], "
            f"got {tuple(hidden.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: expected int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets: expected shape {tuple(hidden.shape[:-1])} as {prefix}hidden without its "
            f"last axis, got {tuple(targets.shape)}"
        )
    if bias is None:
        return
    if not isinstance(bias, Tensor) or bias.dtype not in FLOAT_TYPES:
        got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(f"{prefix}bias: expected float32, bfloat16 or float16, got {got}")
    if bias.shape != (vocab,):
        raise ValueError(f"{prefix}bias: expected [V] with V = {vocab}, got {tuple(bias.shape)}")


def check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if outside.any():
        raise ValueError(
            f"targets: expected ids in [0, {vocab}) or ignore_index={ignore_index}, "
            f"got {int(targets[outside][0])}"
        )


def check_finite(name: str, values: Tensor, validate: bool) -> None:
    """Values of counted tokens; 0 elsewhere."""
    if not wants_values(values, validate):
        return
    bad = ~values.detach().isfinite()
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite numbers on every counted token, got "
            f"{values.detach()[bad][0].item()} at {place}"
        )


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def is_finite(value: object) -> bool:
    """Whether it is a number, of Python's own types, and a finite one."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """A finite number >= 0, or > 0 where `positive`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or (positive and value == 0):
        expected = "> 0" if positive else ">= 0"
        raise ValueError(f"{name}: expected a finite number {expected}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_per_sequence(
    name: str,
    value: Tensor | float,
    sequences: int,
    validate: bool,
    *,
    positive: bool = False,
) -> None:
    """A number, or a tensor [S] (or 0-dim) of finite values; > 0 where `positive`."""
    expected = "finite numbers > 0" if positive else "finite numbers"
    if isinstance(value, Tensor):
        if value.dim() > 1 or (value.dim() == 1 and len(value) != sequences):
            raise ValueError(
                f"{name}: expected a number or [S] with S = {sequences} sequences, got shape "
                f"{tuple(value.shape)}"
            )
        if wants_values(value, validate):
            bad = ~value.detach().isfinite()
            if positive:
                bad |= value.detach() <= 0
            if bad.any():
                raise ValueError(f"{name}: expected {expected}, got {value.detach().tolist()}")
    else:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: expected a number or a tensor [S], got {value!r}")
        if not (0 if positive else -math.inf) < value < math.inf:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int, validate: bool) -> None:
    """[S + 1] int32 or int64, from 0 to the number of tokens, never decreasing."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if not wants_values(cu_seqlens, validate):
        return
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens: expected non-decreasing offsets, got {cu_seqlens.tolist()}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(
            f"cu_seqlens: expected offsets from 0 to the number of tokens, {tokens}, "
            f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )


def _refuse_dtensor(name: str, x: Tensor) -> None:
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor; pass its local part (to_local())"
        )
