"""Measuring a model on questions: accuracy, diversity, length, and likelihood under the base.

Accepted answers are compared with completions here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.head import linear_logprobs
from powerflow_fast.model_head import base_model, last_hidden_state, modes_kept, read_head
from powerflow_fast.sampling import Sample, end_tokens, sample

if TYPE_CHECKING:
    from powerflow_fast.prompts import Question


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `samples` per prompt at T=1 from the full distribution."""

    samples: int = 4
    max_new_tokens: int = 16
    batch_size: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """Averages over prompts; accuracies are None where no question has answers."""

    accuracy_sampled: float | None
    accuracy_greedy: float | None
    distinct_answers: float  # different completions per prompt, of `samples`
    distinct_openings: float  # different first two words, likewise
    distinct_bigrams: float  # share of word pairs that differ, over all sampled completions
    mean_length: float  # tokens, end-of-text included
    base_logp: float  # mean log-prob of sampled tokens under the base [nats/token]
    samples: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def words(text: str) -> list[str]:
    """Lower-case words and numbers, punctuation dropped: what counts as the same answer."""
    return re.findall(r"\w+", text.lower())


def is_correct(completion: str, answers: Sequence[str]) -> bool:
    """Whether one of `answers` occurs in `completion` as whole words."""
    text = f" {' '.join(words(completion))} "
    return any(f" {' '.join(words(answer))} " in text for answer in answers)


def distinct_ngrams(completions: Sequence[str], n: int = 2) -> float:
    """Number of different word n-grams over the number of all; 0 without any."""
    grams = [
        tuple(tokens[i : i + n])
        for tokens in map(words, completions)
        for i in range(len(tokens) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_per_prompt(
    completions: Sequence[str], samples: int, first: int | None = None
) -> float:
    """Mean number of different completions (or of their `first` words) among `samples` a prompt."""
    texts = [tuple(words(completion)[:first]) for completion in completions]
    groups = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    return sum(len(set(group)) for group in groups) / len(groups)


class Completions(NamedTuple):
    """`Sampling.samples` consecutive completions of every prompt, or the greedy one."""

    texts: list[str]
    lengths: Tensor  # [n] float32, tokens of each, its end token included
    base_logps: Tensor  # [n] float32, their log-probs under the base, summed [nats]


@torch.no_grad()
def complete(
    model,
    tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    greedy: bool = False,
    likelihood: bool = True,
) -> Completions:
    """Completions of prompt texts. The caller's random state is left as it was.

    Without `likelihood` the base's log-probs are 0 and their forward pass is saved.
    """
    repeated = [p for p in prompts for _ in range(1 if greedy else sampling.samples)]
    order = sorted(range(len(repeated)), key=lambda i: len(repeated[i]))  # little padding
    texts = [""] * len(repeated)
    lengths, base_logps = torch.zeros(2, len(repeated))
    with modes_kept(model), torch.random.fork_rng():
        model.eval()
        torch.manual_seed(sampling.seed)
        for batch in _batches(order, sampling.batch_size):
            inputs = tokenizer(
                [repeated[i] for i in batch],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            ).to(model.device)
            drawn = sample(
                model,
                inputs["input_ids"],
                inputs["attention_mask"],
                max_new_tokens=sampling.max_new_tokens,
                greedy=greedy,
                end_token_ids=end_tokens(model, tokenizer),
            )
            ids, mask = drawn.completion(inputs["input_ids"].shape[1])
            for i, text in zip(batch, _decode(tokenizer, ids, mask), strict=True):
                texts[i] = text
            if likelihood:
                logps = _base_logps(model, drawn)
                of_each = torch.zeros_like(mask, dtype=logps.dtype).masked_scatter(mask, logps)
                base_logps[batch] = of_each.sum(1).cpu()
            lengths[batch] = mask.sum(1).float().cpu()
    return Completions(texts, lengths, base_logps)


def evaluate(
    model, tokenizer, questions: Sequence[Question], sampling: Sampling, prompts: Sequence[str]
) -> Scores:
    """Scores of `model` on `questions`, whose texts in the model's own format are `prompts`."""
    drawn = complete(model, tokenizer, prompts, sampling)
    sampled = drawn.texts
    accuracy_sampled = accuracy_greedy = None
    if all(question.answers for question in questions):
        answers = [q.answers for q in questions for _ in range(sampling.samples)]
        accuracy_sampled = _accuracy(sampled, answers)
        greedy = complete(model, tokenizer, prompts, sampling, True, likelihood=False)
        accuracy_greedy = _accuracy(greedy.texts, [q.answers for q in questions])
    return Scores(
        accuracy_sampled=accuracy_sampled,
        accuracy_greedy=accuracy_greedy,
        distinct_answers=distinct_per_prompt(sampled, sampling.samples),
        distinct_openings=distinct_per_prompt(sampled, sampling.samples, first=2),
        distinct_bigrams=distinct_ngrams(sampled),
        mean_length=float(drawn.lengths.mean()),
        base_logp=float(drawn.base_logps.sum() / drawn.lengths.sum().clamp(min=1)),
        samples=sampling.samples,
    )


def _accuracy(completions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    right = [is_correct(c, a) for c, a in zip(completions, answers, strict=True)]
    return sum(right) / len(right)


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _decode(tokenizer, ids, mask) -> list[str]:
    kept = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def _base_logps(model, drawn: Sample) -> Tensor:
    """[N] log-probs of the counted tokens under the model without its adapter, if it has one."""
    adapted = hasattr(model, "peft_config")
    with model.disable_adapter() if adapted else nullcontext():
        base = base_model(model)
        hidden = last_hidden_state(base, drawn.input_ids, drawn.attention_mask)
        head, counted = read_head(base), drawn.labels[:, 1:] != -100
        rows, targets = hidden[:, :-1][counted], drawn.input_ids[:, 1:][counted]
        logps = linear_logprobs(rows, head.weight, targets, bias=head.bias, **head.transform)
    assert isinstance(logps, Tensor)  # a pair only where entropy is asked for
    return logps
