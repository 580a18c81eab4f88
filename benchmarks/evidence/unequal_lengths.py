"""What three forms of trajectory balance do to lengths, where every sequence can be listed.

Each form has its own optimum, of which `length_bias` sees the first steps on SmolLM2:

    trajectory   p^alpha / Z
    token        exp(alpha * mean of log p) / Z: no longer the smaller, the longer a sequence is
    length       p^alpha e^(-lambda |y|), with the lambda that makes its sum 1 (LA-TB, Prop. 3.2)
"""

from __future__ import annotations

import statistics
from typing import Any

from torch import Tensor

from benchmarks.evidence.enumerable import Enumerable, optimum, total_variation
from benchmarks.markdown import table

ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
FORMS = {"trajectory": "TB, trajectory", "token": "TB, token", "length": "LA-TB"}
SYMBOLS, LONGEST, MODELS = 3, 8, 4  # a symbol of 3 ends a sequence; models drawn at random


def run(alpha: float) -> dict[str, Any]:
    """Mean length of the base and of the loss's minimum in each form, a number a model."""
    model = Enumerable(SYMBOLS, LONGEST, stop=True, prompts=MODELS)
    found: dict[str, Any] = {"base": _mean_length(model, model.totals(model.base))}
    for form in FORMS:
        policy = model.totals(optimum(model, alpha, form)[0])
        distance = total_variation(policy, target(model, alpha, form)).max().item()
        found[form] = {"length": _mean_length(model, policy), "tv": float(f"{distance:.2g}")}
    return found


def target(model: Enumerable, alpha: float, form: str) -> Tensor:  # [P, N]
    """log of the distribution at which the form's loss is 0."""
    if form == "token":
        return (alpha * model.totals(model.base) / model.lengths).log_softmax(-1)
    return model.power(alpha, model.normalising_tilt(alpha) if form == "length" else 0.0)


def _mean_length(model: Enumerable, logps: Tensor) -> list[float]:
    return [round(x, 4) for x in (logps.exp() * model.lengths).sum(-1).tolist()]


def tables(found: dict[str, dict[str, Any]]) -> str:
    """By alpha, from the results of `run`."""
    lines = [
        ["base", *(f"{statistics.fmean(one['base']):.1f}" for one in found.values())],
        *(
            [label, *(f"{statistics.fmean(one[form]['length']):.1f}" for one in found.values())]
            for form, label in FORMS.items()
        ),
    ]
    worst = max(one[form]["tv"] for one in found.values() for form in FORMS)
    said = (
        f"Total variation of a minimum to the target of its form: at most {worst:.0e}, over "
        f"{MODELS} models, {len(found)} alphas and {len(FORMS)} forms."
    )
    head = [f"mean length, limit {LONGEST}", *(f"alpha {alpha}" for alpha in found)]
    return table(head, lines) + "\n\n" + said


def draw(axes: Any, found: dict[str, dict[str, Any]], colors: dict[str, Any]) -> None:
    """Mean length against alpha; `colors` by label."""
    alphas = [float(alpha) for alpha in found]
    for form, label in FORMS.items():
        lengths = [statistics.fmean(one[form]["length"]) for one in found.values()]
        axes.plot(alphas, lengths, "o-", color=colors.get(label), markersize=3)
    base = statistics.fmean(next(iter(found.values()))["base"])
    axes.axhline(base, color="black", linestyle="--", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="alpha", ylabel="tokens, listed models", ylim=(0, LONGEST + 0.3))
