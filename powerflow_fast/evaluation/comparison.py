"""Scores before and after a run: a table for a terminal or a page, and answers to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerflow_fast.data.prompts import Question, text_of
from powerflow_fast.evaluation.scores import Evaluation, Figure, Scores, is_correct

ROWS = {  # of Scores -> (title, as percentage)
    "accuracy_sampled": ("accuracy, sampled at T={temperature:g}", True),
    "accuracy_greedy": ("accuracy, greedy", True),
    "distinct_answers": ("distinct answers per prompt, of {samples}", False),
    "distinct_openings": ("distinct openings (two words), of {samples}", False),
    "distinct_bigrams": ("distinct word pairs", True),
    "mean_length": ("mean length, tokens", False),
    "base_logp": ("log-prob under the base, nats/token", False),
}


def legend(scores: Scores) -> str:
    text = "±: standard error over prompts"
    if scores.accuracy_sampled is not None:
        text = f"accuracy: an accepted answer occurs in the completion as whole words; {text}"
    return text


def rows(
    before: Scores, after: Scores | None = None, temperature: float = 1.0
) -> list[tuple[str, ...]]:
    """Title, value ± standard error; with `after` also its own and the difference."""
    found = []
    for name, figure in before.figures().items():
        title, percent = ROWS[name]
        if name == "base_logp" and after is None:  # of one model: its own
            title = "log-prob of its samples, nats/token"
        title = title.format(samples=before.samples, temperature=temperature)
        cells = [title, _cell(figure.value, figure.error, percent)]
        if after is not None:
            other: Figure = after.figures()[name]
            cells.append(_cell(other.value, other.error, percent))
            cells.append(_cell(*other.difference(figure), percent, sign="+"))
        found.append(tuple(cells))
    return found


def _cell(value: float, error: float, percent: bool, sign: str = "") -> str:
    factor, digits, unit = (100, 1, " %") if percent else (1, 2, "")
    text = f"{factor * value:{sign}.{digits}f}"
    if error == error:  # of a single prompt there is none
        text += f" ± {factor * error:.{digits}f}"
    return text + unit


def heading(prompts: int, compared: bool) -> tuple[str, ...]:
    return (f"{prompts} held-out prompts", *(("before", "after", "change") if compared else ("",)))


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """For a terminal: columns as wide as they must be."""
    lines = [tuple(head), *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [tuple(head), ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def examples(
    questions: Sequence[Question], before: Evaluation, after: Evaluation, shown: int = 3
) -> list[dict[str, Any]]:
    """Prompts with one sampled completion before and after, spread over the questions.

    The same place among a prompt's samples in both: nothing is chosen by what came out.
    """
    step, samples = max(1, len(questions) // shown), before.scores.samples
    found = []
    for i in range(step // 2, len(questions), step)[:shown]:
        texts = [e.drawn.texts[i * samples].strip() for e in (before, after)]
        answers = questions[i].answers
        right = [is_correct(text, answers) if answers else None for text in texts]
        found.append(
            {
                "prompt": text_of(questions[i].prompt),
                "before": texts[0],
                "after": texts[1],
                "right": right,
            }
        )
    return found


def example_lines(found: Sequence[dict[str, Any]]) -> str:
    marks = {None: "", True: "  (right)", False: "  (wrong)"}
    lines = []
    for example in found:
        lines.append(example["prompt"])
        for name, right in zip(("before", "after"), example["right"], strict=True):
            text = " ".join(example[name].split()) or "(nothing)"
            lines.append(f"  {name + ':':<8} {text}{marks[right]}")
    return "\n".join(lines)
