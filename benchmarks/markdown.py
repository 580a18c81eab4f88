"""Tables of the README and of the benchmarks' pages, and how a terminal shows them."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

WIDTH = 100  # columns of a terminal's paragraphs
NARROW = 9  # columns of a table that a longer title wraps within


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every row has as many cells as `head`."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def spread(values: Sequence[float], form: str = "{:.0f}") -> str:
    """Mean ± standard deviation; a sign in `form` is the mean's."""
    deviation = form.replace("+", "").format(statistics.stdev(values))
    return f"{form.format(statistics.fmean(values))} ± {deviation}"


def plain(block: str) -> str:
    """A table or a paragraph of Markdown for a terminal: columns aligned, lines wrapped."""
    text = block.replace("**", "").replace("`", "")
    if not text.startswith("|"):
        return textwrap.fill(text, WIDTH)
    head, _, *rows = [line[2:-2].split(" | ") for line in text.splitlines()]
    widths = []
    for title, *cells in zip(head, *rows, strict=True):
        least = min(NARROW, len(title))  # a title wraps where the cells under it are shorter
        widths.append(max(least, *map(len, [*title.split(), *cells])))
    wrapped = [textwrap.wrap(title, width) for title, width in zip(head, widths, strict=True)]
    titles = list(zip_longest(*wrapped, fillvalue=""))
    lines = [*titles, ["-" * width for width in widths], *rows]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)
