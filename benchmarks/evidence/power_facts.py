"""Facts about power distributions that need no training: the length tilt's KL, majority votes."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.evidence.enumerable import Enumerable, kl

LAMBDAS = tuple(round(10 ** (i / 4), 5) for i in range(-12, 3))
POWERS = (1, 2, 4, 8, 16, 32, 64)  # alpha, and the number of votes
Results = dict[str, Any]


def tilted(alpha: float) -> Results:
    """KL of p^alpha exp(-lambda |y|) / Z from p^alpha / Z for lambdas of both signs; no training.

    It is lambda^2 / 2 times the variance of |y| under p^alpha / Z, up to the third order: with
    C(lambda) = log E exp(-lambda |y|), the KL is lambda C'(lambda) - C(lambda).
    """
    model = Enumerable(3, 6, stop=True)
    power = model.power(alpha)
    tilts = [*(-x for x in reversed(LAMBDAS)), *LAMBDAS]
    return {
        "lambda": tilts,
        "kl": [kl(model.power(alpha, tilt), power).item() for tilt in tilts],
        "variance": length_variance(model, power).item(),
    }


def second_order(result: Results) -> Results:
    """Slope in logarithms for |lambda| <= 0.1, and KL over its second-order value at some."""
    points = [
        (abs(tilt), value / (tilt**2 / 2 * result["variance"]), value)
        for tilt, value in zip(result["lambda"], result["kl"], strict=True)
    ]
    small = [(tilt, value) for tilt, _, value in points if tilt <= 0.1]
    logs = torch.tensor(small, dtype=torch.float64).log().T.tolist()
    return {
        "slope": statistics.linear_regression(*logs).slope,
        "ratio_at_0.1": [ratio for tilt, ratio, _ in points if tilt == 0.1],
        "ratio_at_1": [ratio for tilt, ratio, _ in points if tilt == 1.0],
    }


def length_variance(model: Enumerable, logps: torch.Tensor) -> torch.Tensor:  # [P]
    """Variance of |y| under exp(logps) [P, N]."""
    lengths, weights = model.lengths.double(), logps.exp()
    mean = (weights * lengths).sum(-1, keepdim=True)
    return (weights * (lengths - mean).square()).sum(-1)


def majority(models: int = 200, draws: int = 500) -> Results:
    """Probability of the answer that is likeliest under the base, mean over random models.

    A completion's answer is its first token (then wording follows) or its last (reasoning comes
    first). By power of sequences, p(y)^alpha, which PowerFlow trains; of answers, p(a)^alpha; and
    as the outcome of a vote of k samples, ties broken at random.
    """
    model = Enumerable(4, 4, prompts=models)
    answers = torch.tensor(model.sequences)
    out: Results = {"powers": list(POWERS)}
    draw = torch.Generator().manual_seed(0)
    for place, name in ((0, "first"), (-1, "last")):
        one_hot = torch.nn.functional.one_hot(answers[:, place], 4).double()  # [N, answers]
        base = model.power(1).exp() @ one_hot  # [models, answers]
        best = base.argmax(-1, keepdim=True)
        by_sequence, by_answer, by_vote = [], [], []
        for power in POWERS:
            by_sequence.append(_mean(model.power(power).exp() @ one_hot, best))
            by_answer.append(_mean((power * base.log()).softmax(-1), best))
            votes = base.multinomial(draws * power, replacement=True, generator=draw)
            votes = votes.view(models, draws, power)
            counts = torch.stack([(votes == answer).sum(-1) for answer in range(4)], -1).double()
            counts += torch.rand(counts.shape, generator=draw) / 2
            elected = (counts.argmax(-1) == best).double().mean(-1)
            by_vote.append(elected.mean().item())
        mode = answers[model.power(1).argmax(-1), place]
        out[name] = {
            "sequences": by_sequence,
            "answers": by_answer,
            "votes": by_vote,
            "mode_has_it": (mode == best[:, 0]).double().mean().item(),
        }
    return out


def _mean(probabilities: torch.Tensor, best: torch.Tensor) -> float:
    return probabilities.gather(-1, best).mean().item()
