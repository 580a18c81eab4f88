"""The commands `powerflow-fast eval` and `forecast`, which sample a model and measure it."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from powerflow_fast.cli.common import (
    SMOLLM2,
    UsageError,
    base_of,
    chat_of,
    load_model,
    load_tokenizer,
    run_of,
    say,
    user_input,
)

if TYPE_CHECKING:
    from powerflow_fast.data.prompts import Question
    from powerflow_fast.evaluation.scores import Sampling


def add_eval(commands: argparse._SubParsersAction) -> None:
    """The options of `eval`."""
    command = commands.add_parser("eval", help="accuracy, diversity and likelihood on questions")
    _add_sampling(command, samples=4)
    command.add_argument("--adapter", help="folder of a run with LoRA: base and adapter, compared")
    command.set_defaults(run=_eval)


def add_forecast(commands: argparse._SubParsersAction) -> None:
    """The options of `forecast`."""
    command = commands.add_parser("forecast", help="where training would go, from the base alone")
    _add_sampling(command, samples=32)
    command.add_argument("--alphas", default="1,2,4", help="powers to look at (1,2,4)")
    command.add_argument("--show", type=int, default=3, help="prompts to show answers to (3)")
    command.set_defaults(run=_forecast)


def _add_sampling(command: argparse.ArgumentParser, samples: int) -> None:
    command.add_argument("--model", help="folder or name (the run's; else smollm2, the packaged)")
    command.add_argument("--data", help="questions: .jsonl, .csv, ... or a data set of the Hub")
    command.add_argument("--data-split", help="split of the data set, or rows with this split")
    command.add_argument("--prompt-column", help="(prompt, question, messages or text)")
    command.add_argument("--answer-column", help="(answers or answer)")
    command.add_argument("--limit", type=int, help="so many questions, evenly spread (all)")
    command.add_argument("--samples", type=int, default=samples, help=f"per prompt ({samples})")
    command.add_argument("--max-new-tokens", type=int, help="of a completion (the run's; else 256)")
    command.add_argument("--temperature", type=float, help="of sampling (the run's; else 1)")
    command.add_argument("--batch-size", type=int, default=96, help="completions at once (96)")
    command.add_argument("--seed", type=int, default=0)
    form = command.add_mutually_exclusive_group()
    form.add_argument("--raw", action="store_true", help="text prompts as they are")
    form.add_argument(
        "--chat", action="store_true", help="in the chat format (the run's; else auto)"
    )
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


@dataclass
class _Task:
    """What is sampled, and how: by flags, else by the record of the run, else by defaults."""

    model: Any
    tokenizer: Any
    questions: list[Question]
    sampling: Sampling
    title: str  # one line about all of this


def _eval(args: argparse.Namespace) -> int:
    task = _task(args, args.adapter)
    from powerflow_fast.evaluation import comparison
    from powerflow_fast.evaluation.scores import evaluate, without_adapter

    if not args.json:
        say(task.title)

    def measure(title: str):
        return evaluate(task.model, task.tokenizer, task.questions, task.sampling, progress=title)

    temperature = task.sampling.temperature
    if args.adapter is None:
        scores = measure("measuring").scores
        figures = scores.as_dict()
        compared = comparison.summary(len(task.questions), scores, None, temperature)
    else:
        with without_adapter(task.model):
            before = measure("measuring the base")
        after = measure("measuring with the adapter")
        compared = comparison.compare(task.questions, before, after, temperature)
        figures = {name: compared[name] for name in ("before", "after")}
        figures["change"] = after.scores.changes(before.scores)
    print(json.dumps(figures) if args.json else comparison.as_text(compared))
    return 0


def _forecast(args: argparse.Namespace) -> int:
    try:
        alphas = [float(alpha) for alpha in args.alphas.split(",")]
    except ValueError:
        raise UsageError(f"--alphas: expected numbers, as 1,2,4, got {args.alphas!r}") from None
    if not all(0 < alpha < math.inf for alpha in alphas):
        raise UsageError(f"--alphas: expected finite numbers > 0, got {args.alphas}")
    task = _task(args)
    from powerflow_fast.data.prompts import text_of
    from powerflow_fast.evaluation.forecast import forecast, forecast_table
    from powerflow_fast.evaluation.scores import complete

    if not args.json:
        say(task.title)
    prompts = [question.prompt for question in task.questions]
    title = "sampling the base"
    drawn = complete(task.model, task.tokenizer, prompts, task.sampling, progress=title)
    found = forecast(drawn, task.questions, args.samples, alphas)
    if args.json:
        print(json.dumps([asdict(f) for f in found]))
        return 0
    print(forecast_table(found, args.samples))
    for i, prompt in enumerate(prompts[: max(args.show, 0)]):
        print(f"\n{text_of(prompt)}")
        for f in found:
            print(f"  likeliest at alpha {f.alpha:g}: {f.likeliest[i]!r}")
    return 0


def _task(args: argparse.Namespace, adapter: str | None = None) -> _Task:
    for name in ("samples", "batch_size", "max_new_tokens", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise UsageError(f"--temperature: expected a finite number > 0, got {args.temperature}")
    return user_input(_read_task, args, adapter)


def _read_task(args: argparse.Namespace, adapter: str | None) -> _Task:
    from powerflow_fast.data.prompts import QUESTIONS, evenly_spaced, in_chat_all, read_questions

    run = run_of(adapter or args.model)
    name = args.model or base_of(adapter, run)
    own = args.data is None
    if own and name != SMOLLM2:
        raise UsageError(f"--data: expected questions for {name}; the packaged are for smollm2")
    data, split = (QUESTIONS, "heldout") if own else (args.data, args.data_split)
    questions = read_questions(data, split, args.prompt_column, args.answer_column)
    if args.limit is not None:
        questions = evenly_spaced(questions, args.limit)
    tokenizer = load_tokenizer(name)
    chat = chat_of(args)
    if chat is None and run is not None:
        chat = run.chat
    questions = in_chat_all(questions, tokenizer, chat)
    model = _load(name, tokenizer, adapter)
    from powerflow_fast.evaluation.scores import Sampling

    tokens = args.max_new_tokens or (run.max_completion_length if run else 16 if own else 256)
    temperature = args.temperature or (run.temperature if run else 1.0)
    sampling = Sampling(args.samples, tokens, args.batch_size, args.seed, temperature)
    form = "plain text" if isinstance(questions[0].prompt, str) else "the chat format"
    source = "the demo's held-out questions" if own else args.data
    beside = f" with {adapter}" if adapter else ""
    title = (
        f"{name}{beside} on {len(questions)} of {source}, in {form}: "
        f"{args.samples} samples each at T={temperature:g}, at most {tokens} tokens"
    )
    return _Task(model, tokenizer, questions, sampling, title)


def _load(name: str, tokenizer, adapter: str | None):
    model = load_model(name, tokenizer)
    import torch

    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model
