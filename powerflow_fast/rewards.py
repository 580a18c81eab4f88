r"""Format terms psi for `PowerFlowTrainer(psi_funcs=...)`: 0 for the right form, else a penalty.

A psi function has TRL's reward signature: keywords `prompts`, `completions`, `completion_ids` and
the data set's other columns, each a list; it returns one number [nats/token] per completion. It
sees the completion, never a right answer (arXiv 2603.18363: -0.5 where `\boxed{}` is missing).
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

Completion = str | list[dict[str, str]]
PsiFunction = Callable[..., list[float]]


def no_psi(completions: list, **_: Any) -> list[float]:
    """The format term of a run without one: 0 for every completion."""
    return [0.0] * len(completions)


def finite_psi(function: Any) -> Any:
    """`function`, whose values are checked: TRL takes one that is no number for one not given."""
    plain = isinstance(function, FunctionType) and not inspect.iscoroutinefunction(function)
    if function is no_psi or not plain:
        return function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> list[float | None]:
        values = function(*args, **kwargs)
        for place, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                raise ValueError(
                    f"psi_funcs: {function.__name__} gave {value} for completion {place}; expected "
                    "a finite number [nats/token], or None where it does not apply"
                )
        return values

    return checked


def missing_pattern(
    pattern: str, penalty: float = -0.5, name: str = "missing_pattern"
) -> PsiFunction:
    """psi = `penalty` for completions in which the regular expression `pattern` is not found."""
    compiled, penalty = re.compile(pattern, re.DOTALL), _penalty(penalty)

    def psi(completions: list[Completion], **_: Any) -> list[float]:
        return [0.0 if compiled.search(_text(c)) else penalty for c in completions]

    psi.__name__ = name
    return psi


def missing_boxed(penalty: float = -0.5) -> PsiFunction:
    r"""psi = `penalty` for completions without a filled `\boxed{...}`."""
    return missing_pattern(r"\\boxed\s*\{\s*[^\s}]", penalty, name="missing_boxed")


def truncated(eos_token_ids: int | Iterable[int], penalty: float = -0.5) -> PsiFunction:
    """psi = `penalty` for completions that do not end with one of `eos_token_ids`."""
    ends = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids)
    penalty = _penalty(penalty)

    def psi(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0 if ids and ids[-1] in ends else penalty for ids in completion_ids]

    psi.__name__ = "truncated"
    return psi


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def _penalty(value: float) -> float:
    if not (math.isfinite(value) and value <= 0):
        raise ValueError(f"penalty: expected a finite number <= 0, got {value!r}")
    return float(value)
