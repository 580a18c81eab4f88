"""The command `powerflow-fast`: train, demo, eval, forecast, plan, info.

Bad input ends with one line on stderr and exit code 2. Nothing heavy is imported before a command
needs it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from powerflow_fast.cli_common import (
    Parser,
    UsageError,
    check_output,
    load_model,
    one_line,
    usable_cores,
    user_input,
)

if TYPE_CHECKING:
    from powerflow_fast.evaluation import Sampling
    from powerflow_fast.prompts import Question


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # its options come from dataclasses that take seconds to import
            from powerflow_fast.cli_train import train

            return train(argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except UsageError as error:
        print(f"powerflow-fast: error: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="powerflow-fast",
        description="Train a language model to sample from a power of itself, without labels.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("train", help="train on a prompt file (flags, or --config FILE.yaml)")
    _add_demo(commands)
    _add_eval(commands)
    _add_forecast(commands)
    _add_plan(commands)
    info = commands.add_parser("info", help="versions, devices and the back end in use")
    info.set_defaults(run=_info)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser("demo", help="sharpen a real 135M model on two CPU cores")
    demo.add_argument("--alpha", type=float, help="power, > 0; below 1 uses open prompts (4.0)")
    demo.add_argument("--steps", type=int, help="optimizer steps")
    demo.add_argument("--seed", type=int, help="seed of sampling, LoRA and prompt order (0)")
    demo.add_argument("--learning-rate", type=float, help="peak learning rate")
    demo.add_argument("--held-out", type=int, help="held-out prompts to measure on (90)")
    demo.add_argument("--output-dir", help="folder for adapter, table, curves (runs/demo)")
    demo.add_argument("--threads", type=int, help="CPU threads (all cores)")
    demo.add_argument("--overwrite", action="store_true", help="write over another run's files")
    demo.set_defaults(run=_demo)


def _add_eval(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("eval", help="accuracy, diversity and likelihood on questions")
    _add_sampling(command, samples=4)
    command.add_argument("--adapter", help="PEFT adapter folder")
    command.set_defaults(run=_eval)


def _add_forecast(commands: argparse._SubParsersAction) -> None:
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


def _add_plan(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan", help="memory of a run, and the micro-batch that fits")
    command.add_argument("model", help="shape name (Llama-3-70B), or a folder or name of a model")
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("--memory-gb", type=float, default=80.0, help="of each GPU (80)")
    choices = ("bf16", "fp32", "fp8", "nf4")
    command.add_argument("--weights", choices=choices, default="bf16", help="type of the base")
    command.add_argument("--lora-rank", type=int, default=16, help="0 trains all parameters (16)")
    command.add_argument("--tokens", type=int, default=8192, help="of a sequence (8192)")
    command.add_argument("--completions", type=int, default=8, help="sampled at once per GPU (8)")
    command.add_argument("--sharding", choices=("ddp", "fsdp"), default="ddp")
    command.add_argument("--offload", action="store_true", help="FSDP shards in main memory")
    command.add_argument("--offload-reference", action="store_true", help="with --lora-rank 0")
    command.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    command.add_argument("--micro-batch", type=int, help="show this one (the largest that fits)")
    command.add_argument("--tflops", type=float, help="measured rate of a GPU, for a throughput")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from powerflow_fast.plan import Run, report

    names = ("gpus", "memory_gb", "weights", "lora_rank", "tokens", "completions", "sharding")
    options = {name: getattr(args, name) for name in (*names, "offload", "offload_reference")}
    options["checkpointing"] = not args.no_checkpointing
    run = user_input(lambda: Run(_shape(args.model), **options))
    print(user_input(report, run, args.micro_batch, args.tflops))
    return 0


def _shape(model: str):
    from powerflow_fast.model_shapes import MODEL_SHAPES, ModelShape, model_shape

    if model in MODEL_SHAPES:
        return model_shape(model)
    if not Path(model).is_dir() and "/" not in model:
        model_shape(model)  # raises, with the names there are
    from transformers import AutoConfig

    return ModelShape.from_config(AutoConfig.from_pretrained(model))


def _demo(args: argparse.Namespace) -> int:
    from powerflow_fast.demo import DemoSettings, run_demo

    names = ("alpha", "steps", "seed", "learning_rate", "held_out", "output_dir")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings = DemoSettings(**given)
    for name in ("alpha", "steps", "learning_rate", "held_out"):
        if not 0 < getattr(settings, name) < math.inf:
            raise UsageError(
                f"--{name.replace('_', '-')}: expected a number > 0, got {getattr(settings, name)}"
            )
    check_output(settings.output_dir, args.overwrite)
    user_input(_find_demo_parts)
    import torch

    torch.set_num_threads(args.threads or usable_cores())
    run_demo(settings)
    return 0


def _find_demo_parts() -> None:
    import importlib

    from powerflow_fast.smollm2 import find_smollm2

    find_smollm2()
    for name in ("gguf", "sentencepiece", "trl", "peft", "datasets"):
        importlib.import_module(name)


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


def _info(_: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from powerflow_fast import __version__
    from powerflow_fast.ops import choose_backend

    print(f"powerflow-fast {__version__}, Python {platform.python_version()}")
    for name in ("torch", "triton", "transformers", "trl", "peft", "accelerate", "vllm"):
        try:
            print(f"{name:<14} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<14} not installed")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        backend, reason = choose_backend("auto", device)
        print(f"{device!s:<14} {name}: back end {backend} ({reason})")
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
