"""What to change in a run that does not fit, and the trainer's options for one that does."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields, replace

from powerflow_fast.planning.memory import QUANTIZED, Run, largest_micro_batch, plan

SHOWN = 4  # ways to fit
FEWEST_COMPLETIONS = 2  # of a prompt
STEP = 64  # completions of an optimizer step, over all GPUs: 8 prompts
MOST_GPUS, FEWEST_TOKENS = 64, 256  # that are suggested


def command(model: str, run: Run, sequences: int | None = None) -> str:
    """The `powerflow-fast plan` command for `run`, and for micro-batches of `sequences`."""
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
    return " ".join(words + ([f"--micro-batch {sequences}"] if sequences else []))


def ways_to_fit(model: str, run: Run, sequences: int | None = None) -> list[str]:
    """Commands that do fit, cheapest first, each with its micro-batch and memory.

    Args:
        model: as the command names it.
        run: does not fit.
        sequences: of a micro-batch that does not fit. The first command is then a smaller one, if
            one fits; the others make room for `sequences`.
    """
    fits = largest_micro_batch(run)
    lines = [_way(model, run, fits)] if fits else []
    for other in _changes(run, sequences or 1):
        if largest_micro_batch(other) >= (sequences or 1):
            lines.append(_way(model, other, sequences))
    return lines[:SHOWN]


def _way(model: str, run: Run, sequences: int | None) -> str:
    shown = sequences or largest_micro_batch(run)
    memory = plan(run, shown)
    text = f"{command(model, run, sequences)}   # micro-batch {shown}, {memory.total / 1e9:.0f} GB"
    if memory.host:
        text += f", {memory.host / 1e9:.0f} GB of main memory"
    return text


def _changes(run: Run, sequences: int) -> Iterator[Run]:
    """One change each, that may make a micro-batch of `sequences` fit."""
    if not run.checkpointing:
        yield replace(run, checkpointing=True)
    fewest = -(-FEWEST_COMPLETIONS // run.gpus)
    fewer = (replace(run, completions=n) for n in _halves(run.completions, fewest))
    yield from _first_that_fits(fewer, sequences)
    if run.lora_rank > 0 and run.sharding == "ddp" and run.weights not in QUANTIZED:
        yield replace(run, weights="nf4")
    if run.lora_rank == 0 and run.sharding == "ddp" and not run.offload_reference:
        yield replace(run, offload_reference=True)
    if run.weights not in QUANTIZED:  # which do not shard
        sharded = replace(run, sharding="fsdp", offload_reference=False)
        if run.gpus > 1:
            yield from (replace(sharded, offload=offload) for offload in (False, True))
        more = (replace(sharded, gpus=n) for n in range(run.gpus + 1, MOST_GPUS + 1))
        yield from _first_that_fits(more, sequences)
    fewest_tokens = max(FEWEST_TOKENS, run.prompt_tokens + 1)
    shorter = (replace(run, tokens=n) for n in _halves(run.tokens, fewest_tokens))
    yield from _first_that_fits(shorter, sequences)


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _first_that_fits(runs: Iterator[Run], sequences: int) -> Iterator[Run]:
    found = next((run for run in runs if largest_micro_batch(run) >= sequences), None)
    if found is not None:
        yield found


def trainer_options(run: Run, fits: int) -> str:
    """The trainer's batch options for this run, with micro-batches of at most `fits` sequences.

    A rollout has `run.completions` on each GPU, as planned, and the micro-batch divides them.
    """
    rollout = run.completions * run.gpus
    if rollout < FEWEST_COMPLETIONS:
        return (
            f"trainer: no group has 1 completion; plan --completions {FEWEST_COMPLETIONS} or more"
        )
    size = _largest_divisor(run.completions, fits)
    group = _largest_divisor(rollout, run.group)
    group = group if group >= FEWEST_COMPLETIONS else rollout
    sampled = run.completions // size  # micro-batches of one rollout
    rollouts = -(-STEP // rollout)  # of an optimizer step
    whole = size % group == 0
    groups = "groups stay whole" if whole else "groups are split: one more scoring pass a rollout"
    divides = f"; {fits} a micro-batch would not divide {run.completions}" if size < fits else ""
    return (
        f"trainer: per_device_train_batch_size={size} num_generations={group} "
        f"steps_per_generation={sampled} gradient_accumulation_steps={sampled * rollouts}\n"
        f"  a rollout has {rollout} completions, {group} a prompt and {run.completions} a GPU, "
        f"an optimizer step {rollout * rollouts}; {groups}{divides}"
    )


def _largest_divisor(value: int, most: int) -> int:
    """The largest divisor of `value` that is at most `most`."""
    return next(n for n in range(min(value, most), 0, -1) if value % n == 0)
