"""How far ahead of the trainer rollouts may be drawn: accuracy after equally many updates.

PowerFlow at alpha 4 as in `sharpening`: the same tasks, questions, completions, updates and
learning rate. Every setting draws its rollouts by `in_process.InProcess`, the one on policy too,
with the same random numbers for one seed, so that the age of the rollouts is all that differs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.evidence import Run, language, sharpening
from benchmarks.evidence.tasks import TASKS, task
from benchmarks.markdown import spread, table
from powerflow_fast.models.sampling import sample

TITLE = "Rollouts drawn some updates ahead, SmolLM2-135M"
SEEDS = (0, 1, 2, 3, 4)
ALPHA, LEARNING_RATE = 4.0, 3e-4  # what `sharpening` chose at this alpha
BASE, ON_POLICY = "base", "on policy"
SETTINGS: dict[str, dict[str, Any]] = {  # options of PowerFlowConfig
    ON_POLICY: {},
    "1 ahead": {"rollout_ahead": 1},
    "2 ahead": {"rollout_ahead": 2},
    "4 ahead": {"rollout_ahead": 4},
    "8 ahead": {"rollout_ahead": 8},
    "2 updates a rollout": {"num_iterations": 2},
    "the second on one of 4": {"num_iterations": 2, "replay": 4},
}
KL_QUESTIONS = 6  # held-out ones of a task, one completion of each
CURVES = {  # name here -> the trainer's; 0 where a step does not log it
    "staleness": "sampling/staleness",
    "drift": "sampling/drift/mean",
    "gap": "sampling/sampling_logp_difference/max",
    "importance": "importance/mean",
    "clipped": "importance/clipped_share",
}
Results = dict[str, Any]


def plan(done: Results) -> list[Run]:
    return [
        Run(f"{setting} {seed}", {"setting": setting, "seed": seed})
        for seed in SEEDS
        for setting in (BASE, *SETTINGS)
    ]


def run(setting: str, seed: int, steps: int = sharpening.STEPS) -> Results:
    """Train SmolLM2 with rollouts of this age, unless it is the base; measure it held out."""
    if setting == BASE:
        return sharpening.run(BASE, seed)
    from benchmarks.evidence.in_process import InProcess

    tasks = [task(name) for name in TASKS]
    with language.trained(
        sharpening.mixed(tasks, seed, steps),
        **sharpening.budget(tasks),
        seed=seed,
        steps=steps,
        learning_rate=LEARNING_RATE,
        powerflow={"alpha": ALPHA, **SETTINGS[setting]},
        sampler=InProcess(),
    ) as result:
        held_out = sharpening.asked(tasks, "held_out", seed)
        prompts = [q.prompt for _, questions in held_out for q in questions[:KL_QUESTIONS]]
        size = max(t.max_new_tokens for t in tasks)
        return {
            "held_out": sharpening.measured(result.model, tasks, "held_out", seed),
            "kl_at_the_end": kl_to_base(result.model, prompts, size, seed),
            "accuracy": [step["accuracy"] for step in result.steps],
            "seconds": result.seconds,
            "curves": {
                name: [float(f"{log.get(key, 0.0):.4g}") for log in result.logs]
                for name, key in CURVES.items()
            },
        }


@torch.no_grad()
def kl_to_base(model, prompts: Sequence[str], max_new_tokens: int, seed: int) -> float:
    """KL(policy || base) [nats/token], over the vocabulary, on fresh completions of the policy."""
    _, tokenizer = language.base_model()
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = sample(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
        )
    _, counted = drawn.completion(inputs["input_ids"].shape[1])
    given = {name: value for name, value in drawn._asdict().items() if name != "labels"}

    def log_p():
        logits = model(**given, logits_to_keep=counted.shape[1] + 1).logits[:, :-1]
        return logits[counted].float().log_softmax(-1)

    policy = log_p()
    with model.disable_adapter():
        base = log_p()
    return round((policy.exp() * (policy - base)).sum(-1).mean().item(), 5)


def summarise(done: Results) -> Results:
    """Per setting, by seed: held-out accuracy and its change, KL, and the curves' means."""
    on_policy = _accuracy(done, ON_POLICY)
    summary: Results = {BASE: {"accuracy": _accuracy(done, BASE)}}
    for setting in SETTINGS:
        runs = [done[f"{setting} {seed}"] for seed in SEEDS]
        accuracy = _accuracy(done, setting)
        pairs = zip(accuracy["all"], on_policy["all"], strict=True)
        curves = {
            name: [
                statistics.mean(values)
                for values in zip(*(one["curves"][name] for one in runs), strict=True)
            ]
            for name in CURVES
        }
        summary[setting] = {
            "accuracy": accuracy,
            "change": [round(value - reference, 4) for value, reference in pairs],
            "within_spread": within(accuracy["all"], on_policy["all"]),
            "kl": [one["kl_at_the_end"] for one in runs],
            "curves": {name: [round(v, 5) for v in curve] for name, curve in curves.items()},
            "largest_gap": max(max(one["curves"]["gap"]) for one in runs),
        }
    return summary


