"""Length bias (Figure 3 of arXiv 2603.18363): what one completion's log-probs are summed to.

    trajectory   p^alpha over whole completions, with sums of log-probs
    token        the energy alpha * log p is divided by the number of tokens, log pi is not
    LA-TB        both are means over tokens (eq. 10)

The first two are trained as trajectory balance (TB) and as policy gradient (RL: the reward is
alpha * log p - log pi, its sum or its mean per token, with the group's mean as the baseline and a
sum over tokens in the loss, as Dr. GRPO, arXiv 2503.20783). On policy and with the group's log Z'
the gradient of TB is that of RL for the same energy, so the two trajectory forms differ by the
scale of the gradient alone: their agreement is a check. Every method has the same learning rate.

Every rollout of a run is of the same two prompts, a question and an open one: between different
ones, lengths differ more than a few steps could change them. So this shows what an objective does
to its own samples, and nothing about prompts that it was not trained on. Each seed has two others.

Where the forms go in the end is shown on models small enough to list: `unequal_lengths`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evidence import Run, language, unequal_lengths
from benchmarks.evidence.energy import Energy
from benchmarks.evidence.sharpening import UPPER
from benchmarks.markdown import table
from powerflow_fast.data.prompts import Question, read_questions
from powerflow_fast.evaluation.scores import is_correct
from powerflow_fast.models.smollm2 import chat_prompt
from powerflow_fast.training import health

TITLE = "Length, repetition, likelihood and accuracy of five ways to match p^alpha"
SEEDS = (0, 1, 2, 3, 4)
ALPHA = 4.0
METHODS = {  # name -> (options of PowerFlowConfig, or the reduction of RL's reward)
    "TB, trajectory": {"balance": "trajectory"},
    "TB, token": {"balance": "token"},
    "RL, trajectory": "sum",
    "RL, token": "mean",
    "LA-TB": {"balance": "length"},
}
# A question and an open prompt a seed, drawn at random from 10 and 26: of 40 drawn of each kind,
# those whose four samples are of 30 to 80 tokens on the mean, two at most cut, two answers right.
PROMPTS = (
    ("What is the chemical symbol for oxygen?", "Write one line about a lighthouse."),
    ("What is the plural of wife?", "Write one line about the sea."),
    ("On which continent is Mexico?", "Write one line about a market."),
    ("What is 8 + 9?", "Invent a name for a new color."),
    ("What is the capital of Kenya?", "Suggest a place for a quiet walk."),
)
KINDS = ("question", "open")
TRAINING = dict(
    steps=7,
    learning_rate=1e-3,
    max_new_tokens=96,
    prompts_per_step=2,
    completions=4,
    lora=UPPER,
)
GRPO = dict(loss_type="dr_grpo", scale_rewards="none", beta=0.0)
PANELS = {  # of a step -> label
    "length_question": "tokens, question",
    "length_open": "tokens, open prompt",
    "distinct_4grams": "distinct 4-grams within one",
    "log_p": "log p of the base, nats/token",
    "accuracy": "accuracy, question",
}


def plan(done: dict[str, Any]) -> list[Run]:
    """The listed models, then every method before the next seed."""
    listed = [
        Run(f"listed, alpha {alpha:g}", {"method": "listed", "alpha": alpha})
        for alpha in unequal_lengths.ALPHAS
    ]
    return listed + [
        Run(f"{method}, seed {seed}", {"method": method, "seed": seed})
        for seed in SEEDS
        for method in METHODS
    ]


def run(method: str, **options: Any) -> dict[str, Any]:
    return unequal_lengths.run(**options) if method == "listed" else trained(method, **options)


def trained(method: str, seed: int) -> dict[str, Any]:
    """Train by one method on the seed's `PROMPTS`, in chat format; figures of every rollout."""
    known = {q.prompt: q.answers for q in read_questions()}
    questions = [Question(chat_prompt(text), known.get(text, ())) for text in PROMPTS[seed]]
    form = METHODS[method]
    watched = Within({chat_prompt(text): text for text in PROMPTS[seed]}, questions[0].answers)
    reward = None
    if isinstance(form, dict):
        how = dict(powerflow={"alpha": ALPHA, **form}, rewards=[watched])
    else:
        reward = Energy(*language.base_model(), alpha=ALPHA, reduction=form)
        how = dict(grpo=GRPO, rewards=[watched, reward])
    with language.trained(questions, seed=seed, shuffle=False, **TRAINING, **how) as result:
        log_p = reward.log_p if reward else [line["logps/reference"] for line in result.logs]
        steps = [
            {**line, **more, "log_p": round(float(value), 4)}
            for line, more, value in zip(result.steps, watched.steps, log_p, strict=True)
        ]
        return {"steps": steps, "seconds": result.seconds}


