"""Whole trainers on the same model and rollouts: PowerFlowTrainer, and TRL's GRPOTrainer.

GRPO runs with beta > 0, since only then does it compute a reference, as PowerFlow always does. Both
have LoRA on every linear layer of SmolLM2-135M-Instruct, the same prompts and completions (random
tokens, drawn beforehand), no activation checkpointing and no logging to the outside. Each runs in
processes of its own: one is timed, and in the other freed memory goes back to the system at once,
which takes time and shows the peak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory

KINDS = ("powerflow", "powerflow, prompt for each", "grpo")


@dataclass(frozen=True)
class Rollout:
    """Sizes of what a step trains on, in tokens; without a `prompt` a short question of words."""

    prompts: int
    group: int
    completion: int
    prompt: int = 0

    @property
    def completions(self) -> int:
        return self.prompts * self.group


class Drawn:
    """Random prompts and completions of fixed length, the same for every trainer and step."""

    def __init__(self, sizes: Rollout, vocabulary: int) -> None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(
            100, vocabulary, (sizes.completions, sizes.prompt + sizes.completion), generator=draw
        )
        firsts = ids[:: sizes.group, : sizes.prompt].repeat_interleave(sizes.group, 0)
        self.prompts, self.completions = firsts.tolist(), ids[:, sizes.prompt :].tolist()

    def __call__(self, prompts, trainer) -> dict[str, Any]:
        ids = self.prompts[: len(prompts)]
        if not ids[0]:
            ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        completions = self.completions[: len(prompts)]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def seconds(kind: str, sizes: Rollout, steps: int, folder: Path) -> list[float]:
    """Of each step but the first."""
    return memory.in_child(_run, kind, sizes, steps, folder)[0][1:]


def peak_bytes(kind: str, sizes: Rollout, folder: Path) -> int:
    """That the second step adds to what is held before it."""
    return memory.in_child(_run, kind, sizes, 2, folder, True)[1]


def _options(sizes: Rollout, steps: int, folder: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=sizes.completions,
        num_generations=sizes.group,
        max_completion_length=sizes.completion,
        max_steps=steps,
        logging_steps=1,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _run(
    kind: str, sizes: Rollout, steps: int, folder: Path, for_memory: bool = False
) -> tuple[list[float], int]:
    if for_memory:
        memory.return_freed_blocks()
    trainer = _trainer(kind, sizes, steps, folder)
    from transformers import TrainerCallback

    times: list[float] = []
    held = 0

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            nonlocal held
            if len(times) == 1:
                held = _held()
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter() - self.began)

    trainer.add_callback(Clock())
    trainer.train()
    return times, _peak() - held


def _held() -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    memory.reset_resident_peak()
    return memory.resident("VmRSS")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return memory.resident("VmHWM")


def _trainer(kind: str, sizes: Rollout, steps: int, folder: Path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer
    from powerflow_fast.models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    common = dict(
        train_dataset=Dataset.from_dict({"prompt": ["What is the capital of France?"] * 64}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=Drawn(sizes, model.config.vocab_size),
    )
    options = _options(sizes, steps, folder)
    if kind == "grpo":
        rewards = lambda completions, **_: [float(i % 2) for i in range(len(completions))]  # noqa: E731
        return GRPOTrainer(model, rewards, GRPOConfig(**options, beta=0.04), **common)
    options["shared_prompt"] = "on" if kind == "powerflow" else "off"
    args = PowerFlowConfig(**options, sample_completions=0, draw_curves=False)
    return PowerFlowTrainer(model, args, **common)
