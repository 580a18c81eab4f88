"""Scores before and after a run: a table for a terminal or a page, and answers to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from powerflow_fast.data.prompts import Question, text_of
from powerflow_fast.evaluation.scores import MEASURES, Evaluation, Scores, is_correct

EXAMPLES = 3  # prompts whose completions are shown


def compare(
    questions: Sequence[Question], before: Evaluation, after: Evaluation, temperature: float
) -> dict[str, Any]:
    """Two evaluations on the same questions, sampled at `temperature`.

    Returns:
        The `summary`, `examples` to read, and the scores `before` and `after` as plain numbers.
    """
    return summary(len(questions), before.scores, after.scores, temperature) | {
        "examples": _examples(questions, before, after),
        "before": before.scores.as_dict(),
        "after": after.scores.as_dict(),
    }


def summary(
    prompts: int, before: Scores, after: Scores | None, temperature: float
) -> dict[str, Any]:
    """Scores on so many `prompts`, sampled at `temperature`, as a table.

    Returns:
        `heading`, `rows` (title and value ± standard error as text, with `after` also its value and
        the difference), and `legend`.
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


def as_text(compared: dict[str, Any]) -> str:
    """What `compare` or `summary` returned, for a terminal: columns as wide as they must be."""
    lines = [compared["heading"], *compared["rows"]]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    padded = [[title.ljust(first), *map(str.rjust, cells, others)] for title, *cells in lines]
    parts = ["  ".join(line).rstrip() for line in padded] + [f"({compared['legend']})"]
    if compared.get("examples"):
        parts += ["", "One sample of some, not chosen by what came out:", _to_read(compared)]
    return "\n".join(parts)


def as_markdown(compared: dict[str, Any]) -> str:
    """What `compare` returned, for a model card."""
    heading = compared["heading"]
    lines = [heading, ["---"] * len(heading), *compared["rows"]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = [table, f"{compared['legend']}. This run only."]
    if compared.get("examples"):
        parts += ["One sample each, not chosen:", f"```\n{_to_read(compared)}\n```"]
    return "\n\n".join(parts)


def _examples(
    questions: Sequence[Question], before: Evaluation, after: Evaluation
) -> list[dict[str, Any]]:
    """Evenly spaced prompts with their first sample before and after: not chosen by what came out.

    `right` says of both whether they are; None: the question has no answers.
    """
    step, samples = max(1, len(questions) // EXAMPLES), before.scores.samples
    found = []
    for i in range(step // 2, len(questions), step)[:EXAMPLES]:
        old, new = (e.drawn.texts[i * samples].strip() for e in (before, after))
        answers = questions[i].answers
        right = [is_correct(text, answers) if answers else None for text in (old, new)]
        prompt = text_of(questions[i].prompt)
        found.append({"prompt": prompt, "before": old, "after": new, "right": right})
    return found


def _to_read(compared: dict[str, Any]) -> str:
    """Each example's prompt, and under it both completions with right or wrong."""
    marks = {None: "", True: "  (right)", False: "  (wrong)"}
    lines = []
    for example in compared["examples"]:
        lines.append(example["prompt"])
        for name, right in zip(("before", "after"), example["right"], strict=True):
            text = " ".join(example[name].split()) or "(nothing)"
            lines.append(f"  {name + ':':<8} {text}{marks[right]}")
    return "\n".join(lines)
