"""Measuring a model on questions: accuracy, diversity, length, and likelihood under the base.

Accepted answers are compared with completions here and nowhere else. Every figure has a standard
error over prompts, by leaving out one prompt after another (the jackknife; Efron 1982): for a mean
over prompts it is the usual one, and it also holds for ratios of sums.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.data.prompts import Prompt, Question, prompt_ids
from powerflow_fast.head import linear_logprobs
from powerflow_fast.models.lm_head import base_model, last_hidden_state, modes_kept, read_head
from powerflow_fast.models.sampling import Sample, end_tokens, sample


class Measure(NamedTuple):
    """How one of `Scores` is shown."""

    title: str  # with {samples} and {temperature} to be filled in
    percent: bool = False


MEASURES = {
    "accuracy_sampled": Measure("accuracy, sampled at T={temperature:g}", percent=True),
    "accuracy_greedy": Measure("accuracy, greedy", percent=True),
    "distinct_answers": Measure("distinct answers per prompt, of {samples}"),
    "distinct_openings": Measure("distinct openings (two words), of {samples}"),
    "distinct_bigrams": Measure("distinct word pairs", percent=True),
    "mean_length": Measure("mean length, tokens"),
    "base_logp": Measure("log-prob under the base, nats/token"),
}


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: from the full distribution, `samples` for each prompt."""

    samples: int = 4
    max_new_tokens: int = 16  # of a completion
    batch_size: int = 96  # completions
    seed: int = 0
    temperature: float = 1.0


class Figure(NamedTuple):
    """A figure over prompts, and the same figure with each prompt left out."""

    value: float
    without: Tensor  # [prompts] float64

    @property
    def error(self) -> float:
        """Standard error over prompts; NaN for a single one."""
        return _jackknife(self.without)

    def difference(self, before: Figure) -> tuple[float, float]:
        """Change since `before`, of the same prompts, and its standard error."""
        return self.value - before.value, _jackknife(self.without - before.without)


def _jackknife(without: Tensor) -> float:
    """The standard error of a figure, from its values with each prompt left out; NaN for one."""
    n = len(without)
    return float((n - 1) ** 0.5 * without.std(correction=0)) if n > 1 else math.nan


def _ratio(numerators: Tensor, denominators: Tensor) -> Figure:
    """Sum of [prompts] numerators over the sum of denominators, [prompts] or one for all."""
    above, below = numerators.double(), denominators.double().expand(len(numerators))
    without = (above.sum() - above) / (below.sum() - below).clamp(min=1e-12)
    return Figure(float(above.sum() / below.sum().clamp(min=1e-12)), without)


@dataclass(frozen=True)
class Scores:
    """The MEASURES of a model, over prompts; accuracies are None where a question has no answer."""

    accuracy_sampled: Figure | None
    accuracy_greedy: Figure | None
    distinct_answers: Figure  # different completions of a prompt, among `samples`
    distinct_openings: Figure  # different first two words of a prompt's completions
    distinct_bigrams: Figure  # different word pairs / all, over all sampled completions
    mean_length: Figure  # tokens, end-of-text included
    base_logp: Figure  # mean log-prob of sampled tokens under the base [nats/token]
    samples: int

    def figures(self) -> dict[str, Figure]:
        """What was measured, by name."""
        values = {name: getattr(self, name) for name in MEASURES}
        return {name: figure for name, figure in values.items() if figure is not None}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: value of each measure (None: not measured), `samples`, `standard_errors`."""
        measured = {name: (figure.value, figure.error) for name, figure in self.figures().items()}
        return dict.fromkeys(MEASURES) | {"samples": self.samples} | _plain(measured)

    def changes(self, before: Scores) -> dict[str, Any]:
        """For JSON: difference of each measure to `before` on the same prompts, and errors."""
        earlier = before.figures()
        return _plain({name: f.difference(earlier[name]) for name, f in self.figures().items()})


def _plain(measured: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Values by name, and `standard_errors` by name without those that are NaN."""
    errors = {name: error for name, (_, error) in measured.items() if not math.isnan(error)}
    return {name: value for name, (value, _) in measured.items()} | {"standard_errors": errors}


