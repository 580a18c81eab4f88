"""The commands `powerflow-fast eval` and `forecast`, which sample a model and measure."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from powerflow_fast.cli.common import UsageError, load_model, user_input

if TYPE_CHECKING:
    from powerflow_fast.evaluation import Sampling
    from powerflow_fast.prompts import Question


def add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("eval", help="accuracy, diversity and likelihood on questions")
    _add_sampling(command, samples=4)
    command.add_argument("--adapter", help="PEFT adapter folder")
    command.set_defaults(run=_eval)


def add_forecast(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("forecast", help="where training would go, from the base alone")
    _add_sampling(command, samples=32)
    command.add_argument("--alphas", default="1,2,4", help="powers to look at (1,2,4)")
    command.add_argument("--show", type=int, default=3, help="prompts to show answers to (3)")
    command.set_defaults(run=_forecast)


def _add_sampling(command: argparse.ArgumentParser, samples: int) -> None:
    command.add_argument("--model", default="smollm2", help="folder or name (smollm2: packaged)")
    command.add_argument("--data", help="questions .jsonl (the demo's held-out questions)")
    command.add_argument("--samples", type=int, default=samples, help="per prompt, at T=1")
    command.add_argument("--max-new-tokens", type=int, default=16)
    command.add_argument("--batch-size", type=int, default=96)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--raw", action="store_true", help="prompts as they are, no chat format")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _eval(args: argparse.Namespace) -> int:
    from powerflow_fast.evaluation import evaluate

    scores = evaluate(*_to_sample(args, args.adapter)).as_dict()
    if args.json:
        import json

        print(json.dumps(scores))
    else:
        for name, value in scores.items():
            print(f"{name:<18} {'-' if value is None else format(value, '.4g')}")
    return 0


def _forecast(args: argparse.Namespace) -> int:
    try:
        alphas = [float(alpha) for alpha in args.alphas.split(",")]
    except ValueError:
        raise UsageError(f"--alphas: expected numbers, as 1,2,4, got {args.alphas!r}") from None
    if not all(0 < alpha < math.inf for alpha in alphas):
        raise UsageError(f"--alphas: expected finite numbers > 0, got {args.alphas}")
    from powerflow_fast.forecast import forecast, report

    sampled = _to_sample(args)
    found = forecast(*sampled, alphas)
    if args.json:
        import json

        print(json.dumps([f.as_dict() for f in found]))
        return 0
    print(report(found, args.samples))
    for i, question in enumerate(sampled.questions[: max(args.show, 0)]):
        print(f"\n{question.prompt}")
        for f in found:
            print(f"  likeliest at alpha {f.alpha:g}: {f.likeliest[i]!r}")
    return 0


class _Sampled(NamedTuple):
    """The arguments that `evaluate` and `forecast` begin with."""

    model: Any
    tokenizer: Any
    questions: list[Question]
    sampling: Sampling
    prompts: list[str]


def _to_sample(args: argparse.Namespace, adapter: str | None = None) -> _Sampled:
    from powerflow_fast.prompts import QUESTIONS, read_questions

    for name in ("samples", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1")
    split = None if args.data else "heldout"
    questions = user_input(read_questions, args.data or QUESTIONS, split)
    model, tokenizer = user_input(_load_with_adapter, args.model, adapter)
    from powerflow_fast.evaluation import Sampling

    prompts = [_format(tokenizer, args, question.prompt) for question in questions]
    sampling = Sampling(args.samples, args.max_new_tokens, args.batch_size, args.seed)
    return _Sampled(model, tokenizer, questions, sampling, prompts)


def _format(tokenizer, args: argparse.Namespace, prompt: str) -> str:
    if args.raw or not getattr(tokenizer, "chat_template", None):
        return prompt
    if args.model == "smollm2":
        from powerflow_fast.demo import chat_prompt

        return chat_prompt(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _load_with_adapter(model: str, adapter: str | None):
    if adapter and not (Path(adapter) / "adapter_config.json").is_file():
        raise UsageError(f"--adapter {adapter}: no adapter_config.json there")
    loaded, tokenizer = load_model(model)
    import torch

    if torch.accelerator.is_available():
        loaded.to(torch.accelerator.current_accelerator())
    if adapter:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded, tokenizer
