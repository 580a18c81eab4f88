"""What the base model gives without training, by what an answer costs.

    best of n       the likeliest of n samples
    majority of n   the most frequent answer of n samples (self-consistency, arXiv 2203.11171)
    power k x m     p^alpha token by token (arXiv 2601.21590): k candidates, m lookaheads of each

A policy that was trained once answers at the cost of one sample.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.evidence.language import answer_of, base_model, majority, sample
from benchmarks.evidence.power_sampling import power_sample
from benchmarks.markdown import spread, table
from powerflow_fast.data.prompts import Question
from powerflow_fast.evaluation.scores import is_correct

COUNTS = (4, 16, 64)  # of samples, for one answer
DRAWN = max(COUNTS)  # a question
ALPHA = 4.0
POWER = {"power 4 x 4": 4, "power 8 x 8": 8}  # name -> candidates, and lookaheads of each
ANSWERS = 4  # a question, by power sampling
VOTES = "votes"
METHODS = (VOTES, *POWER)
SINGLE = "one sample"
LABELS = [
    SINGLE,
    *(f"best of {n}" for n in COUNTS),
    *(f"majority of {n}" for n in COUNTS),
    *POWER,
]
Figures = dict[str, dict[str, float]]  # label -> accuracy, tokens and seconds of an answer


def run(method: str, questions: Sequence[Question], max_new_tokens: int, seed: int) -> Figures:
    """Figures by label: all that come from plain samples, or those of one power sampling."""
    if method == VOTES:
        return _votes(questions, max_new_tokens, seed)
    loaded = base_model()
    began = time.perf_counter()
    drawn = power_sample(
        *(*loaded, [q.prompt for q in questions], ANSWERS, max_new_tokens, seed),
        **dict(alpha=ALPHA, candidates=POWER[method], lookaheads=POWER[method]),
    )
    seconds = (time.perf_counter() - began) / len(drawn.texts)
    answers = [q.answers for q in questions for _ in range(ANSWERS)]
    return {method: _figures(map(is_correct, drawn.texts, answers), drawn.tokens, seconds)}


def _votes(questions: Sequence[Question], max_new_tokens: int, seed: int) -> Figures:
    loaded = base_model()
    prompts = [q.prompt for q in questions]
    began = time.perf_counter()
    drawn = sample(*loaded, prompts, DRAWN, max_new_tokens, seed)
    seconds = (time.perf_counter() - began) / (len(questions) * (DRAWN + 1))  # one is greedy

    def likeliest(start: int, stop: int) -> str:
        return drawn.texts[start + int(drawn.logps[start:stop].argmax())]

    def voted(start: int, stop: int) -> str:
        return majority([answer_of(text) for text in drawn.texts[start:stop]])

    def figures(choose: Callable[[int, int], str], count: int) -> dict[str, float]:
        right = [
            is_correct(choose(start, start + count), question.answers)
            for i, question in enumerate(questions)
            for start in range(i * DRAWN, (i + 1) * DRAWN, count)
        ]
        return _figures(right, count * max_new_tokens, count * seconds)

    found = {SINGLE: figures(likeliest, 1)}
    found |= {f"best of {count}": figures(likeliest, count) for count in COUNTS}
    return found | {f"majority of {count}": figures(voted, count) for count in COUNTS}


def _figures(right, tokens: float, seconds: float) -> dict[str, float]:
    accuracy = round(statistics.fmean(right), 4)
    return {"accuracy": accuracy, "tokens": tokens, "seconds": round(seconds, 5)}


def summarise(runs: Sequence[dict[str, Figures]]) -> dict[str, dict[str, list[float]]]:
    """Label -> accuracy by seed, the mean over tasks; tokens and seconds of an answer likewise.

    Args:
        runs: of every seed, task -> figures of every label.
    """
    return {
        label: {
            key: [round(statistics.fmean(t[label][key] for t in one.values()), 5) for one in runs]
            for key in ("accuracy", "tokens", "seconds")
        }
        for label in LABELS
    }


def tables(
    found: dict[str, dict[str, list[float]]], trained: dict[str, dict[str, list[float]]]
) -> str:
    """By label; `trained` has policies of one sample an answer: accuracy and seconds of a run."""
    one = found[SINGLE]
    rows = []
    for label, figures in found.items():
        cost = [f"{statistics.fmean(figures['tokens']):.0f}", _milliseconds(figures["seconds"])]
        rows.append([label, spread([100 * value for value in figures["accuracy"]]), *cost, "0"])
    for label, figures in trained.items():
        cost = [f"{statistics.fmean(one['tokens']):.0f}", _milliseconds(one["seconds"])]
        seconds = f"{statistics.fmean(figures['seconds']):.0f}"
        rows.append([label, spread([100 * value for value in figures["accuracy"]]), *cost, seconds])
    head = [
        "what an answer costs",
        "accuracy, %",
        "tokens computed",
        "milliseconds",
        "training, seconds",
    ]
    return table(head, rows)


def break_even(
    found: dict[str, dict[str, list[float]]], training_seconds: float
) -> dict[str, float]:
    """Power sampling -> the number of answers whose extra time is that of the training."""
    mean = {label: statistics.fmean(found[label]["seconds"]) for label in (SINGLE, *POWER)}
    return {label: training_seconds / (mean[label] - mean[SINGLE]) for label in POWER}


def draw(
    axes: Any,
    found: dict[str, dict[str, list[float]]],
    trained: dict[str, dict[str, list[float]]],
    colors: dict[str, str],
) -> None:
    """Accuracy against the tokens of an answer."""
    kinds = {"best of n": "best", "majority of n": "majority", "power sampling": "power"}
    for marker, (name, start) in zip("o^s", kinds.items(), strict=True):
        labels = [label for label in found if label.startswith(start)]
        tokens = [statistics.fmean(found[label]["tokens"]) for label in labels]
        accuracy = [100 * statistics.fmean(found[label]["accuracy"]) for label in labels]
        style = dict(color="gray", markersize=4, linewidth=1)
        axes.plot(tokens, accuracy, marker + "-", label=name, **style)
    single = statistics.fmean(found[SINGLE]["tokens"])
    axes.plot(single, 100 * statistics.fmean(found[SINGLE]["accuracy"]), "ok", markersize=4)
    for label, figures in trained.items():
        accuracy = 100 * statistics.fmean(figures["accuracy"])
        axes.plot(single, accuracy, "o", color=colors[label], markersize=4)
    axes.set_xscale("log")
    axes.set(xlabel="tokens computed an answer", ylabel="held-out accuracy, %")
    axes.legend(fontsize=7)


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * statistics.fmean(seconds):.0f}"
