"""The questions that SmolLM2-135M is trained and measured on.

A prompt is the beginning of a statement ("The sum 3 + 4 is"), so that an answer takes three tokens
and a run fits a CPU. Every completion is cut at the same length, so the optimum of LA-TB is
p^alpha / Z without a length tilt. Products and differences are items of the procedural library
reasoning-gym (`products` and `chain_sum` with a seed), in other words.

After "The capital of Peru is" the model's likeliest three tokens are " the capital of" for nearly
half of the countries, and a power of its distribution unlearns the answer. With "the city of" the
likeliest is the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from powerflow_fast.data.prompts import Question, read_questions

STATEMENTS = {  # task -> (pattern of its questions, the beginning of the answer)
    "capitals": (r"capital of (.+)\?", "The capital of {} is the city of"),
    "sums": (r"What is (\d+ \+ \d+)\?", "The sum {} is"),
}
GENERATED = {  # task -> (reasoning-gym's dataset, the operator, the beginning of the answer)
    "products": ("products", "*", "The product {} is"),
    "differences": ("chain_sum", "-", "The result of {} is"),
}
TASKS = (*STATEMENTS, *GENERATED)
HELD_OUT = 3  # every third question


@dataclass(frozen=True)
class Task:
    """Questions with accepted answers, which measure, and reach supervised rivals only."""

    name: str
    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    max_new_tokens: int = 3


def task(name: str) -> Task:
    """One of `TASKS`; every third question is held out.

    The package's own split holds too few of the sums out to measure on.
    """
    if name not in TASKS:
        raise ValueError(f"name: expected a task of {TASKS}, got {name!r}")
    read = _own if name in STATEMENTS else _generated
    parts: dict[str, list[Question]] = {"train": [], "heldout": []}
    for i, (prompt, answers) in enumerate(read(name)):
        split = "train" if i % HELD_OUT else "heldout"
        parts[split].append(Question(prompt, answers, split))
    return Task(name, tuple(parts["train"]), tuple(parts["heldout"]))


def _own(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(prompt, answers) of the package's own questions."""
    pattern, statement = STATEMENTS[name]
    for question in read_questions():
        if found := re.search(pattern, question.prompt):
            yield statement.format(found[1]), question.answers


def _generated(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(prompt, answers) of items with one-digit terms and an answer from 0 on.

    Of a product and its mirror image the first is kept, so that no answer is seen in training.
    """
    import reasoning_gym

    dataset, operator, statement = GENERATED[name]
    options: dict[str, Any] = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    seen = set()
    for item in reasoning_gym.create_dataset(dataset, seed=0, size=500, **options):
        expression, answer = item["metadata"]["expression"], item["answer"]
        terms = expression.split(f" {operator} ")
        key = tuple(sorted(terms))
        if len(terms) == 2 and int(answer) >= 0 and key not in seen:
            seen.add(key)
            yield statement.format(expression), (answer,)