@dataclass
class Within:
    """A reward worth 0 that keeps figures of a rollout.

    Lengths by kind of prompt, right answers, and how much of it repeats itself or its prompt.
    """

    asked: dict[str, str]  # what is asked, by prompt, in the order of `KINDS`
    answers: Sequence[str]  # to the question
    __name__: str = "within"
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, prompts, completions, completion_ids, **_: Any) -> list[float]:
        echoes = [
            is_correct(text, [self.asked[prompt]])
            for text, prompt in zip(completions, prompts, strict=True)
        ]
        line: dict[str, Any] = {
            "distinct_4grams": round(health.distinct_token_ngrams(completion_ids), 4),
            "echoes": _mean(echoes),
        }
        for kind, prompt in zip(KINDS, self.asked, strict=True):
            rows = [i for i, other in enumerate(prompts) if other == prompt]
            line[f"length_{kind}"] = _mean([len(completion_ids[i]) for i in rows])
            line[f"sample_{kind}"] = completions[rows[0]]
            if kind == KINDS[0]:
                line["accuracy"] = _mean([is_correct(completions[i], self.answers) for i in rows])
        self.steps.append(line)
        return [0.0] * len(completions)


def summarise(done: dict[str, Any]) -> dict[str, Any]:
    """Per method and figure: [first, last] third of the steps, one number per seed; listed models.

    Their keys are "methods" and "listed", the latter's by alpha.
    """
    methods: dict[str, Any] = {}
    for method, runs in _by_method(done).items():
        figures = {}
        for name in (*PANELS, "repeated", "echoes"):
            values = [[step[name] for step in steps] for steps in runs]
            figures[name] = {
                "start": [round(_mean(v[: _third(v)]), 4) for v in values],
                "end": [round(_mean(v[-_third(v) :]), 4) for v in values],
            }
        methods[method] = figures
    listed = {
        f"{alpha:g}": done[name]
        for alpha in unequal_lengths.ALPHAS
        if (name := f"listed, alpha {alpha:g}") in done
    }
    return {"methods": methods, "listed": listed}


def draw(figure, results: dict[str, Any]) -> None:
    """One panel a figure, one line a method: mean over seeds, with every seed as a thin line."""
    figure.set_size_inches(8, 5)
    runs = _by_method({name: entry["result"] for name, entry in results["runs"].items()})
    panels = figure.subplots(2, 3).flat
    colors = {}
    for (name, label), axes in zip(PANELS.items(), panels, strict=False):
        for method, seeds in runs.items():
            curves = [smooth([step[name] for step in steps]) for steps in seeds]
            mean = [_mean(values) for values in zip(*curves, strict=True)]
            (line,) = axes.plot(range(1, len(mean) + 1), mean, label=method, linewidth=2)
            colors[method] = line.get_color()
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=line.get_color(), linewidth=0.3)
        axes.set(xlabel="step", ylabel=label)
        if name != "log_p":
            axes.set_ylim(0, None if name.startswith("length") else 1.05)
    if listed := results["summary"]["listed"]:
        unequal_lengths.draw(panels[len(PANELS)], listed, colors)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(runs))


def tables(results: dict[str, Any]) -> str:
    """First and last third of the steps, over seeds; then the listed models."""
    summary = results["summary"]
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "length_question": ("tokens, question", "{:.0f}".format),
        "length_open": ("tokens, open prompt", "{:.0f}".format),
        "distinct_4grams": ("distinct 4-grams within", _percent),
        "repeated": ("tokens equal to the one before", _percent),
        "log_p": ("log p of the base, nats/token", "{:.2f}".format),
        "accuracy": ("accuracy, question", _percent),
    }
    lines = [
        [method, *(_change(figures[name], show) for name, (_, show) in shown.items())]
        for method, figures in summary["methods"].items()
    ]
    head = ["first -> last third of the steps", *(title for title, _ in shown.values())]
    blocks = [table(head, lines)]
    if summary["listed"]:
        blocks.append(unequal_lengths.tables(summary["listed"]))
    return "\n\n".join(blocks)


def smooth(values: Sequence[float], window: int = 3) -> list[float]:
    """Mean of the last `window` values: a rollout is small."""
    return [_mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def _change(figure: dict[str, list[float]], show: Callable[[float], str]) -> str:
    """Means over seeds, and the standard deviation of the last."""
    end = figure["end"]
    spread = f" ± {show(statistics.stdev(end))}" if len(end) > 1 else ""
    return f"{show(_mean(figure['start']))} -> {show(_mean(end))}{spread}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _by_method(done: dict[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """method -> steps of every seed that is done, in the order of METHODS."""
    runs = {
        method: [
            done[name]["steps"] for seed in SEEDS if (name := f"{method}, seed {seed}") in done
        ]
        for method in METHODS
    }
    return {method: steps for method, steps in runs.items() if steps}


def _third(values: Sequence[float]) -> int:
    return max(1, len(values) // 3)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)
