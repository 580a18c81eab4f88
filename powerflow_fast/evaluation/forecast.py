"""What p^alpha would answer, before any training: the base's own samples, weighted.

LA-TB is 0 where log pi(y) = alpha log p(y) - lambda |y|, lambda = log Z' (arXiv 2603.18363,
Prop. 3.2). A sample y of p has the weight pi(y) / p(y) = p(y)^(alpha - 1) e^(-lambda |y|) under pi,
and lambda is the number that makes these weights average 1. Training goes to pi if nothing stops
it: a task that loses accuracy here will lose it in training.

Far from alpha = 1, and with long completions, a few samples have nearly all the weight. The report
says how many; where it says 1, the figures are those of the likeliest sample alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from powerflow_fast.data.prompts import Question
from powerflow_fast.evaluation.scores import Completions, is_correct

BISECTIONS = 60


@dataclass(frozen=True)
class Forecast:
    """Averages over prompts under one alpha; accuracy is None where no question has answers."""

    alpha: float
    accuracy: float | None
    mean_length: float  # tokens
    base_logp: float  # of a completion's tokens under the base [nats/token]
    policy_logp: float  # of the same tokens under the policy that training goes to [nats/token]
    effective_samples: float  # (sum w)^2 / sum w^2 over the samples of a prompt
    likeliest: tuple[str, ...]  # of each prompt's samples, under the policy


def power_weights(logps: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Weights that turn samples of p into those of LA-TB's optimum at `alpha`.

    Args:
        logps: [prompts, samples] log-probs of completions under p, summed over tokens [nats].
        lengths: [prompts, samples] tokens of each completion, > 0.
        alpha: > 0.

    Returns:
        [prompts, samples] float64, each row summing to 1.
    """
    return _weights_and_tilt(logps, lengths, alpha)[0]


def _weights_and_tilt(logps: Tensor, lengths: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """`power_weights`, and lambda [prompts, 1]."""
    power = (alpha - 1) * logps.double()
    lengths = lengths.double()
    # At `high` all weights are at most 1, at `low` at least 1; their mean falls with lambda.
    low = (power / lengths).amin(1, keepdim=True)
    high = (power / lengths).amax(1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_large = (power - middle * lengths).exp().mean(1, keepdim=True) > 1
        low, high = torch.where(too_large, middle, low), torch.where(too_large, high, middle)
    return (power - high * lengths).softmax(1), high


def forecast(
    drawn: Completions, questions: Sequence[Question], samples: int, alphas: Sequence[float]
) -> list[Forecast]:
    """One forecast for each of `alphas`.

    Args:
        drawn: completions that the base has sampled, with their log-probs.
        questions: whose prompts they complete, in the same order.
        samples: completions of each prompt.
        alphas: each > 0.
    """
    shape = (len(questions), samples)
    logps, lengths = drawn.base_logps.view(shape).double(), drawn.lengths.view(shape).double()
    right = None
    if all(question.answers for question in questions):
        answers = [q.answers for q in questions for _ in range(samples)]
        right = torch.tensor(list(map(is_correct, drawn.texts, answers))).view(shape)
    found = []
    for alpha in alphas:
        weights, tilt = _weights_and_tilt(logps, lengths, alpha)
        policy = alpha * logps - tilt * lengths
        length = (weights * lengths).sum(1)
        best = (weights.log() + logps).argmax(1) + torch.arange(shape[0]) * shape[1]
        found.append(
            Forecast(
                alpha=alpha,
                accuracy=None if right is None else float((weights * right).sum(1).mean()),
                mean_length=float(length.mean()),
                base_logp=float((weights * logps).sum() / length.sum()),
                policy_logp=float((weights * policy).sum() / length.sum()),
                effective_samples=float((1 / weights.square().sum(1)).mean()),
                likeliest=tuple(drawn.texts[i] for i in best.tolist()),
            )
        )
    return found


def forecast_table(forecasts: Sequence[Forecast], samples: int) -> str:
    """For a terminal, one column per alpha; `samples` were drawn for each prompt."""
    rows = {
        "alpha": [f"{f.alpha:g}" for f in forecasts],
        "accuracy": ["-" if f.accuracy is None else f"{100 * f.accuracy:.1f} %" for f in forecasts],
        "mean length, tokens": [f"{f.mean_length:.1f}" for f in forecasts],
        "log-prob under the base, nats/token": [f"{f.base_logp:.2f}" for f in forecasts],
        "log-prob under the policy, nats/token": [f"{f.policy_logp:.2f}" for f in forecasts],
        f"samples that carry it, of {samples}": [f"{f.effective_samples:.1f}" for f in forecasts],
    }
    width = max(map(len, rows))
    return "\n".join(
        f"{title:<{width}}" + "".join(f"{cell:>10}" for cell in cells)
        for title, cells in rows.items()
    )
