"""curves.png: a run at a glance, drawn from its logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from powerflow_fast.evaluation.record import RunRecord

PICTURE, NUMBERS = "curves.png", "curves.json"
BEFORE, AFTER, GOAL = "#9aa5b1", "#1f6fb2", "#444444"


class Curves(TrainerCallback):
    """Draws `record`'s run at its end."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.record.steps = state.global_step
            save(state.log_history, args.output_dir, self.record)


def save(history: list[dict[str, Any]], folder: str | Path, record: RunRecord) -> bool:
    """Write the logs of training as JSON and, where matplotlib is installed, as a picture.

    Args:
        history: the trainer's `state.log_history`.
        folder: is made where it does not exist.
        record: of the run.

    Returns:
        Whether there is a picture.
    """
    rows = [row for row in history if "residual/std" in row]
    if not rows:
        return False
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / NUMBERS).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    try:
        draw(rows, path / PICTURE, record)
    except ImportError:
        return False
    return True


def draw(rows: list[dict[str, Any]], path: Path, record: RunRecord) -> None:
    """Four panels: held-out scores (or how many completions differ), residual, log-probs, length.

    Dots are logged values, lines running means. `rows` are logs of training steps.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    axes = figure.subplots(2, 2)
    if record.held_out:
        _bars(axes[0, 0], record.held_out)
    else:
        _curve(axes[0, 0], rows, "completions/distinct_per_prompt", "different ones")
        axes[0, 0].axhline(record.num_generations, color=GOAL, lw=0.8, ls=":")
        unit = f"of {record.num_generations}"
        _label(axes[0, 0], "Different completions of a prompt", unit, zero=True)
    _curve(axes[0, 1], rows, "residual/std", "standard deviation")
    axes[0, 1].axhline(0, color=GOAL, lw=1, ls="--", label="goal: 0")
    _label(axes[0, 1], "Residual of the loss", "nats/token", zero=True)
    axis = axes[1, 0]
    expected = record.held_out.get("forecast", {})
    for name, title, color in (("policy", "log pi", AFTER), ("reference", "log base", "#c1662f")):
        _curve(axis, rows, f"logps/{name}", title, color)
        if name in expected:
            text = f"{title}: forecast, held-out prompts"
            axis.axhline(expected[name], color=color, lw=1, ls="--", label=text)
    _label(axis, "Log-probabilities of what the policy writes", "nats/token")
    _curve(axes[1, 1], rows, "completions/mean_length", "mean")
    _label(axes[1, 1], "Length of completions", "tokens", zero=True)
    for axis in axes.flat:
        if axis.get_xlabel():
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    title = f"{record.hub_name or record.model}, alpha = {record.alpha:g}, seed {record.seed}"
    title += f", {record.steps} steps"
    if record.minutes is not None:
        title += f", {record.minutes:.1f} min"
    figure.suptitle(title)
    figure.savefig(path)


def _curve(axis, rows: list[dict[str, Any]], name: str, title: str, color: str = AFTER) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, ".", color=color, alpha=0.35, ms=5)
    reach = max(1, len(values) // 16)  # to either side
    parts = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    means = [sum(part) / len(part) for part in parts]
    axis.plot(steps, means, "-", color=color, lw=1.6, label=title)


def _label(axis, title: str, unit: str, zero: bool = False) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
    if zero:
        low, high = axis.get_ylim()
        axis.set_ylim(min(0, low), high + 0.1 * (high - min(0, low)))


def _bars(axis, held: dict[str, Any]) -> None:
    """Bars with standard errors: accuracies where there are answers, else different word pairs."""
    names = {"accuracy_sampled": "sampled", "accuracy_greedy": "greedy"}
    title = "Accuracy on held-out prompts"
    if held["before"]["accuracy_sampled"] is None:
        names, title = {"distinct_bigrams": "completions"}, "Different word pairs, held-out prompts"
    for when, color, shift in (("before", BEFORE, 0), ("after", AFTER, 0.38)):
        scores = held[when]
        places = [place + shift for place in range(len(names))]
        shares = [100 * scores[name] for name in names]
        errors = [100 * scores["standard_errors"].get(name, 0.0) for name in names]
        axis.bar(places, shares, 0.36, yerr=errors, color=color, label=when, capsize=3)
    axis.set_xticks([place + 0.19 for place in range(len(names))], list(names.values()))
    axis.margins(y=0.3)  # for the legend
    _label(axis, title, "per cent ± standard error", zero=True)
    axis.set_xlabel("")
