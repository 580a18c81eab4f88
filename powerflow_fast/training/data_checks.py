"""Data that a trainer refuses before training: prompts of another kind, too long, or too few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from powerflow_fast.data.prompts import prompt_ids
from powerflow_fast.models.context import Context
from powerflow_fast.training.config import PowerFlowConfig

LONG = "; drop it, or lower max_completion_length"


def check_datasets(train_dataset, eval_dataset, model, tokenizer, args: PowerFlowConfig) -> Context:
    """Check every prompt that can be read before training; returns the context of `model`.

    Raises:
        ValueError: for a prompt of another kind or too long, and for too few for one rollout.
    """
    datasets = {"train_dataset": train_dataset}
    if eval_dataset is not None:
        datasets |= _named("eval_dataset", eval_dataset)
    for name, dataset in datasets.items():
        _check_prompts(name, dataset)
    check_enough(train_dataset, args)
    return check_lengths(datasets, model, tokenizer, args)


def check_enough(dataset, args: PowerFlowConfig) -> None:
    """ValueError where `dataset` has fewer prompts than one rollout takes."""
    needed = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) < needed:
        raise ValueError(
            f"train_dataset: expected at least {needed} prompts, as many as one rollout takes "
            f"(generation_batch_size {args.generation_batch_size} / num_generations "
            f"{args.num_generations}), got {len(dataset)}; lower per_device_train_batch_size or "
            "gradient_accumulation_steps, or repeat the prompts"
        )


def _named(name: str, dataset) -> Iterator[tuple[str, Any]]:
    """A data set, or each of a dict, with its name in errors."""
    if isinstance(dataset, dict):
        yield from ((f"{name}[{key!r}]", part) for key, part in dataset.items())
    else:
        yield name, dataset


def _check_prompts(name: str, dataset) -> None:
    if isinstance(dataset, (list, tuple)):
        raise ValueError(
            f"{name}: expected a datasets.Dataset, got a {type(dataset).__name__}; "
            "Dataset.from_list(rows) makes one"
        )
    columns = getattr(dataset, "column_names", None)
    if dataset is None or (columns is not None and "prompt" not in columns):
        raise ValueError(f"{name}: expected a column 'prompt', got columns {columns}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name}: it is empty")
    if isinstance(dataset, Dataset):  # a stream is checked as it comes
        for start, prompts in _batches(dataset):
            for i, prompt in enumerate(prompts, start=start):
                check_prompt(f"{name}: prompt {i}", prompt)


def check_prompt(name: str, prompt: Any) -> None:
    """ValueError, which begins with `name`, unless `prompt` is text or a list of messages."""
    messages = isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)
    if not prompt or not (isinstance(prompt, str) or messages):
        raise ValueError(f"{name}: expected text or messages, got {prompt!r}")


def _batches(dataset: Dataset, size: int = 1000) -> Iterator[tuple[int, list]]:
    """Prompts, `size` at a time, each time with the place of the first."""
    for start in range(0, len(dataset), size):
        yield start, dataset[start : start + size]["prompt"]


def check_lengths(datasets: dict[str, Any], model, tokenizer, args: PowerFlowConfig) -> Context:
    """Check that every prompt fits with its completion; returns the context of `model`.

    Args:
        datasets: by their names in errors.
        model: a model, or a path or name; then only its configuration is read, and its tokenizer
            where none is given.

    Raises:
        ValueError: for a prompt that does not fit.
    """
    source = {"trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(model, **source) if isinstance(model, str) else model.config
    context = Context(config, args.vllm_max_model_length)
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset) or context.limit is None:
            continue
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(config._name_or_path, **source)
        for start, prompts in _batches(dataset):
            for i, row in enumerate(prompt_ids(tokenizer, prompts), start=start):
                place = f"{name}: prompt {i}"
                context.check(place, len(row), args.max_completion_length, LONG)
    return context
