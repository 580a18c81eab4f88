"""What each option of the objective changes: on enumerable models, and on SmolLM2-135M.

The enumerable half measures the distance to the target itself over several seeds. The other half
trains SmolLM2 on capitals and sums; it is short, and its held-out figures are noisy.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from benchmarks.evidence import Run, language
from benchmarks.evidence.enumerable import Enumerable, marks, total_variation, train
from benchmarks.evidence.tasks import task
from benchmarks.markdown import table
from powerflow_fast import fused_linear_tb_loss

TITLE = "Options of the objective, one changed at a time"
ALPHA = 4.0
# Enumerable half. The same completions make one group or several, so that only log Z' differs.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "groups of 2": {"group_size": 2},
    "groups of 4": {"group_size": 4},
    "groups of 8": {"group_size": 8},
    "groups of 16": {"group_size": 16},
    "learned": {"log_z": "learned"},
    "learned from 0": {"log_z": "learned from 0"},
}
NO_CLIP = 1e9
WEIGHTS: dict[str, dict[str, Any]] = {  # on rollouts that serve 8 updates
    "none": {"importance": "none"},
    "mean": {"importance": "mean"},
    "sum": {"importance": "sum"},
    "mean, not clipped": {"importance": "mean", "clip_eps": NO_CLIP},
    "sum, not clipped": {"importance": "sum", "clip_eps": NO_CLIP},
}
TABLES = {"estimators": ESTIMATORS, "weights": WEIGHTS}
STEPS, COMPLETIONS, PROMPTS, UPDATES, TABLE_LR = 300, 16, 8, 8, 0.1
SHOWN_STEPS = (30, 100, 300)
TABLE_SEEDS = (0, 1, 2, 3, 4)
# SmolLM2 half: options of PowerFlowConfig.
EXACT, LEARNED = "alpha 4", "learned log Z'"
LANGUAGE: dict[str, dict[str, Any]] = {
    EXACT: {},
    "alpha 2": {"alpha": 2.0},
    "alpha 8": {"alpha": 8.0},
    LEARNED: {"log_z": "learned"},
    "grad_tolerance 1e-4": {"grad_tolerance": 1e-4},
    "grad_tolerance 1e-3": {"grad_tolerance": 1e-3},
    "bf16 logits": {},
}
LANGUAGE_SEEDS = {"base": (0,), EXACT: (0, 1, 2, 3), LEARNED: (0, 1, 2, 3)}
OTHER_SEEDS = (0, 1)
LANGUAGE_STEPS, LEARNING_RATE = 7, 3e-4
FIGURES = ("sampled", "greedy", "pass_at_k", "diversity")
Results = dict[str, Any]


def plan(done: Results) -> list[Run]:
    runs = []
    for part, settings in TABLES.items():
        for setting in settings:
            for seed in TABLE_SEEDS:
                options = {"part": part, "setting": setting, "seed": seed}
                runs.append(Run(f"{part}/{setting}/{seed}", options))
    for setting in ("base", *LANGUAGE):
        for seed in seeds_of(setting):
            options = {"part": "language", "setting": setting, "seed": seed}
            runs.append(Run(f"language/{setting}/{seed}", options))
    return runs


def seeds_of(setting: str) -> tuple[int, ...]:
    """Of a setting on SmolLM2; the two estimates of log Z' have more."""
    return LANGUAGE_SEEDS.get(setting, OTHER_SEEDS)


def run(part: str, **options: Any) -> Results:
    return on_language(**options) if part == "language" else on_table(part, **options)


def on_table(part: str, setting: str, seed: int, steps: int = STEPS) -> Results:
    """Total variation over steps, mean over prompts."""
    reused = part == "weights"
    model = Enumerable(3, 4, stop=reused, prompts=PROMPTS, seed=seed)
    target = model.power(ALPHA, model.normalising_tilt(ALPHA))
    wanted = {*marks(steps), *SHOWN_STEPS}
    curve: dict[str, list[float]] = {"steps": [], "tv": []}
    training = train(
        model,
        ALPHA,
        steps=steps,
        completions=COMPLETIONS,
        learning_rate=TABLE_LR,
        seed=seed,
        updates=UPDATES if reused else 1,
        **TABLES[part][setting],
    )
    for step, logits in training:
        if step in wanted:
            distance = total_variation(model.totals(logits), target).mean().item()
            curve["steps"].append(step)
            curve["tv"].append(float(f"{distance:.4g}"))
    return curve


