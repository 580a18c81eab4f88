"""The command `powerflow-fast`: train, demo, eval, info.

Bad input ends with one line on stderr and exit code 2. Nothing heavy is imported before a command
needs it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn


class UsageError(Exception):
    """What the user can put right; its message is printed without a traceback."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@dataclass
class TrainArguments:
    """Options of `train` beside those of PowerFlowConfig."""

    model: str | None = field(
        default=None, metadata={"help": "Model folder or name; 'smollm2' is the packaged one."}
    )
    data: str | None = field(default=None, metadata={"help": "Prompt file, .txt or .jsonl."})
    chat: bool = field(
        default=False, metadata={"help": "Give text prompts to the chat template as user messages."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains all parameters."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale, divided by the rank."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules for LoRA, separated by commas."}
    )
    boxed_penalty: float = field(
        default=0.0, metadata={"help": r"psi of completions without \boxed{}, e.g. -0.5; 0 is off."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Write into an output folder that holds another run."}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["train"]:  # its options come from dataclasses that take seconds to import
            return _train(argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except UsageError as error:
        print(f"powerflow-fast: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="powerflow-fast",
        description="Train a language model to sample from a power of itself, without labels.",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    commands.add_parser("train", help="train on a prompt file (flags, or --config FILE.yaml)")
    _add_demo(commands)
    _add_eval(commands)
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
    command.add_argument("--model", default="smollm2", help="folder or name (smollm2: packaged)")
    command.add_argument("--adapter", help="PEFT adapter folder")
    command.add_argument("--data", help="questions .jsonl (the demo's held-out questions)")
    command.add_argument("--samples", type=int, default=4, help="completions per prompt at T=1")
    command.add_argument("--max-new-tokens", type=int, default=16)
    command.add_argument("--batch-size", type=int, default=96)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--raw", action="store_true", help="prompts as they are, no chat format")
    command.add_argument("--json", action="store_true", help="print the scores as JSON")
    command.set_defaults(run=_eval)


def _train(argv: list[str]) -> int:
    trainer = _user_input(_prepare_training, argv)
    from powerflow_fast.checkpoint import CheckpointError

    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except CheckpointError as error:
        print(f"powerflow-fast: stopped: {error}", file=sys.stderr)
        return 1
    trainer.save_model(trainer.args.output_dir)
    print(f"Saved to {trainer.args.output_dir}")
    return 0


def _prepare_training(argv: list[str]):
    """The trainer that flags and YAML file describe; every check of input happens here."""
    # transformers' notes about TRL's own use of it would stand before the one line of an error.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    argv = [part for word in argv for part in _split_config(word)]
    _check_config_file(argv)
    from datasets import Dataset
    from peft import LoraConfig
    from trl import TrlParser

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer
    from powerflow_fast.prompts import read_prompts
    from powerflow_fast.rewards import missing_boxed

    class Parser(TrlParser):
        error = _Parser.error

    types: Any = (TrainArguments, PowerFlowConfig)
    parser = Parser(types, prog="powerflow-fast train")
    options, config = parser.parse_args_and_config(argv)
    if not options.model or not options.data:
        raise UsageError("train needs --model and --data (or both in the --config file)")
    records = read_prompts(options.data, options.chat)
    _check_output(config.output_dir, options.overwrite or config.resume_from_checkpoint)
    if config.resume_from_checkpoint:
        _check_checkpoint(options.model, config)
    model, tokenizer = _load_model(options.model)
    lora = None
    if options.lora_rank > 0:
        targets = options.lora_targets.split(",")
        if config.learning_rate == PowerFlowConfig.learning_rate:
            note = f"learning_rate is {config.learning_rate:g}, meant for training all parameters"
            print(f"note: {note}; LoRA usually takes 1e-4 to 3e-4", file=sys.stderr)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
        )
    return PowerFlowTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in records]),
        processing_class=tokenizer,
        peft_config=lora,
        psi_funcs=missing_boxed(options.boxed_penalty) if options.boxed_penalty else None,
    )


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
    _check_output(settings.output_dir, args.overwrite)
    _user_input(_find_demo_parts)
    import torch

    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    run_demo(settings)
    return 0


def _find_demo_parts() -> None:
    import importlib

    from powerflow_fast.smollm2 import find_smollm2

    find_smollm2()
    for name in ("gguf", "sentencepiece", "trl", "peft", "datasets"):
        importlib.import_module(name)


def _eval(args: argparse.Namespace) -> int:
    from powerflow_fast.prompts import QUESTIONS, read_questions

    for name in ("samples", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1")
    split = None if args.data else "heldout"
    questions = _user_input(read_questions, args.data or QUESTIONS, split)
    model, tokenizer = _user_input(_load_with_adapter, args.model, args.adapter)
    from powerflow_fast.evaluation import Sampling, evaluate

    prompts = [_format(tokenizer, args, question.prompt) for question in questions]
    sampling = Sampling(args.samples, args.max_new_tokens, args.batch_size, args.seed)
    scores = evaluate(model, tokenizer, questions, sampling, prompts).as_dict()
    if args.json:
        import json

        print(json.dumps(scores))
    else:
        for name, value in scores.items():
            print(f"{name:<18} {'-' if value is None else format(value, '.4g')}")
    return 0


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
    loaded, tokenizer = _load_model(model)
    if adapter:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded, tokenizer


def _load_model(name: str):
    """(model, tokenizer) of a folder, a Hub name, or 'smollm2'; float32 unless a GPU is there."""
    if name == "smollm2":
        from powerflow_fast.smollm2 import load_smollm2

        return load_smollm2()
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or folder.exists()):
        raise UsageError(f"--model {name}: no such folder")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = "auto" if torch.cuda.is_available() else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), tokenizer


def _check_checkpoint(model: str, config) -> None:
    """The checkpoint to go on from exists and fits the model, as far as its configuration says."""
    from powerflow_fast.checkpoint import check_made_for, config_facts, last_checkpoint

    name = config.resume_from_checkpoint
    checkpoint = last_checkpoint(config.output_dir) if name == "last" else name
    if checkpoint and not Path(checkpoint).is_dir():
        raise UsageError(f"--resume_from_checkpoint {checkpoint}: no such folder (or 'last')")
    if checkpoint and model != "smollm2":
        from transformers import AutoConfig

        check_made_for(checkpoint, config_facts(AutoConfig.from_pretrained(model)))


def _check_output(folder: str, overwrite: bool) -> None:
    path = Path(folder)
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        if existing.is_dir():
            with tempfile.TemporaryFile(dir=existing):
                pass
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from error
    if path.exists() and not path.is_dir():
        raise UsageError(f"{folder}: exists and is not a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{folder}: holds another run; name another folder, or pass --overwrite")


def _split_config(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _check_config_file(argv: list[str]) -> None:
    """TRL's parser opens and reads the YAML file; say first, in one line, why it could not."""
    if "--config" not in argv:
        return
    rest = argv[argv.index("--config") + 1 :]
    if not rest or not Path(rest[0]).is_file():
        raise UsageError(f"--config {rest[0] if rest else ''}: no such file")
    import yaml

    try:
        yaml.safe_load(Path(rest[0]).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{rest[0]}: {where}not YAML") from error


def _user_input(step: Callable, *arguments: Any):
    """Run a step that only reads what the user gave: its errors are the user's to put right."""
    try:
        return step(*arguments)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error.__cause__ or error).__name__


if __name__ == "__main__":
    sys.exit(main())
