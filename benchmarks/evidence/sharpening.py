"""PowerFlow against supervised GRPO and three unsupervised rivals: held-out accuracy, same budget.

Every method trains on a mix of four tasks, one prompt of each a step, with the same prompts, number
of completions and steps for one seed. Its learning rate is searched first, in shorter runs on a
seed that is not among those reported, by the accuracy of samples on *training* questions
afterwards: answers are used to choose it, for every method alike. One more run of PowerFlow takes
the learning rate that the package ships. Beside them stand what PowerFlow aims at, p^alpha itself,
from weighted samples of the base, and what the base gives without training: `training_free`.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.evidence import Run, forecast_check, rivals, training_free
from benchmarks.evidence.language import base_model, measure, power_accuracy, trained
from benchmarks.evidence.tasks import TASKS, Task, task
from benchmarks.markdown import spread, table
from powerflow_fast.data.prompts import Question

TITLE = "Sharpening SmolLM2-135M: PowerFlow, supervised GRPO and three unsupervised rivals"
SEEDS = (0, 1, 2, 3, 4)
SEARCH_SEED = 100
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
STEPS, SEARCH_STEPS = 14, 10
COMPLETIONS = 6  # per prompt
QUESTIONS, SAMPLES = 12, 4  # measured of a task, and completions of each
# Adapters on the upper 15 of 30 layers alone, which halves the backward pass.
UPPER = {"target_modules": r".*\.layers\.(1[5-9]|2\d)\..*_proj"}

SHIPPED = "powerflow-4-shipped"  # with the package's learning rate, which is not searched
METHODS = {  # name -> its label
    "powerflow-1.5": "PowerFlow, alpha 1.5",
    "powerflow-2": "PowerFlow, alpha 2",
    "powerflow-4": "PowerFlow, alpha 4",
    "powerflow-8": "PowerFlow, alpha 8",
    SHIPPED: "PowerFlow, alpha 4, learning rate as shipped",
    "grpo": "GRPO, true answers",
    "intuitor": "Intuitor",
    "empo": "EMPO",
    "ttrl": "TTRL",
}
SEARCHED = tuple(method for method in METHODS if method != SHIPPED)
LABELS = {"base": "base model"} | METHODS
UNTRAINED = ("base", "target", *training_free.METHODS)
TARGETS = {alpha: f"p^{alpha}, where PowerFlow goes" for alpha in ("1.5", "2", "4", "8")}
TARGET_SAMPLES = 24  # per question
MEASURES = {  # key of `language.measure` -> column
    "sampled": "sampled, T=1",
    "greedy": "greedy",
    "pass_at_k": f"pass@{SAMPLES}",
    "majority": f"majority of {SAMPLES}",
    "diversity": "distinct right answers",
}


def plan(done: dict[str, Any]) -> list[Run]:
    """The search, the base model, and, once a method's search is done, its seeds."""
    runs = [
        Run(
            f"search {method} {rate:g}",
            dict(
                method=method,
                seed=SEARCH_SEED,
                learning_rate=rate,
                steps=SEARCH_STEPS,
                split="train",
            ),
        )
        for method in SEARCHED
        for rate in LEARNING_RATES
    ]
    runs += [
        Run(f"{name} {seed}", dict(method=name, seed=seed)) for name in UNTRAINED for seed in SEEDS
    ]
    for method in METHODS:
        scores = search_scores(done, method)
        if method == SHIPPED or len(scores) == len(LEARNING_RATES):
            options = dict(method=method, learning_rate=best(scores), steps=STEPS)
            runs += [Run(f"{method} {seed}", options | {"seed": seed}) for seed in SEEDS]
    return runs


def search_scores(done: dict[str, Any], method: str) -> dict[float, float]:
    """Learning rate -> accuracy on training questions, mean over tasks, of finished searches."""
    scores = {}
    for rate in LEARNING_RATES:
        if result := done.get(f"search {method} {rate:g}"):
            scores[rate] = statistics.mean(t["sampled"] for t in result["train"].values())
    return scores


