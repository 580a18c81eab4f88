"""What to change where a run does not fit, and the trainer's options where it does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import fields, replace

from powerflow_fast.plan import QUANTIZED, Run, largest_micro_batch, plan

SHOWN = 4  # ways to fit
GENERATIONS = 8  # completions of a prompt, the trainer's default
STEP = 64  # completions of an optimizer step, over all GPUs: 8 prompts
MOST_GPUS, FEWEST_TOKENS = 64, 256


def command(model: str, run: Run) -> str:
    """`powerflow-fast plan` for this run."""
    words = [f"powerflow-fast plan {shlex.quote(model)}"]
    for field in fields(run):
        value = getattr(run, field.name)
        if field.name in ("shape", "device") or value == field.default:
            continue
        if field.name == "checkpointing":
            words.append("--no-checkpointing")
        else:
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return " ".join(words)


def ways_to_fit(model: str, run: Run) -> list[str]:
    """Commands that do fit, cheapest first, each with its micro-batch and memory."""
    lines = []
    for other in _changes(run):
        fits = largest_micro_batch(other)
        if not fits:
            continue
        memory = plan(other, fits)
        text = f"{command(model, other)}   # micro-batch {fits}, {memory.total / 1e9:.0f} GB"
        if memory.host:
            text += f", {memory.host / 1e9:.0f} GB of main memory"
        lines.append(text)
    return lines[:SHOWN]


def _changes(run: Run) -> Iterator[Run]:
    """One change each, that may make it fit."""
    if not run.checkpointing:
        yield replace(run, checkpointing=True)
    yield from _first_that_fits(replace(run, completions=n) for n in _halves(run.completions, 1))
    if run.lora_rank > 0 and run.sharding == "ddp" and run.weights not in QUANTIZED:
        yield replace(run, weights="nf4")
    if run.lora_rank == 0 and run.sharding == "ddp" and not run.offload_reference:
        yield replace(run, offload_reference=True)
    if run.weights not in QUANTIZED:  # which do not shard
        sharded = replace(run, sharding="fsdp", offload_reference=False)
        if run.gpus > 1:
            yield from (replace(sharded, offload=offload) for offload in (False, True))
        more = range(run.gpus + 1, MOST_GPUS + 1)
        yield from _first_that_fits(replace(sharded, gpus=n) for n in more)
    yield from _first_that_fits(replace(run, tokens=n) for n in _halves(run.tokens, FEWEST_TOKENS))


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _first_that_fits(runs: Iterator[Run]) -> Iterator[Run]:
    found = next((run for run in runs if largest_micro_batch(run)), None)
    if found is not None:
        yield found


def trainer_options(run: Run, fits: int) -> str:
    """The trainer's batch options for a micro-batch of at most `fits` sequences.

    A GPU samples as many completions as were planned, or the next lower number of which all GPUs
    together have whole groups. Where there is none, the smallest that is needed.
    """
    least = GENERATIONS // math.gcd(GENERATIONS, run.gpus)  # of a GPU
    own = max(least, run.completions // least * least)  # completions of a GPU in a rollout
    sizes = [n for n in range(1, min(fits, own) + 1) if own % n == 0]
    size = max(sizes, key=lambda n: (n % GENERATIONS == 0, n))
    sampled = own // size  # micro-batches of one rollout
    rollout = own * run.gpus
    rollouts = max(1, -(-STEP // rollout))
    whole = size % GENERATIONS == 0
    groups = "groups stay whole" if whole else "groups are split: one more scoring pass a rollout"
    if own > run.completions:
        groups += f"; a GPU samples {own} completions at once, not {run.completions} as planned"
    return (
        f"trainer: per_device_train_batch_size={size} num_generations={GENERATIONS} "
        f"steps_per_generation={sampled} gradient_accumulation_steps={sampled * rollouts}\n"
        f"  a rollout has {rollout} completions of {rollout // GENERATIONS} prompts, an optimizer "
        f"step {rollout * rollouts} of {rollout * rollouts // GENERATIONS}; {groups}"
    )
