"""Steps per minute: PowerFlowTrainer against TRL's GRPOTrainer, same model and rollouts.

    pytest benchmarks/test_trainer_step.py --results runs/bench

GRPO runs with beta > 0, since only then does it compute a reference, as PowerFlow always does. Both
have LoRA on every linear layer of SmolLM2-135M-Instruct, the same completions (drawn beforehand),
no activation checkpointing and no logging to the outside.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

pytest.importorskip("trl")

STEPS = 6  # the first is not counted
PROMPTS, COMPLETIONS, LENGTH = 2, 4, 64
BAR = 0.9  # of TRL's steps per minute


class Rollouts:
    """Random completions of fixed length, the same for every trainer and step."""

    def __init__(self, vocabulary: int) -> None:
        draw = torch.Generator().manual_seed(0)
        shape = (PROMPTS * COMPLETIONS, LENGTH)
        self.ids = torch.randint(100, vocabulary, shape, generator=draw).tolist()

    def __call__(self, prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        return {"prompt_ids": ids, "completion_ids": self.ids[: len(prompts)], "logprobs": None}


def options(folder) -> dict:
    return dict(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=PROMPTS * COMPLETIONS,
        num_generations=COMPLETIONS,
        max_completion_length=LENGTH,
        max_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def step_times(kind: str, folder) -> list[float]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer
    from powerflow_fast.models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    common = dict(
        train_dataset=Dataset.from_dict({"prompt": ["What is the capital of France?"] * 64}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=Rollouts(model.config.vocab_size),
    )
    if kind == "powerflow":
        args = PowerFlowConfig(**options(folder), sample_completions=0)
        trainer = PowerFlowTrainer(model, args, **common)
    else:
        rewards = lambda completions, **_: [float(i % 2) for i in range(len(completions))]  # noqa: E731
        args = GRPOConfig(**options(folder), beta=0.04)
        trainer = GRPOTrainer(model, rewards, args, **common)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter() - self.began)

    trainer.add_callback(Clock())
    trainer.train()
    return times[1:]


def test_steps_per_minute(tmp_path, session):
    times: dict[str, list[float]] = {"powerflow": [], "grpo": []}
    for turn in range(2):  # in turns, so that a change of the machine's load meets both
        for kind in times:
            times[kind] += step_times(kind, tmp_path / f"{kind}{turn}")
    rate = {kind: 60 / statistics.median(seconds) for kind, seconds in times.items()}
    session.trainer = {"steps_per_minute": rate, "seconds": times}
    assert rate["powerflow"] >= BAR * rate["grpo"]
