r"""Format terms psi for `PowerFlowTrainer(psi_funcs=...)`: 0 for the right form, else a penalty.

A psi function has TRL's reward signature: keywords `prompts`, `completions`, `completion_ids` and
the data set's other columns, each a list; it returns one number [nats/token] per completion. It
sees the completion, never a right answer (arXiv 2603.18363: -0.5 where `\boxed{}` is missing).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Module

from powerflow_fast.logprobs.validation import is_finite

Completion = str | list[dict[str, str]]
PsiFunction = Callable[..., list[float]]


def no_psi(completions: list, **_: Any) -> list[float]:
    """The format term of a run without one: 0 for every completion."""
    return [0.0] * len(completions)


def finite_psi(function: Any) -> Any:
    """`function`, a plain or an async one, with its values checked.

    TRL takes a value that is no number for one that was not given. A model's or a path's values
    come to it by another way and are left to the trainer.

    Raises:
        ValueError: at a call, for values of the wrong number or kind; they name the function.
    """
    from trl.trainer.utils import get_callable_name, is_async_callable

    if function is no_psi or not callable(function) or isinstance(function, Module):
        return function
    name = get_callable_name(function)

    def check(values: Any, completions: list) -> list[float | None]:
        return _finite(name, values, len(completions))

    def checked(*args: Any, completions: list, **kwargs: Any) -> list[float | None]:
        return check(function(*args, completions=completions, **kwargs), completions)

    async def checked_later(*args: Any, completions: list, **kwargs: Any) -> list[float | None]:
        return check(await function(*args, completions=completions, **kwargs), completions)

    wrapper: Any = checked_later if is_async_callable(function) else checked
    wrapper.__name__ = name
    return wrapper


def _finite(name: str, values: Any, count: int) -> list[float | None]:
    if not hasattr(values, "__len__") or len(values) != count:
        got = f"{len(values)} values" if hasattr(values, "__len__") else type(values).__name__
        raise ValueError(f"psi_funcs: {name} gave {got} for {count} completions; expected {count}")
    numbers = values.tolist() if hasattr(values, "tolist") else list(values)
    for place, value in enumerate(numbers):
        if value is not None and not is_finite(value):
            raise ValueError(
                f"psi_funcs: {name} gave {value!r} for completion {place}; expected a finite "
                "number [nats/token], or None where it does not apply"
            )
    return numbers


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
