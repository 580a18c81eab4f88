"""Parts of error messages about what a user gave: the nearest name, and a library's own reason."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, names: Sequence[str], cutoff: float = 0.6) -> str:
    """ "; did you mean NAME?" with the nearest of `names`, or "" where none is near (difflib)."""
    near = difflib.get_close_matches(word, names, 1, cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank; without one the type's name."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error.__cause__ or error).__name__)