def on_language(setting: str, seed: int, steps: int = LANGUAGE_STEPS) -> Results:
    """One short training run: its losses, a hash of every rollout, held-out figures."""
    capitals, sums = task("capitals"), task("sums")
    held_out = capitals.held_out + sums.held_out
    size = capitals.max_new_tokens
    asked = dict(samples=4, max_new_tokens=size, seed=seed)
    if setting == "base":
        return {"held_out": language.measure(language.base_model()[0], held_out, **asked)}
    rollouts = Tokens()
    with bf16_logits() if setting == "bf16 logits" else nullcontext():
        with language.trained(
            capitals.train + sums.train,
            seed=seed,
            steps=steps,
            learning_rate=LEARNING_RATE,
            max_new_tokens=size,
            prompts_per_step=6,
            powerflow={"alpha": ALPHA, **LANGUAGE[setting]},
            rewards=[rollouts],
        ) as trained:
            held_out_figures = language.measure(trained.model, held_out, **asked)
    kept = ("loss", "residual/mean", "residual/std", "entropy", "certified/columns_kept")
    logs = {name: [line[name] for line in trained.logs] for name in kept if name in trained.logs[0]}
    accuracy = [line["accuracy"] for line in trained.steps]
    return {
        "held_out": held_out_figures,
        "accuracy": accuracy,
        "rollouts": rollouts.hashes,
        "seconds": trained.seconds,
        **logs,
    }


class Tokens:
    """A psi worth 0 that keeps a hash of every rollout's tokens, to see where two runs part."""

    __name__ = "tokens"

    def __init__(self) -> None:
        self.hashes: list[str] = []

    def __call__(self, completion_ids, **_: Any) -> list[float]:
        self.hashes.append(hashlib.sha256(repr(completion_ids).encode()).hexdigest()[:12])
        return [0.0] * len(completion_ids)


@contextmanager
def bf16_logits() -> Iterator[None]:
    """The trainer's loss reads bfloat16 hidden states and head, and rounds logits to bfloat16.

    Policy and reference alike; rollouts stay float32. That is what trainers without a float32 head
    compute.
    """

    def rounded(hidden, weight, targets, **options):
        half = torch.bfloat16
        for name in ("ref_hidden", "ref_weight"):
            if options.get(name) is not None:
                options[name] = options[name].to(half)
        options["round_logits"] = True
        return fused_linear_tb_loss(hidden.to(half), weight.to(half), targets, **options)

    with mock.patch("powerflow_fast.training.forward.fused_linear_tb_loss", rounded):
        yield


def summarise(done: Results) -> Results:
    """Rows of `tables`; what was not run is left out."""
    tabular = []
    for part, settings in TABLES.items():
        for setting in settings:
            runs = _of_seeds(done, part, setting, TABLE_SEEDS)
            if runs:
                tv = {
                    str(step): _spread([one["tv"][one["steps"].index(step)] for one in runs])
                    for step in SHOWN_STEPS
                }
                tabular.append({"part": part, "setting": setting, "tv": tv})
    held_out = []
    for setting in ("base", *LANGUAGE):
        runs = _of_seeds(done, "language", setting, seeds_of(setting))
        if runs:
            figures = {name: _spread([one["held_out"][name] for one in runs]) for name in FIGURES}
            held_out.append({"setting": setting, "seeds": len(runs), **figures})
    apart = [
        {"setting": setting, "seed": seed, **compare(exact, other)}
        for setting in LANGUAGE
        if setting.startswith(("grad_tolerance", "bf16"))
        for seed in OTHER_SEEDS
        if (exact := done.get(f"language/{EXACT}/{seed}"))
        and (other := done.get(f"language/{setting}/{seed}"))
    ]
    return {"tabular": tabular, "held_out": held_out, "apart": apart}


