"""The command `powerflow-fast demo`."""

from __future__ import annotations

import argparse
import importlib.util
import math

from powerflow_fast.cli.common import UsageError, check_output, usable_cores, user_input


def add_demo(commands: argparse._SubParsersAction) -> None:
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
    from transformers.utils import logging

    logging.set_verbosity_error()
    run_demo(settings)
    return 0


def _find_demo_parts() -> None:
    """What it needs is there, before seconds of imports and of loading."""
    from powerflow_fast.smollm2 import find_smollm2

    for name in ("transformers", "trl", "peft", "datasets", "gguf", "sentencepiece"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    find_smollm2()
