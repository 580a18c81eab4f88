"""One outcome for all ranks of what may fail on one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from accelerate.utils import gather_object

T = TypeVar("T")


class Problem(NamedTuple):
    """The first that a rank had, and on that rank its exception."""

    kind: str  # the exception's class
    text: str  # its message, in one line
    error: Exception | None


def on_every_rank(
    part: Callable[[], T], caught: tuple[type[Exception], ...]
) -> tuple[T | None, Problem | None]:
    """`part()` on every rank, which all must call: its result here, and the problem of any.

    So all can raise where one failed, and none waits for another.
    """
    result: T | None = None
    problem: Exception | None = None
    try:
        result = part()
    except caught as error:
        problem = error
    here = None if problem is None else (type(problem).__name__, " ".join(str(problem).split()))
    first = next((found for found in gather_object([here]) if found), None)
    return result, None if first is None else Problem(first[0], first[1], problem)
