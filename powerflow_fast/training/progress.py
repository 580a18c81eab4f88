"""One line a log, for people: in place of the dictionary that transformers prints."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

SHOWN = {  # name in the logs -> what the line calls it, and its format
    "loss": ("loss", ".3g"),
    "residual/std": ("residual", ".3g"),
    "logps/policy": ("log pi", ".3f"),
    "logps/reference": ("log base", ".3f"),
    "completions/mean_length": ("length", ".1f"),
    "completions/distinct_per_prompt": ("distinct", ".1f"),
    "kl": ("KL", ".2g"),
}


def line(logs: dict[str, Any], step: int, last: int, group: int = 0) -> str:
    """The figures of a log of training, or of an evaluation.

    Args:
        logs: as a trainer logs them.
        step, last: this optimizer step, and the run's last.
        group: completions of a prompt; 0: not shown.
    """
    prefix = next((k[: -len("loss")] for k in logs if k.endswith("_loss")), "")
    prefix = prefix if "loss" not in logs else ""
    parts = [f"step {step}/{last}"]
    parts += [prefix.rstrip("_")] * bool(prefix)
    for name, (title, form) in SHOWN.items():
        value = logs.get(prefix + name)
        if isinstance(value, (int, float)):
            of = f"/{group}" if title == "distinct" and group else ""
            parts.append(f"{title} {value:{form}}{of}")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:.0f} tok/s")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _Lines(TrainerCallback):
    """For a callback that prints logs: their text, a line each, in place of dictionaries."""

    began: tuple[float, int] | None = None  # time and step

    def start(self, state) -> None:
        self.began = (time.perf_counter(), state.global_step)

    def text(self, args, state, logs: dict[str, Any] | None) -> str | None:
        logs = logs or {}
        if "train_runtime" in logs:
            return f"trained {state.global_step} steps in {duration(logs['train_runtime'])}"
        if not any(name == "loss" or name.endswith("_loss") for name in logs):
            return None
        group = getattr(args, "num_generations", 0)
        text = line(logs, state.global_step, state.max_steps, group)
        if "loss" in logs and self.began is not None:
            seconds, steps = time.perf_counter() - self.began[0], state.global_step - self.began[1]
            left = (state.max_steps - state.global_step) * seconds / max(steps, 1)
            text += f"  {duration(left)} left" if left > 0 else ""
        return text

    def write(self, text: str) -> None:
        print(text, flush=True)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.start(state)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        text = self.text(args, state, logs)
        if text and state.is_world_process_zero:
            self.write(text)


class LineProgress(_Lines, ProgressCallback):
    """The bar of transformers, and above it a line a log."""

    def write(self, text: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(text)


class LinePrinter(_Lines, PrinterCallback):
    """A line a log, without a bar."""


def show_lines(trainer: Any) -> None:
    """Lines in place of dictionaries, where the trainer prints logs at all (not in a notebook)."""
    for given, ours in ((ProgressCallback, LineProgress), (PrinterCallback, LinePrinter)):
        if any(type(callback) is given for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(given)
            trainer.add_callback(ours)
