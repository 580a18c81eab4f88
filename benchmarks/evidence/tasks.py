"""The questions that SmolLM2-135M is trained and measured on.

A prompt is the beginning of a statement ("The capital of France is"), so that an answer takes three
tokens and a run fits a CPU. Every completion is cut at the same length, so the optimum of LA-TB is
p^alpha / Z without a length tilt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from powerflow_fast.prompts import Question, read_questions

STATEMENTS = {  # task -> (pattern of its questions, the beginning of the answer)
    "capitals": (r"capital of (.+)\?", "The capital of {} is"),
    "sums": (r"What is (\d+ \+ \d+)\?", "The sum {} is"),
}


@dataclass(frozen=True)
class Task:
    """Questions with accepted answers, which measure, and reach supervised rivals only."""

    name: str
    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    max_new_tokens: int = 3


def task(name: str) -> Task:
    """One of `STATEMENTS`, from the package's own questions."""
    pattern, statement = STATEMENTS[name]
    parts = []
    for split in ("train", "heldout"):
        questions = []
        for question in read_questions(split=split):
            if found := re.search(pattern, question.prompt):
                questions.append(Question(statement.format(found[1]), question.answers, split))
        parts.append(tuple(questions))
    return Task(name, *parts)