def best(scores: dict[float, float]) -> float | None:
    """The learning rate with the highest score, the lowest of equals; None without a search."""
    return max(sorted(scores), key=lambda rate: scores[rate], default=None)


def run(
    method: str,
    seed: int,
    learning_rate: float | None = None,
    steps: int = STEPS,
    split: str = "held_out",
) -> dict[str, Any]:
    """Train SmolLM2 by `method`, if it is none of `UNTRAINED`, and measure it on `split`."""
    tasks = [task(name) for name in TASKS]
    model, _ = base_model()
    if method == "base":
        return {split: measured(model, tasks, split, seed)}
    if method == "target":
        return {split: _targets(model, tasks, split, seed)}
    if method in training_free.METHODS:
        return {
            split: {
                t.name: training_free.run(method, chosen, t.max_new_tokens, seed)
                for t, chosen in asked(tasks, split, seed)
            }
        }
    questions = mixed(tasks, seed, steps)
    options = budget(tasks) | dict(seed=seed, steps=steps, learning_rate=learning_rate)
    with trained(questions, **options, **objective(method, questions)) as result:
        found = {"steps": result.steps, "seconds": result.seconds}
        return found | {split: measured(result.model, tasks, split, seed)}


def budget(tasks: list[Task]) -> dict[str, Any]:
    """Keywords of `language.trained` that are the same for every method."""
    return dict(
        max_new_tokens=max(t.max_new_tokens for t in tasks),
        prompts_per_step=len(tasks),
        completions=COMPLETIONS,
        shuffle=False,
        lora=UPPER,
    )


def mixed(tasks: list[Task], seed: int, steps: int) -> list[Question]:
    """One training question of every task a step, in an order that the seed alone decides."""
    draw = random.Random(seed)
    orders = [draw.sample(t.train, len(t.train)) for t in tasks]
    return [order[step % len(order)] for step in range(steps) for order in orders]


def objective(method: str, questions: list[Question]) -> dict[str, Any]:
    """Keywords of `language.trained` that make the method."""
    kind, *alpha = method.split("-")
    if kind == "powerflow":
        return {"powerflow": {"alpha": float(alpha[0])}}
    reward: Callable = {
        "grpo": lambda: rivals.TrueAnswer({q.prompt: q.answers for q in questions}),
        "intuitor": lambda: rivals.SelfCertainty(*base_model()),
        "empo": lambda: rivals.semantic_entropy,
        "ttrl": lambda: rivals.majority_vote,
    }[kind]()
    return {"grpo": {"beta": 0.0}, "rewards": [reward]}


def measured(model, tasks: list[Task], split: str, seed: int) -> dict[str, dict[str, float]]:
    """Task -> figures of `language.measure`."""
    options = dict(samples=SAMPLES, seed=seed)
    return {
        t.name: measure(model, questions, max_new_tokens=t.max_new_tokens, **options)
        for t, questions in asked(tasks, split, seed)
    }


def _targets(model, tasks: list[Task], split: str, seed: int) -> dict[str, dict[str, float]]:
    """Task -> accuracy of p^alpha for every alpha of `TARGETS`."""
    options = dict(samples=TARGET_SAMPLES, seed=seed)
    return {
        t.name: {
            alpha: power_accuracy(
                model, questions, float(alpha), max_new_tokens=t.max_new_tokens, **options
            )
            for alpha in TARGETS
        }
        for t, questions in asked(tasks, split, seed)
    }


def asked(tasks: list[Task], split: str, seed: int) -> list[tuple[Task, list[Question]]]:
    """Every seed measures other questions, the same ones for all methods."""
    return [(t, random.Random(seed).sample(getattr(t, split), QUESTIONS)) for t in tasks]


