"""The command `powerflow-fast plan`: memory of a run, before anything is rented."""

from __future__ import annotations

import argparse

from powerflow_fast.cli.common import fields_given, user_input


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Options that are not given are left out: their defaults are those of `Run`."""
    command = commands.add_parser(
        "plan",
        help="memory of a run, and the micro-batch that fits",
        argument_default=argparse.SUPPRESS,
    )
    option = command.add_argument
    option("model", help="name (Llama-3-70B, Qwen/Qwen3-8B), folder, or config.json")
    option("--gpus", type=int)
    option("--memory-gb", type=float, help="of each GPU (80)")
    option("--weights", choices=("bf16", "fp32", "fp8", "nf4"), help="type of the base")
    option("--lora-rank", type=int, help="0 trains all parameters (16)")
    option("--tokens", type=int, help="of a sequence (8192)")
    option("--prompt-tokens", type=int, help="of these, a prompt that a group shares (0: unknown)")
    option("--group", type=int, help="completions of a prompt (8)")
    option("--completions", type=int, help="sampled at once per GPU (8)")
    option("--sharding", choices=("ddp", "fsdp"))
    option("--offload", action="store_true", help="FSDP shards in main memory")
    option("--offload-reference", action="store_true", help="with --lora-rank 0")
    every = "keep all activations"
    option("--no-checkpointing", dest="checkpointing", action="store_false", help=every)
    option("--micro-batch", type=int, default=None, help="show this one (the largest that fits)")
    option("--tflops", type=float, default=None, help="measured rate of a GPU, for a throughput")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from powerflow_fast.models.names import find_shape
    from powerflow_fast.planning.advice import trainer_options, ways_to_fit
    from powerflow_fast.planning.memory import Run, largest_micro_batch, report

    source, shape = user_input(find_shape, args.model)
    run = user_input(lambda: Run(shape, **fields_given(args, Run)))
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
