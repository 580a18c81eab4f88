"""What the experiments on SmolLM2-135M share: the model, one training run, measuring.

Every run starts from the same base: adapters are new, on every linear layer, and taken off again.
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from powerflow_fast.evaluation import Sampling, complete, distinct_ngrams, is_correct, words
from powerflow_fast.prompts import Question


@functools.cache
def base_model():
    """(model, tokenizer), once per worker process."""
    from transformers.utils import logging

    from powerflow_fast.smollm2 import load_smollm2

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_smollm2()


@dataclass
class Rollouts:
    """A psi or reward function worth 0 that keeps a line per step about what was sampled."""

    answers: dict[str, tuple[str, ...]]
    __name__: str = "rollouts"
    began: float = field(default_factory=time.perf_counter)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, prompts, completions, completion_ids, **_: Any) -> list[float]:
        count = len(completions)
        line = {
            "seconds": round(time.perf_counter() - self.began, 2),
            "length": sum(map(len, completion_ids)) / count,
            "distinct_bigrams": distinct_ngrams(completions),
            "repeated": repeated(completion_ids),
        }
        known = [self.answers.get(prompt) for prompt in prompts]
        if all(known):
            right = map(is_correct, completions, known)
            line["accuracy"] = sum(right) / count
        self.steps.append({name: round(value, 4) for name, value in line.items()})
        return [0.0] * count


def repeated(completion_ids: Sequence[Sequence[int]]) -> float:
    """Mean share of a completion's tokens that are equal to the one before."""
    shares = [
        sum(a == b for a, b in zip(ids, ids[1:], strict=False)) / max(len(ids) - 1, 1)
        for ids in completion_ids
    ]
    return sum(shares) / len(shares)


@dataclass
class Trained:
    model: Any  # with its adapter
    steps: list[dict[str, Any]]  # of `Rollouts`
    logs: list[dict[str, Any]]  # of the trainer
    seconds: float


@contextmanager
def trained(
    questions: Sequence[Question],
    *,
    seed: int,
    steps: int,
    learning_rate: float,
    max_new_tokens: int,
    prompts_per_step: int = 8,
    completions: int = 4,
    powerflow: dict[str, Any] | None = None,
    grpo: dict[str, Any] | None = None,
    rewards: Sequence[Callable] = (),
) -> Iterator[Trained]:
    """Train a new adapter on the prompts of `questions`; it is taken off again on leaving.

    Either `powerflow` (options of PowerFlowConfig; `rewards` are its psi) or `grpo` (of TRL's
    GRPOConfig; `rewards` are its rewards). Answers are looked up by `Rollouts` to draw curves, and
    by a reward that says so.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer

    model, tokenizer = base_model()
    rollouts = Rollouts({q.prompt: q.answers for q in questions})
    order = random.Random(seed).sample(questions, len(questions))
    order = order * math.ceil(steps * prompts_per_step / len(order))
    with tempfile.TemporaryDirectory() as folder:
        options = dict(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=prompts_per_step * completions,
            num_generations=completions,
            max_completion_length=max_new_tokens,
            shuffle_dataset=False,
            pad_to_multiple_of=None,
            activation_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        common = dict(
            train_dataset=Dataset.from_list([{"prompt": q.prompt} for q in order]),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"
            ),
        )
        functions = [rollouts, *rewards]
        if powerflow is not None:
            options |= {"stop_on_collapse": False, "sample_completions": 0, **powerflow}
            args = PowerFlowConfig(**options)
            trainer = PowerFlowTrainer(model, args, psi_funcs=functions, **common)
        else:
            args = GRPOConfig(**options, **(grpo or {}))
            trainer = GRPOTrainer(model, functions, args, **common)
        _quiet(trainer)
        rollouts.began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - rollouts.began
        adapted = trainer.accelerator.unwrap_model(trainer.model)
    try:
        logs = [line for line in trainer.state.log_history if "loss" in line]
        yield Trained(adapted, rollouts.steps, logs, round(seconds, 2))
    finally:
        adapted.unload()


def _quiet(trainer) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def measure(
    model, questions: Sequence[Question], *, samples: int, max_new_tokens: int, seed: int
) -> dict[str, float]:
    """Held-out figures: accuracy of a sample, of the greedy answer, pass@k and majority vote.

    `diversity` is the number of different right completions among a prompt's samples, over the
    prompts that got one.
    """
    _, tokenizer = base_model()
    prompts = [q.prompt for q in questions]
    sampling = Sampling(samples, max_new_tokens, batch_size=128, seed=seed)
    texts, length, _ = complete(model, tokenizer, prompts, sampling, likelihood=False)
    greedy, _, _ = complete(model, tokenizer, prompts, sampling, greedy=True, likelihood=False)
    groups = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    right = [
        [is_correct(text, q.answers) for text in group]
        for q, group in zip(questions, groups, strict=True)
    ]
    voted = [
        is_correct(majority([answer_of(text) for text in group]), q.answers)
        for q, group in zip(questions, groups, strict=True)
    ]
    distinct = [
        len({tuple(words(text)) for text, ok in zip(group, oks, strict=True) if ok})
        for group, oks in zip(groups, right, strict=True)
        if any(oks)
    ]
    count = len(questions)
    return {
        "sampled": sum(map(sum, right)) / (count * samples),
        "greedy": sum(is_correct(t, q.answers) for t, q in zip(greedy, questions, strict=True))
        / count,
        "pass_at_k": sum(map(any, right)) / count,
        "majority": sum(voted) / count,
        "diversity": sum(distinct) / max(len(distinct), 1),
        "length": length,
    }


def answer_of(text: str) -> str:
    """What a completion answers, without its wording: its last number, else its last word."""
    found = words(text)
    numbers = [word for word in found if word.isdigit()]
    return (numbers or found or [""])[-1]


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer, the first of equals."""
    return Counter(answers).most_common(1)[0][0]
