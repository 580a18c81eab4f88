"""The command `powerflow-fast plan`: memory of a run, before anything is rented."""

from __future__ import annotations

import argparse
from pathlib import Path

from powerflow_fast.cli.common import user_input


def add_plan(commands: argparse._SubParsersAction) -> None:
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
