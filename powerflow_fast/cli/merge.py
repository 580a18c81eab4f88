"""The command `powerflow-fast merge`: a model that needs neither PEFT nor this library."""

from __future__ import annotations

import argparse
from pathlib import Path

from powerflow_fast.cli.common import (
    SMOLLM2,
    base_of,
    check_output,
    load_model,
    load_tokenizer,
    run_of,
    say,
    user_input,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_merge(commands: argparse._SubParsersAction) -> None:
    """The options of `merge`."""
    command = commands.add_parser("merge", help="write base and adapter as one plain model")
    command.add_argument("--adapter", required=True, help="folder of a run with LoRA")
    command.add_argument("--output", required=True, help="folder to write")
    command.add_argument("--model", help="folder or name of the base (the run's)")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="(auto: the base's own)")
    command.add_argument("--overwrite", action="store_true", help="write into a folder in use")
    command.set_defaults(run=_merge)


def _merge(args: argparse.Namespace) -> int:
    run = user_input(run_of, args.adapter)
    name = args.model or user_input(base_of, args.adapter, run)
    check_output(args.output, args.overwrite)
    user_input(_write, args, name)
    if run is not None:
        Path(args.output, "README.md").write_text(run.card(merged=True), encoding="utf-8")
    if run is not None and run.quantize != "none":
        say(
            f"note: the run held its base in 4 bits ({run.quantize}); merged was the base as it is "
            "published, whose answers differ a little"
        )
    say(
        f"Saved to {args.output}: weights, tokenizer, card. Next:",
        f"  powerflow-fast eval --model {args.output} --data questions.jsonl",
        f"  vllm serve {args.output}",
    )
    return 0


def _write(args: argparse.Namespace, name: str) -> None:
    """Write the merged model: added in float32, then rounded once to the type that is asked for."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig

    tokenizer = load_tokenizer(name)
    dtype = getattr(torch, args.dtype, None)
    if dtype is None and name != SMOLLM2:
        dtype = AutoConfig.from_pretrained(name).dtype
    model = load_model(name, tokenizer, {"dtype": torch.float32})
    merged = PeftModel.from_pretrained(model, args.adapter).merge_and_unload()
    merged.to(dtype or torch.float32).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
