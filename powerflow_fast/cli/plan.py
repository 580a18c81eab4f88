"""The command `powerflow-fast plan`: memory of a run, before anything is rented."""

from __future__ import annotations

import argparse

from powerflow_fast.cli.common import user_input


def add_plan(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("plan", help="memory of a run, and the micro-batch that fits")
    command.add_argument("model", help="name (Llama-3-70B, Qwen/Qwen3-8B), folder, or config.json")
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
    from powerflow_fast.models.names import find_shape
    from powerflow_fast.planning.advice import trainer_options, ways_to_fit
    from powerflow_fast.planning.memory import Run, largest_micro_batch, report

    names = ("gpus", "memory_gb", "weights", "lora_rank", "tokens", "completions", "sharding")
    options = {name: getattr(args, name) for name in (*names, "offload", "offload_reference")}
    options["checkpointing"] = not args.no_checkpointing
    source, shape = user_input(find_shape, args.model)
    run = user_input(lambda: Run(shape, **options))
    text = user_input(report, run, args.micro_batch, args.tflops)
    print(f"{source}: {shape.parameters() / 1e9:.2f}e9 parameters\n{text}\n")
    fits, wanted = largest_micro_batch(run), args.micro_batch
    if (wanted or 1) <= fits:
        print(trainer_options(run, wanted or fits))
        return 0
    ways = ways_to_fit(args.model, run, wanted)
    print("It does not fit." + (" These do:" if ways else " Nor does any one change of it."))
    print("\n".join(f"  {way}" for way in ways))
    return 1
