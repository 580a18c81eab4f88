"""What the experiments on SmolLM2-135M share: the model, one training run, measuring.

Every run starts from the same base: adapters are new, on every linear layer, and taken off again.
"""

from __future__ import annotations

import functools
import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from benchmarks.evidence.prefixes import Prefixes
from powerflow_fast.data.prompts import Question
from powerflow_fast.evaluation.forecast import power_weights
from powerflow_fast.evaluation.scores import distinct_word_ngrams, is_correct, words
from powerflow_fast.models.sampling import end_tokens

ADAPTER = dict(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


@functools.cache
def base_model():
    """(model, tokenizer), once per worker process."""
    from transformers.utils import logging

    from powerflow_fast.models.smollm2 import load_smollm2

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
            "distinct_bigrams": distinct_word_ngrams(completions),
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
    learning_rate: float | None,
    max_new_tokens: int,
    prompts_per_step: int = 8,
    completions: int = 4,
    shuffle: bool = True,
    lora: dict[str, Any] | None = None,
    powerflow: dict[str, Any] | None = None,
    grpo: dict[str, Any] | None = None,
    rewards: Sequence[Callable] = (),
    sampler: Callable | None = None,
) -> Iterator[Trained]:
    """Train a new adapter on the prompts of `questions`; it is taken off again on leaving.

    Either `powerflow` (options of PowerFlowConfig; `rewards` are its psi) or `grpo` (of TRL's
    GRPOConfig; `rewards` are its rewards); `lora` are options of the adapter beside `ADAPTER`'s.
    A `learning_rate` of None is the config's default. Answers are looked up by `Rollouts` to draw
    curves, and by a reward that says so. Without `shuffle` the questions come in the order given.
    `sampler` draws the rollouts instead of the trainer, as its `rollout_func`.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer

    model, tokenizer = base_model()
    rollouts = Rollouts({q.prompt: q.answers for q in questions})
    order = random.Random(seed).sample(questions, len(questions)) if shuffle else [*questions]
    order = order * math.ceil(steps * prompts_per_step / len(order))
    with tempfile.TemporaryDirectory() as folder:
        options = dict(
            output_dir=folder,
            seed=seed,
            max_steps=steps,
            lr_scheduler_type="constant",
            per_device_train_batch_size=prompts_per_step * completions,
            num_generations=completions,
            max_completion_length=max_new_tokens,
            shuffle_dataset=False,
            pad_to_multiple_of=None,
            gradient_checkpointing=False,
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
            peft_config=LoraConfig(**ADAPTER | (lora or {})),
            rollout_func=sampler,
        )
        if learning_rate is not None:
            options["learning_rate"] = learning_rate
        functions = [rollouts, *rewards]
        if powerflow is not None:
            options |= {"stop_on_collapse": False, "sample_completions": 0, **powerflow}
            args = PowerFlowConfig(**options)
            trainer = PowerFlowTrainer(model, args, psi_funcs=functions, **common)
        else:
            args = GRPOConfig(**options | (grpo or {}))
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
    drawn = sample(model, tokenizer, prompts, samples, max_new_tokens, seed)
    texts, greedy = drawn.texts, drawn.greedy
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
        "length": float(drawn.lengths.mean()),
    }


def power_accuracy(
    model,
    questions: Sequence[Question],
    alpha: float,
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> float:
    """Accuracy that training has if it reaches its target, from weighted samples of the model."""
    _, tokenizer = base_model()
    prompts = [q.prompt for q in questions]
    drawn = sample(model, tokenizer, prompts, samples, max_new_tokens, seed)
    answers = [q.answers for q in questions for _ in range(samples)]
    right = torch.tensor(list(map(is_correct, drawn.texts, answers))).view(-1, samples)
    shape = right.shape
    weights = power_weights(drawn.logps.view(shape), drawn.lengths.view(shape), alpha)
    return float((weights * right).sum(1).mean())


class Samples(NamedTuple):
    """Completions of `prompts`, each prompt's one after the other."""

    texts: list[str]  # at T=1
    logps: torch.Tensor  # of each, its tokens' sum
    lengths: torch.Tensor  # of each, its tokens, the end token included
    greedy: list[str]  # one a prompt


@torch.no_grad()
def sample(
    model, tokenizer, prompts: Sequence[str], samples: int, max_new_tokens: int, seed: int
) -> Samples:
    """`samples` completions a prompt at T=1, and the greedy one.

    A prompt is read once for all of its completions, the greedy one included, which is most of the
    work where completions are shorter than prompts. The caller's random state is left as it was.
    """
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    rows = samples + 1
    training = model.training
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = Prefixes(model, inputs["input_ids"], inputs["attention_mask"]).repeated(rows)
        tokens, logps = [], []
        while True:
            log_p = drawn.log_p()
            token = torch.multinomial(log_p.exp(), 1)
            token[::rows] = drawn.logits[::rows].argmax(-1, keepdim=True)
            tokens.append(token)
            logps.append(log_p.gather(1, token))
            if len(tokens) == max_new_tokens:
                break
            drawn.feed(token)
    model.train(training)
    ids = torch.cat(tokens, 1)
    ended = torch.isin(ids, torch.tensor(end_tokens(model, tokenizer)))
    kept = (ended.cumsum(1) - ended.long()) == 0  # the first end token is counted, as in training
    texts = tokenizer.batch_decode(
        [row[keep] for row, keep in zip(ids, kept, strict=True)], skip_special_tokens=True
    )
    sampled = torch.arange(len(ids)) % rows > 0
    return Samples(
        [text for text, is_sample in zip(texts, sampled, strict=True) if is_sample],
        torch.cat(logps, 1).where(kept, 0.0).sum(1)[sampled],
        kept[sampled].sum(1).float(),
        texts[::rows],
    )


NAME = re.compile(r"[A-Z][\w'-]*(?: [A-Z][\w'-]*)*")


def answer_of(completion: str) -> str:
    """What the completion of a statement answers, without what follows; "" where it says nothing.

    Its first number, else its first name (capitalised words in a row), else its first word.
    """
    for pattern in (r"\d+", NAME, r"\w+"):
        if found := re.search(pattern, completion):
            return " ".join(words(found[0]))
    return ""


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer that says something, the first of equals; "" where none does."""
    counts = Counter(filter(None, answers)).most_common(1)
    return counts[0][0] if counts else ""
