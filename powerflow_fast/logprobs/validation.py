"""Checks at the public edge. Every error names the argument, what came and what was expected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from powerflow_fast.kernels.operands import Head

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wants_values(values: Tensor, validate: bool) -> bool:
    """Whether to read values: always on a CPU, on a GPU only if asked, since it synchronises."""
    if torch.compiler.is_compiling():
        return False
    return validate or values.device.type == "cpu"


def check_operands(head: Head, targets: Tensor, prefix: str) -> None:
    """Shapes, dtypes and devices of one model's head; `prefix` is "ref_" for the reference."""
    hidden, weight, bias = head
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
    if hidden.dim() >= 1 and hidden.shape[-1] == vocab != size:
        raise ValueError(
            f"{prefix}weight: looks transposed: expected [V, H] with H = {hidden.shape[-1]} as in "
            f"{prefix}hidden [..., H], got {tuple(weight.shape)}"
        )
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


def check_time_axis(targets: Tensor) -> None:
    if targets.dim() == 0:
        raise ValueError("targets: expected [..., T] with shift=True, got a tensor without axes")


def check_result(logps: Tensor, head: Head, counted: Tensor, prefix: str) -> None:
    """Where log-probs [...] are not finite, names the input of `head` that made them so.

    `counted` is bool [...], `prefix` as in `check_operands`. Where every input is finite, as under
    a bias of -inf for columns that pad the vocabulary, the log-probs are what they are.
    """
    if logps.detach().isfinite().all():
        return
    rows = head.hidden.detach().isfinite().all(-1) | ~counted
    if not rows.all():
        raise ValueError(
            f"{prefix}hidden: expected finite numbers on every counted token, got nan or inf at "
            f"{(~rows).nonzero()[0].tolist()}"
        )
    for name, values in (("weight", head.weight), ("bias", head.bias)):
        if values is None or values.detach().isfinite().all():
            continue
        if values.dim() == 2 or not (values.detach() < math.inf).all():
            raise ValueError(f"{prefix}{name}: expected finite numbers, got nan or inf")


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


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_keywords(function: str, given: Iterable[str], *known: Sequence[str]) -> None:
    """TypeError, as Python's own, for a keyword that `function` does not take."""
    names = [name for part in known for name in part]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; expected of {sorted(names)}"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def check_mask(
    name: str, mask: Tensor | None, shape: torch.Size, like: str, validate: bool
) -> Tensor:
    """`mask` as bool. It has the shape of `like`, and no values but true and false, or 1 and 0."""
    mask = check_tensor(name, mask)
    if mask.shape != shape:
        raise ValueError(
            f"{name}: expected the shape of {like}, {tuple(shape)}, got {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and wants_values(mask, validate):
        other = (mask != 0) & (mask != 1)
        if other.any():
            raise ValueError(
                f"{name}: expected true and false, or 1 and 0, got {mask[other][0].item()}"
            )
    return mask.bool()


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


def check_packed(name: str, tokens: Tensor, cu_seqlens: Tensor, validate: bool) -> None:
    """`tokens` are [N], and cu_seqlens [S + 1] int32 or int64 from 0 to N, never decreasing."""
    if tokens.dim() != 1:
        raise ValueError(f"{name}: expected packed [N] with cu_seqlens, got {tuple(tokens.shape)}")
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens: expected int32 [S + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if not wants_values(cu_seqlens, validate):
        return
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens: expected non-decreasing offsets, got {cu_seqlens.tolist()}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(tokens):
        raise ValueError(
            f"cu_seqlens: expected offsets from 0 to the number of tokens, {len(tokens)}, "
            f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )


def check_log_z(
    log_z: Tensor | float | str,
    sequences: int,
    group_size: int | None,
    group_ids: Tensor | None,
    validate: bool,
) -> None:
    """log_z is a number or [S], or "group" with groups of at least two."""
    if not isinstance(log_z, str):
        if group_size is not None or group_ids is not None:
            raise ValueError(
                "group_size, group_ids: have no effect beside a log_z that is given; leave them "
                "out, or log_z='group'"
            )
        if log_z is None:
            raise ValueError("log_z: expected a number, a tensor [S] or 'group', got None")
        check_per_sequence("log_z", log_z, sequences, validate)
        return
    if log_z == "learned":
        raise ValueError(
            "log_z: 'learned' is an option of the trainer; expected here the output [S] of a "
            "LogZHead, a number, or 'group'"
        )
    if log_z != "group":
        raise ValueError(f"log_z: expected a number, a tensor [S] or 'group', got {log_z!r}")
    if (group_size is None) == (group_ids is None):
        raise ValueError("log_z='group': expected exactly one of group_size and group_ids")
    whole = isinstance(group_size, int)
    if group_size is not None and (not whole or group_size < 2 or sequences % group_size):
        raise ValueError(
            "group_size: expected at least 2 completions per prompt and a divisor of the "
            f"{sequences} sequences, got {group_size!r}"
        )
    if group_ids is not None:
        check_tensor("group_ids", group_ids)
        if group_ids.shape != (sequences,) or group_ids.is_floating_point():
            raise ValueError(
                f"group_ids: expected integers [S] with S = {sequences}, "
                f"got {group_ids.dtype} {tuple(group_ids.shape)}"
            )
        if wants_values(group_ids, validate):
            _, counts = group_ids.unique(return_counts=True)
            if (counts < 2).any():
                raise ValueError(
                    "group_ids: expected at least 2 completions per prompt, got a group of 1"
                )


def _refuse_dtensor(name: str, x: Tensor) -> None:
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor; pass its local part (to_local())"
        )
