"""Length bias (Figure 3 of arXiv 2603.18363): what one completion's log-probs are summed to.

    trajectory   p^alpha over whole completions, with sums of log-probs
    token        the energy alpha * log p is divided by the number of tokens, log pi is not
    LA-TB        both are means over tokens (eq. 10)

The first two are trained as trajectory balance (TB) and as policy gradient (RL: the reward is
alpha * log p - log pi, its sum or its mean per token, with the group's mean as the baseline and a
sum over tokens in the loss, as Dr. GRPO, arXiv 2503.20783). On policy and with the group's log Z'
the gradient of TB is that of RL for the same energy, so the two trajectory forms differ by the
scale of the gradient alone: their agreement is a check. Every method has the same learning rate.

Every rollout of a run is of the same two questions: between different ones, lengths differ more
than a few steps could change them. So this shows what an objective does to its own samples, and
nothing about questions that it was not trained on. Another seed has two other questions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence import Run, language
from benchmarks.evidence.energy import Energy
from benchmarks.markdown import table
from powerflow_fast.data.prompts import Question, read_questions
from powerflow_fast.evaluation.scores import is_correct
from powerflow_fast.models.smollm2 import chat_prompt
from powerflow_fast.training import health

TITLE = "Length, repetition and accuracy of five ways to match p^alpha"
SEEDS = (0, 1)
ALPHA = 4.0
METHODS = {  # name -> (options of PowerFlowConfig, or the reduction of RL's reward)
    "TB, trajectory": {"balance": "trajectory"},
    "TB, token": {"balance": "token"},
    "RL, trajectory": "sum",
    "RL, token": "mean",
    "LA-TB": {"balance": "length"},
}
# Of each seed. SmolLM2's greedy answers to them are right, and most of them long.
QUESTIONS = (
    ("What is the main language of France?", "What is the plural of mouse?"),
    ("What color is the sky on a clear day?", "What is the opposite of hot?"),
)
TRAINING = dict(
    steps=9,
    learning_rate=1e-3,
    max_new_tokens=20,
    prompts_per_step=2,
    completions=4,
)
GRPO = dict(loss_type="dr_grpo", scale_rewards="none", beta=0.0)
PANELS = {  # of a step -> label
    "length": "tokens a completion",
    "distinct_4grams": "distinct 4-grams within one",
    "echoes": "repeat their question",
    "accuracy": "accuracy",
}


def plan(done: dict[str, Any]) -> list[Run]:
    """Every method before the next seed."""
    return [
        Run(f"{method}, seed {seed}", {"method": method, "seed": seed})
        for seed in SEEDS
        for method in METHODS
    ]


def run(method: str, seed: int) -> dict[str, Any]:
    """Train by one method on the seed's `QUESTIONS`, in chat format; figures of every rollout."""
    known = {q.prompt: q.answers for q in read_questions()}
    questions = [Question(chat_prompt(text), known[text]) for text in QUESTIONS[seed]]
    form = METHODS[method]
    watched = Within({chat_prompt(text): text for text in QUESTIONS[seed]})
    if isinstance(form, dict):
        how = dict(powerflow={"alpha": ALPHA, **form}, rewards=[watched])
    else:
        reward = Energy(*language.base_model(), alpha=ALPHA, reduction=form)
        how = dict(grpo=GRPO, rewards=[watched, reward])
    with language.trained(questions, seed=seed, **TRAINING, **how) as result:
        steps = zip(result.steps, watched.steps, strict=True)
        return {"steps": [{**line, **more} for line, more in steps], "seconds": result.seconds}


@dataclass
class Within:
    """A reward worth 0 that keeps how much of a rollout repeats itself or its prompt."""

    questions: dict[str, str]  # prompt -> question
    __name__: str = "within"
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, prompts, completions, completion_ids, **_: Any) -> list[float]:
        pairs = zip(completions, prompts, strict=True)
        echoes = [is_correct(text, [self.questions[prompt]]) for text, prompt in pairs]
        line = {
            "distinct_4grams": round(health.distinct_token_ngrams(completion_ids), 4),
            "echoes": sum(echoes) / len(echoes),
        }
        self.steps.append({**line, "sample": completions[0]})
        return [0.0] * len(completions)


def summarise(done: dict[str, Any]) -> dict[str, Any]:
    """method -> figure -> [first, last] quarter of the steps, one number per seed."""
    summary: dict[str, Any] = {}
    for method, runs in _by_method(done).items():
        figures = {}
        for name in (*PANELS, "repeated"):
            values = [[step[name] for step in steps] for steps in runs]
            figures[name] = {
                "start": [round(_mean(v[: _quarter(v)]), 4) for v in values],
                "end": [round(_mean(v[-_quarter(v) :]), 4) for v in values],
            }
        summary[method] = figures
    return summary


def draw(figure, results: dict[str, Any]) -> None:
    """One panel a figure, one line a method: mean over seeds, with every seed as a thin line."""
    runs = _by_method({name: entry["result"] for name, entry in results["runs"].items()})
    for (name, label), axes in zip(PANELS.items(), figure.subplots(1, len(PANELS)), strict=True):
        for method, seeds in runs.items():
            curves = [smooth([step[name] for step in steps]) for steps in seeds]
            mean = [_mean(values) for values in zip(*curves, strict=True)]
            (line,) = axes.plot(range(1, len(mean) + 1), mean, label=method, linewidth=2)
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=line.get_color(), linewidth=0.5)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(0, None if name == "length" else 1.05)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(runs))


def tables(results: dict[str, Any]) -> str:
    """First and last quarter of the steps, mean over seeds."""
    summary = results["summary"]
    head = (
        "first -> last quarter of the steps",
        "tokens",
        "distinct 4-grams within",
        "tokens equal to the one before",
        "repeat the question",
        "accuracy",
    )
    lines = []
    for method, figures in summary.items():
        cells = [method, _change(figures["length"], "{:.1f}".format)]
        for name in ("distinct_4grams", "repeated", "echoes", "accuracy"):
            cells.append(_change(figures[name], lambda x: f"{100 * x:.0f} %"))
        lines.append(cells)
    return table(head, lines)


def smooth(values: Sequence[float], window: int = 3) -> list[float]:
    """Mean of the last `window` values: a rollout is small."""
    return [_mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def _change(figure: dict[str, list[float]], show: Callable[[float], str]) -> str:
    """Means over seeds, and the seeds' own last values."""
    seeds = ", ".join(map(show, figure["end"]))
    return f"{show(_mean(figure['start']))} -> {show(_mean(figure['end']))} ({seeds})"


def _by_method(done: dict[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """method -> steps of every seed that is done, in the order of METHODS."""
    runs = {
        method: [
            done[name]["steps"] for seed in SEEDS if (name := f"{method}, seed {seed}") in done
        ]
        for method in METHODS
    }
    return {method: steps for method, steps in runs.items() if steps}


def _quarter(values: Sequence[float]) -> int:
    return max(1, len(values) // 4)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