def summarise(done: dict[str, Any]) -> dict[str, Any]:
    """Per method: the search, held-out figures by seed, gains over the base, the rollouts."""
    base, target = _by_seed(done, "base"), _by_seed(done, "target", TARGETS)
    gains = {alpha: _gains(target, alpha, base) for alpha in TARGETS}
    summary = {"base": {"held_out": base}, "target": {"held_out": target, "gain": gains}}
    free = [
        {
            name: {
                label: figures
                for method in training_free.METHODS
                for label, figures in done[f"{method} {seed}"]["held_out"][name].items()
            }
            for name in TASKS
        }
        for seed in SEEDS
    ]
    summary["training_free"] = training_free.summarise(free)
    for method in METHODS:
        held_out = _by_seed(done, method)
        scores = search_scores(done, method)
        curves = [done[f"{method} {seed}"]["steps"] for seed in SEEDS]
        summary[method] = {
            "search": {f"{rate:g}": round(score, 4) for rate, score in scores.items()},
            "learning_rate": best(scores),
            "held_out": held_out,
            "gain_sampled": _gains(held_out, "sampled", base),
            "rollout_accuracy": [[s["accuracy"] for s in curve] for curve in curves],
            "rollout_seconds": [[s["seconds"] for s in curve] for curve in curves],
            "seconds": [done[f"{method} {seed}"]["seconds"] for seed in SEEDS],
        }
    return summary


def _gains(held_out, key: str, base) -> dict[str, list[float]]:
    """Task -> what `key` has over a sample of the base, per seed."""
    return {
        name: _rounded([a - b for a, b in zip(found[key], base[name]["sampled"], strict=True)])
        for name, found in held_out.items()
    }


def _by_seed(
    done: dict[str, Any], method: str, keys: Iterable[str] = tuple(MEASURES)
) -> dict[str, dict[str, list[float]]]:
    """Task -> measure -> a value per seed; `mean` is the mean over tasks."""
    results = [done[f"{method} {seed}"]["held_out"] for seed in SEEDS]
    by_task = {
        name: {key: _rounded([result[name][key] for result in results]) for key in keys}
        for name in TASKS
    }
    means = {
        key: _rounded([statistics.mean(result[name][key] for name in TASKS) for result in results])
        for key in keys
    }
    return by_task | {"mean": means}


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


def accuracy_table(results: dict[str, Any], alphas: Iterable[str] = tuple(TARGETS)) -> str:
    """Of one sample, by method and task; of PowerFlow's rows those of `alphas`."""
    summary = results["summary"]
    seeds = len(SEEDS)
    said = (
        f"Held-out accuracy of a sample at T=1, per cent: mean ± standard deviation over {seeds} "
        f"seeds, each with {QUESTIONS} held-out questions a task, {SAMPLES} samples each; in "
        "brackets the change from the base model on the same questions."
    )
    target = summary["target"]
    rows = [("base model", summary["base"]["held_out"], "sampled", None)]
    rows += [(TARGETS[a], target["held_out"], a, target["gain"][a]) for a in alphas]
    left_out = {f"powerflow-{alpha}" for alpha in TARGETS if alpha not in alphas}
    rows += [
        (METHODS[method], summary[method]["held_out"], "sampled", summary[method]["gain_sampled"])
        for method in METHODS
        if method not in left_out
    ]
    lines = []
    for label, held_out, key, gains in rows:
        cells = [label]
        for name in (*TASKS, "mean"):
            gain = f" ({_percent(gains[name], '{:+.0f}')})" if gains else ""
            cells.append(_percent(held_out[name][key]) + gain)
        lines.append(cells)
    return said + "\n\n" + table(["", *TASKS, "all"], lines)


def tables(results: dict[str, Any]) -> str:
    summary = results["summary"]
    said = (
        "Mean over the four tasks, per cent (the last column counts); learning rate as searched: "
        "accuracy on training questions after a shorter run, per cent, for "
        + ", ".join(f"{rate:g}" for rate in LEARNING_RATES)
        + "."
    )
    lines = []
    for method, label in LABELS.items():
        entry = summary[method]
        mean = entry["held_out"]["mean"]
        cells = [label, *(_percent(mean[key]) for key in MEASURES if key != "diversity")]
        cells.append(spread(mean["diversity"], "{:.2f}"))
        if method == "base":
            cells += ["", "", ""]
        else:
            searched = " / ".join(f"{100 * score:.0f}" for score in entry["search"].values())
            rate = f"{entry['learning_rate']:g}" if method in SEARCHED else "default"
            cells += [rate, searched, spread(entry["seconds"], "{:.0f}")]
        lines.append(cells)
    head = ["", *MEASURES.values(), "learning rate", "searched", "seconds a run"]
    blocks = [accuracy_table(results), said, table(head, lines), _cost_tables(summary)]
    return "\n\n".join([*blocks, _forecast_table(summary)])


