"""Stage `whole-step`: optimizer steps with sampling, PowerFlowTrainer and TRL's GRPOTrainer."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from benchmarks import step_models, whole_step
from benchmarks.gpu.lines import Line
from benchmarks.gpu.worker import Run
from benchmarks.peers import require
from powerflow_fast.models.shapes import model_shape

SIZE = dict(prompt=256, completion=64)
TINY = dict(prompt=8, completion=4, group=2)
STEPS = dict(most=3, enough=12.0)  # of a trainer
TINY_STEPS = dict(most=1)


def step(run: Run) -> Iterator[None]:
    """The part's model with random weights, trained by each."""
    for package in ("trl", "peft", "datasets"):
        require(package)
    from trl import GRPOTrainer  # noqa: F401  (takes seconds)

    import powerflow_fast.training.trainer  # noqa: F401

    yield
    model = step_models.TINY if run.tiny else run.part
    needs = 0 if run.tiny else 3 * 2 * model_shape(model).parameters()  # bf16, and room for a step
    for trainer in whole_step.TRAINERS:
        case = whole_step.Case(model, trainer, "transformers", **(TINY if run.tiny else SIZE))
        run.case(case.id, partial(_measure, run, case), needs)


def _measure(run: Run, case: whole_step.Case) -> Line:
    limits = TINY_STEPS if run.tiny else STEPS
    found = whole_step.measure(case, run.folder / "whole-step", **limits)
    seconds = statistics.median(found["seconds"])
    phases = {name: statistics.median(times) for name, times in found["phases"].items()}
    return {
        "seconds": seconds,
        "steps": len(found["seconds"]),
        "phases": phases,
        "tokens_per_second": case.tokens / seconds,
        "peak_bytes": found["peak_bytes"],
    }
