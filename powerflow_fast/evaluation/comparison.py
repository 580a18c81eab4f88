"""Scores before and after a run: a table for a terminal or a page, and answers to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from powerflow_fast.data.prompts import Question, text_of
from powerflow_fast.evaluation.scores import MEASURES, Evaluation, Scores, is_correct


def summary(
    prompts: int, before: Scores, after: Scores | None = None, temperature: float = 1.0
) -> dict[str, Any]:
    """A table of scores, for `text` and `markdown`.

    Args:
        prompts: how many were measured on.
        before: scores of a model, or of the base that `after` is compared with.
        after: scores on the same prompts; None: `before` alone.
        temperature: of sampling.

    Returns:
        `heading` and `rows` (cells as text: title and value ± standard error, with `after` also its
        value and the difference), and `legend`.
    """
    columns = ("",) if after is None else ("before", "after", "change")
    legend = "±: standard error over prompts"
    if before.accuracy_sampled is not None:
        legend = f"accuracy: an accepted answer occurs in the completion as whole words; {legend}"
    return {
        "heading": (f"{prompts} held-out prompts", *columns),
        "rows": _rows(before, after, temperature),
        "legend": legend,
    }


def _rows(before: Scores, after: Scores | None, temperature: float) -> list[tuple[str, ...]]:
    rows = []
    for name, figure in before.figures().items():
        title, percent = MEASURES[name]
        if name == "base_logp" and after is None:  # of one model: its own
            title = "log-prob of its samples, nats/token"
        title = title.format(samples=before.samples, temperature=temperature)
        cells = [title, _cell(figure.value, figure.error, percent)]
        if after is not None:
            other = after.figures()[name]
            cells.append(_cell(other.value, other.error, percent))
            cells.append(_cell(*other.difference(figure), percent, sign="+"))
        rows.append(tuple(cells))
    return rows


def _cell(value: float, error: float, percent: bool, sign: str = "") -> str:
    factor, digits, unit = (100, 1, " %") if percent else (1, 2, "")
    text = f"{factor * value:{sign}.{digits}f}"
    if not math.isnan(error):  # a single prompt has none
        text += f" ± {factor * error:.{digits}f}"
    return text + unit


def text(table: dict[str, Any]) -> str:
    """A `summary` for a terminal: columns as wide as they must be, and the legend."""
    lines = [table["heading"], *table["rows"]]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    padded = [[title.ljust(first), *map(str.rjust, cells, others)] for title, *cells in lines]
    return "\n".join(["  ".join(line).rstrip() for line in padded] + [f"({table['legend']})"])


def markdown(table: dict[str, Any]) -> str:
    """A `summary` as a Markdown table, without the legend."""
    heading = table["heading"]
    lines = [heading, ["---"] * len(heading), *table["rows"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def examples(
    questions: Sequence[Question], before: Evaluation, after: Evaluation, shown: int = 3
) -> list[dict[str, Any]]:
    """At most `shown` prompts, evenly spaced, with their first sample before and after.

    Nothing is chosen by what came out.

    Returns:
        For each prompt its text as `prompt`, the completions `before` and `after`, and for both
        whether they are `right` (None: the question has no answers).
    """
    step, samples = max(1, len(questions) // shown), before.scores.samples
    found = []
    for i in range(step // 2, len(questions), step)[:shown]:
        old, new = (e.drawn.texts[i * samples].strip() for e in (before, after))
        answers = questions[i].answers
        right = [is_correct(text, answers) if answers else None for text in (old, new)]
        prompt = text_of(questions[i].prompt)
        found.append({"prompt": prompt, "before": old, "after": new, "right": right})
    return found


def example_lines(found: Sequence[dict[str, Any]]) -> str:
    """`examples` to read: each prompt, and under it the completions with right or wrong."""
    marks = {None: "", True: "  (right)", False: "  (wrong)"}
    lines = []
    for example in found:
        lines.append(example["prompt"])
        for name, right in zip(("before", "after"), example["right"], strict=True):
            text = " ".join(example[name].split()) or "(nothing)"
            lines.append(f"  {name + ':':<8} {text}{marks[right]}")
    return "\n".join(lines)