def _forecast_table(summary: dict[str, Any]) -> str:
    """What p^alpha promised of every task, seed and alpha, and what training gave."""

    def accuracy(held_out, key: str = "sampled") -> forecast_check.BySeed:
        return {name: held_out[name][key] for name in TASKS}

    return forecast_check.tables(
        accuracy(summary["base"]["held_out"]),
        {alpha: accuracy(summary["target"]["held_out"], alpha) for alpha in TARGETS},
        {alpha: accuracy(summary[f"powerflow-{alpha}"]["held_out"]) for alpha in TARGETS},
    )


def _cost_tables(summary: dict[str, Any]) -> str:
    """What an answer costs, and when training pays."""
    free = summary["training_free"]
    seconds = statistics.mean(summary["powerflow-4"]["seconds"])
    pays = [
        f"{count:,.0f} answers against {label}"
        for label, count in training_free.break_even(free, seconds).items()
    ]
    said = (
        f"Accuracy is the mean over the tasks, of {len(SEEDS)} seeds. The time of PowerFlow's "
        f"training at alpha 4 is that of {' and '.join(pays)}."
    )
    return training_free.tables(free, _trained(summary)) + "\n\n" + said


def _trained(summary: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Label -> accuracy of one sample and seconds of training, of the policies."""
    return {
        label: {
            "accuracy": summary[method]["held_out"]["mean"]["sampled"],
            "seconds": summary[method]["seconds"],
        }
        for method, label in METHODS.items()
    }


def _percent(values: list[float], form: str = "{:.0f}") -> str:
    return spread([100 * value for value in values], form)


def draw(figure, results: dict[str, Any]) -> None:
    """Rollouts over steps and over time, means with a standard error; held-out at the end."""
    summary = results["summary"]
    figure.set_size_inches(8, 6.4)
    (by_step, by_time), (by_task, by_cost) = figure.subplots(2, 2)
    for i, (method, label) in enumerate(METHODS.items()):
        entry, color = summary[method], f"C{i}"
        columns = list(zip(*entry["rollout_accuracy"], strict=True))
        mean = [100 * statistics.mean(column) for column in columns]
        error = [100 * statistics.stdev(column) / len(column) ** 0.5 for column in columns]
        seconds = [statistics.mean(c) for c in zip(*entry["rollout_seconds"], strict=True)]
        low, high = zip(*((m - e, m + e) for m, e in zip(mean, error, strict=True)), strict=True)
        for axes, xs in ((by_step, range(len(mean))), (by_time, seconds)):
            axes.plot(xs, mean, color=color, label=label)
            axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0)
    for i, (method, label) in enumerate(LABELS.items()):
        for place, name in enumerate((*TASKS, "mean")):
            values = [100 * v for v in summary[method]["held_out"][name]["sampled"]]
            deviation = statistics.stdev(values)
            by_task.errorbar(
                place + (i - len(METHODS) / 2) * 0.08,
                statistics.mean(values),
                deviation,
                fmt="o",
                markersize=3,
                linewidth=1,
                color="black" if method == "base" else f"C{i - 1}",
                label=label if not place else None,
            )
    by_step.set(xlabel="steps before", ylabel="accuracy of fresh rollouts, %")
    by_time.set(xlabel="seconds, one thread")
    by_task.set(ylabel="held-out accuracy, T=1, %")
    by_task.set_xticks(range(len(TASKS) + 1), [*TASKS, "all"], rotation=20)
    colors = {label: f"C{i}" for i, label in enumerate(METHODS.values())}
    training_free.draw(by_cost, summary["training_free"], _trained(summary), colors)
    figure.legend(*by_task.get_legend_handles_labels(), loc="outside lower center", ncols=3)