def words(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation: two answers are the same if these are."""
    return re.findall(r"\w+", text.lower())


def is_correct(completion: str, answers: Sequence[str]) -> bool:
    """Whether one of `answers` occurs in `completion` as whole words."""
    text = f" {' '.join(words(completion))} "
    return any(f" {' '.join(words(answer))} " in text for answer in answers)


def distinct_word_ngrams(completions: Sequence[str], n: int = 2) -> float:
    """Number of different word n-grams over the number of all; 0 without any."""
    return _distinct_share([completions], n).value


def _distinct_share(groups: Sequence[Sequence[str]], n: int = 2) -> Figure:
    """Different word n-grams / all, over the completions of all prompts; a group is a prompt's."""
    grams = [[gram for text in group for gram in ngrams(words(text), n)] for group in groups]
    holders = Counter(gram for group in grams for gram in set(group))  # prompts that have it
    alone = torch.tensor([sum(holders[g] == 1 for g in set(group)) for group in grams])
    counts = torch.tensor([len(group) for group in grams])
    without = (len(holders) - alone) / (counts.sum() - counts).clamp(min=1)
    return Figure(len(holders) / max(int(counts.sum()), 1), without.double())


def ngrams(tokens: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    """Every n tokens that follow each other, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct_per_prompt(
    completions: Sequence[str], samples: int, first: int | None = None
) -> Figure:
    """Mean number of different completions among the `samples` of a prompt.

    With `first`, completions that begin with the same `first` words count once.
    """
    groups = _groups(completions, samples)
    counts = [len({tuple(words(text)[:first]) for text in group}) for group in groups]
    return _ratio(torch.tensor(counts), torch.tensor(1))


def _groups(items: Sequence[str], size: int) -> list[Sequence[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class Completions(NamedTuple):
    """`Sampling.samples` consecutive completions of every prompt, or one greedy one of each."""

    texts: list[str]
    lengths: Tensor  # [completions] float32, tokens of each, end-of-text included
    base_logps: Tensor  # [completions] float32, log-prob of each under the base, summed [nats]


@torch.no_grad()
def complete(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    greedy: bool = False,
    likelihood: bool = True,
    base=None,
    progress: str | None = None,
) -> Completions:
    """Completions of prompts, as training tokenises them. The caller's random state is kept.

    Args:
        model: samples the completions.
        tokenizer: the model's own.
        prompts: in the format that the model is asked in (`in_chat`).
        sampling: how many, how long, and from which seed.
        greedy: one completion of each prompt, by the likeliest token at every step.
        likelihood: False saves the base's forward pass; log-probs are 0 then.
        base: gives the log-probs; default: `model`, without its adapter if it has one.
        progress: title of a progress bar; None: no bar.
    """
    from tqdm import tqdm

    ids_of = prompt_ids(tokenizer, prompts)
    repeated = [row for row in ids_of for _ in range(1 if greedy else sampling.samples)]
    order = sorted(range(len(repeated)), key=lambda i: len(repeated[i]))  # little padding
    texts = [""] * len(repeated)
    lengths, base_logps = torch.zeros(2, len(repeated))
    began = time.perf_counter()
    hidden = progress is None or None  # None: shown on a terminal only
    bar = tqdm(total=len(repeated), desc=progress, disable=hidden, leave=False)
    with bar, modes_kept(model), torch.random.fork_rng():
        model.eval()
        torch.manual_seed(sampling.seed)
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            drawn, width = _draw(model, tokenizer, [repeated[i] for i in batch], sampling, greedy)
            ids, mask = drawn.completion(width)
            for i, text in zip(batch, _decode(tokenizer, ids, mask), strict=True):
                texts[i] = text
            if likelihood:
                logps = _base_logps(base or model, drawn, sampling.temperature)
                of_each = torch.zeros_like(mask, dtype=logps.dtype).masked_scatter(mask, logps)
                base_logps[batch] = of_each.sum(1).cpu()
            lengths[batch] = mask.sum(1).float().cpu()
            bar.update(len(batch))
            left = (time.perf_counter() - began) * (len(order) / len(batch) - 1)
            if start == 0 and bar.disable and not hidden and left > 10:  # in a log file
                print(f"{progress}: about {left:.0f} s more", file=sys.stderr, flush=True)
    return Completions(texts, lengths, base_logps)


def _draw(
    model, tokenizer, prompts: list[list[int]], sampling: Sampling, greedy: bool
) -> tuple[Sample, int]:
    """One completion of each prompt's token ids, and the width of the padded prompts."""
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    drawn = sample(
        model,
        inputs["input_ids"],
        inputs["attention_mask"],
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        greedy=greedy,
        end_token_ids=end_tokens(model, tokenizer),
    )
    return drawn, inputs["input_ids"].shape[1]


class Evaluation(NamedTuple):
    """Scores, and the sampled completions behind them."""

    scores: Scores
    drawn: Completions


def evaluate(
    model,
    tokenizer,
    questions: Sequence[Question],
    sampling: Sampling,
    base=None,
    progress: str | None = None,
) -> Evaluation:
    """Measure `model` on `questions`, whose prompts are in the format that it is asked in.

    `base` gives the log-probs, by default `model` without its adapter; `progress` is the title of a
    progress bar.
    """
    prompts = [question.prompt for question in questions]
    drawn = complete(model, tokenizer, prompts, sampling, base=base, progress=progress)
    groups = _groups(drawn.texts, sampling.samples)
    accuracy_sampled = accuracy_greedy = None
    if all(question.answers for question in questions):
        accuracy_sampled = _accuracy(groups, questions)
        greedy = complete(model, tokenizer, prompts, sampling, True, False, progress=progress)
        accuracy_greedy = _accuracy([[text] for text in greedy.texts], questions)
    lengths, logps = (x.view(len(groups), -1).sum(1) for x in (drawn.lengths, drawn.base_logps))
    scores = Scores(
        accuracy_sampled=accuracy_sampled,
        accuracy_greedy=accuracy_greedy,
        distinct_answers=distinct_per_prompt(drawn.texts, sampling.samples),
        distinct_openings=distinct_per_prompt(drawn.texts, sampling.samples, first=2),
        distinct_bigrams=_distinct_share(groups),
        mean_length=_ratio(lengths, torch.tensor(sampling.samples)),
        base_logp=_ratio(logps, lengths),
        samples=sampling.samples,
    )
    return Evaluation(scores, drawn)


def _accuracy(groups: Sequence[Sequence[str]], questions: Sequence[Question]) -> Figure:
    """Share of right completions; `groups` has the completions of each question."""
    right = [
        sum(is_correct(text, question.answers) for text in group)
        for group, question in zip(groups, questions, strict=True)
    ]
    return _ratio(torch.tensor(right), torch.tensor(len(groups[0])))


def _decode(tokenizer, ids, mask) -> list[str]:
    completions = [row[counted].tolist() for row, counted in zip(ids, mask, strict=True)]
    return tokenizer.batch_decode(completions, skip_special_tokens=True)


def _base_logps(model, drawn: Sample, temperature: float) -> Tensor:
    """[N] log-probs of the counted tokens under the model without its adapter, if it has one."""
    with without_adapter(model):
        base = base_model(model)
        ids, mask, labels = (
            x.to(base.device) for x in (drawn.input_ids, drawn.attention_mask, drawn.labels)
        )
        hidden = last_hidden_state(base, ids, mask)
        head, counted = read_head(base), labels[:, 1:] != -100
        rows, targets = hidden[:, :-1][counted], ids[:, 1:][counted]
        options = {"bias": head.bias, "temperature": temperature, **head.transform}
        logps = linear_logprobs(rows, head.weight, targets, **options)
    assert isinstance(logps, Tensor)  # a pair only where entropy is asked for
    return logps.to(drawn.input_ids.device)


def without_adapter(model) -> AbstractContextManager:
    """A context in which `model`'s adapter is off; one that is off already stays off after it."""
    layers = (m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))
    if not hasattr(model, "peft_config") or next(layers, False):
        return nullcontext()
    return model.disable_adapter()