def within(values: list[float], reference: list[float]) -> bool:
    """Whether the mean is at most one standard deviation of `reference` from its mean."""
    apart = abs(statistics.mean(values) - statistics.mean(reference))
    return apart <= statistics.stdev(reference)


def _accuracy(done: Results, setting: str) -> dict[str, list[float]]:
    """Task, and "all" for the mean over them -> accuracy of a sample, per seed."""
    held_out = [done[f"{setting} {seed}"]["held_out"] for seed in SEEDS]
    found = {name: [one[name]["sampled"] for one in held_out] for name in TASKS}
    found["all"] = [statistics.mean(values) for values in zip(*found.values(), strict=True)]
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def tables(results: Results) -> str:
    summary = results["summary"]
    said = (
        "Held-out accuracy of a sample at T=1, per cent, mean ± standard deviation over "
        f"{len(SEEDS)} seeds; the change from on policy, in points, for each seed; and whether the "
        "mean lies within one standard deviation of the one on policy."
    )
    rows = []
    for setting in (BASE, *SETTINGS):
        entry = summary[setting]
        cells = [
            spread([100 * value for value in entry["accuracy"][name]]) for name in (*TASKS, "all")
        ]
        change, inside = "", ""
        if setting not in (BASE, ON_POLICY):
            change = ", ".join(f"{100 * value:+.0f}" for value in entry["change"])
            inside = "yes" if entry["within_spread"] else "no"
        rows.append([setting, *cells, change, inside])
    head = ["", *TASKS, "all", "change per seed", "within the spread"]
    return "\n\n".join([said, table(head, rows), _figures_table(summary)])


def _figures_table(summary: Results) -> str:
    rows = []
    for setting in SETTINGS:
        curves, gap = summary[setting]["curves"], summary[setting]["largest_gap"]
        clipped, drift = curves["clipped"], curves["drift"]
        rows.append(
            [
                setting,
                f"{statistics.mean(curves['staleness']):.1f}",
                spread(summary[setting]["kl"], "{:.2f}"),
                f"{100 * statistics.mean(clipped):.0f} %, {100 * clipped[-1]:.0f} %",
                f"{statistics.mean(drift):.2f}, {drift[-1]:.2f}",
                f"{gap:.0e}" if gap else "0",
            ]
        )
    head = [
        "mean over seeds",
        "updates between drawn and used, mean over steps",
        "KL to the base at the end, nats/token",
        "weights clipped: mean over steps, last",
        "drift, nats/token: mean over steps, last",
        "largest difference between sampler and its policy, nats",
    ]
    return table(head, rows)


def draw(figure, results: Results) -> None:
    """Held-out accuracy by setting; drift and the share of clipped weights over steps."""
    summary = results["summary"]
    accuracy, drift, clipped = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    for place, setting in enumerate((BASE, *SETTINGS)):
        values = [100 * value for value in summary[setting]["accuracy"]["all"]]
        color = "black" if setting == BASE else f"C{place - 1}"
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        if setting == ON_POLICY:
            accuracy.axhspan(
                mean - deviation, mean + deviation, color=color, alpha=0.12, linewidth=0
            )
        accuracy.plot([place + 0.15] * len(values), values, ".", color=color, markersize=3)
        accuracy.errorbar(place, mean, deviation, fmt="o", markersize=4, linewidth=1, color=color)
        if setting == BASE:
            continue
        curves = summary[setting]["curves"]
        steps = range(1, len(curves["drift"]) + 1)
        drift.plot(steps, curves["drift"], color=color, label=setting)
        clipped.plot(steps, [100 * v for v in curves["clipped"]], color=color)
    accuracy.set_xticks(range(1 + len(SETTINGS)), [BASE, *SETTINGS], rotation=30)
    accuracy.set(ylabel="held-out accuracy, T=1, %")
    drift.set(xlabel="step", ylabel="drift since drawn, nats/token")
    clipped.set(xlabel="step", ylabel="weights clipped, %")
    figure.legend(*drift.get_legend_handles_labels(), loc="outside lower center", ncols=5)