def compare(exact: Results, other: Results) -> Results:
    """How far two runs with one seed are apart; losses compare only while rollouts are the same.

    `same_steps` counts the steps before the first rollout with a different token.
    """
    pairs = list(zip(exact["rollouts"], other["rollouts"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    losses = list(zip(exact["loss"], other["loss"], strict=True))
    relative = [abs(a - b) / max(abs(a), 1e-12) for a, b in losses[:same]]
    accuracies = zip(exact["accuracy"], other["accuracy"], strict=True)
    columns = other.get("certified/columns_kept")
    return {
        "steps": len(pairs),
        "same_steps": same,
        "loss_difference": max((abs(a - b) for a, b in losses[:same]), default=None),
        "relative_loss_difference": max(relative, default=None),
        "loss_difference_all_steps": max(abs(a - b) for a, b in losses),
        "accuracy_difference_all_steps": max(abs(a - b) for a, b in accuracies),
        "held_out_difference": other["held_out"]["sampled"] - exact["held_out"]["sampled"],
        "columns_kept": [columns[0], columns[-1]] if columns else None,
    }


def _of_seeds(done: Results, part: str, setting: str, seeds: tuple[int, ...]) -> list[Results]:
    """The runs of a setting, or none unless all seeds are there."""
    runs = [done.get(f"{part}/{setting}/{seed}") for seed in seeds]
    return [one for one in runs if one] if all(runs) else []


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)}


def tables(results: Results) -> str:
    summary = results["summary"]
    titles = {
        "estimators": f"log Z', {COMPLETIONS} completions a step",
        "weights": f"importance weight, {UPDATES} updates per rollout, clipped to 1 -+ 0.2",
    }
    blocks = [
        _tabular_table(rows, titles[part])
        for part in TABLES
        if (rows := [row for row in summary["tabular"] if row["part"] == part])
    ]
    if summary["held_out"]:
        blocks.append(_held_out_table(summary["held_out"]))
    if summary["apart"]:
        blocks.append(_apart_table(summary["apart"]))
    return "\n\n".join(blocks)


def _tabular_table(rows: list[Results], title: str) -> str:
    steps = list(rows[0]["tv"])
    first = f"{title}: total variation, mean (least to most of {len(TABLE_SEEDS)} seeds) after"
    return table(
        [first, *(f"{step} steps" for step in steps)],
        ([row["setting"], *(_range(row["tv"][step], 1, ".3f") for step in steps)] for row in rows),
    )


def _range(spread: Results, factor: float, form: str) -> str:
    mean, low, high = (factor * spread[name] for name in ("mean", "low", "high"))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _held_out_table(rows: list[Results]) -> str:
    columns = {
        "sampled": ("sampled", 100, ".1f"),
        "greedy": ("greedy", 100, ".1f"),
        "pass_at_k": ("pass@4", 100, ".1f"),
        "diversity": ("different right completions of 4", 1, ".2f"),
    }
    titles = [title if factor == 1 else f"{title}, %" for title, factor, _ in columns.values()]
    lines = []
    for row in rows:
        cells = [_range(row[name], factor, form) for name, (_, factor, form) in columns.items()]
        lines.append([row["setting"], str(row["seeds"]), *cells])
    return table([f"SmolLM2, {LANGUAGE_STEPS} steps, held out", "seeds", *titles], lines)


def _apart_table(rows: list[Results]) -> str:
    head = (
        "against the exact fp32 run of the same seed",
        "steps with the same rollouts",
        "loss, largest relative difference over these",
        "training accuracy, largest difference over all",
        "held-out sampled accuracy",
        "columns kept, first and last step",
    )
    lines = []
    for row in rows:
        relative, kept = row["relative_loss_difference"], row["columns_kept"]
        cells = (
            f"{row['setting']}, seed {row['seed']}",
            f"{row['same_steps']} of {row['steps']}",
            "-" if relative is None else f"{relative:.0e}",
            f"{100 * row['accuracy_difference_all_steps']:.1f} points",
            f"{100 * row['held_out_difference']:+.1f} points",
            "-" if kept is None else f"{100 * kept[0]:.0f} %, {100 * kept[1]:.0f} %",
        )
        lines.append(cells)
    return table(head, lines)


def draw(figure: Any, results: Results) -> None:
    """Distance to the target by log Z' and by weight; SmolLM2's loss and accuracy over steps."""
    figure.set_size_inches(8, 6)
    runs = {name: entry["result"] for name, entry in results["runs"].items()}
    (left, right), (losses, accuracy) = figure.subplots(2, 2)
    for axes, part, title in (
        (left, "estimators", "log Z'"),
        (right, "weights", "importance weight"),
    ):
        for setting in TABLES[part]:
            found = _of_seeds(runs, part, setting, TABLE_SEEDS)
            if found:
                tv = _mean_over([one["tv"] for one in found])
                axes.plot(found[0]["steps"], tv, label=setting, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="total variation")
        axes.set_title(title, fontsize=9)
        if axes.lines:
            axes.legend(fontsize=7)
    for setting in LANGUAGE:
        found = _of_seeds(runs, "language", setting, OTHER_SEEDS)  # the same for every line
        if found:
            steps = range(1, len(found[0]["loss"]) + 1)
            losses.plot(steps, _mean_over([one["loss"] for one in found]), linewidth=1)
            share = _mean_over([one["accuracy"] for one in found])
            accuracy.plot(steps, share, label=setting, linewidth=1)
    losses.set(xlabel="steps of SmolLM2", ylabel="loss", yscale="log")
    accuracy.set(xlabel="steps of SmolLM2", ylabel="accuracy of rollouts")
    accuracy.legend(fontsize=7)


def _mean_over(curves: list[list[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*curves, strict=True)]
