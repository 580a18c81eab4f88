"""A run measured on held-out questions before and after; the result goes to record and curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from powerflow_fast.data.prompts import Question
from powerflow_fast.evaluation.comparison import compare
from powerflow_fast.evaluation.curves import save as save_curves
from powerflow_fast.evaluation.forecast import forecast
from powerflow_fast.evaluation.scores import Sampling, evaluate


def train_and_measure(
    trainer: Any,
    questions: Sequence[Question],
    sampling: Sampling,
    resume_from_checkpoint: str | bool | None = None,
) -> dict[str, Any]:
    """`trainer.train()` between two measurements, which are added to the trainer's record.

    The first is of the reference: a run starts from it, and so did one that is resumed.

    Args:
        trainer: a PowerFlowTrainer.
        questions: held out, with prompts in the format of the training prompts.
        sampling: how completions are drawn.
        resume_from_checkpoint: as `trainer.train` takes it.

    Returns:
        What `compare` returns for before and after.
    """
    tokenizer, record = trainer._tokenizer, trainer.record
    policy = trainer.accelerator.unwrap_model(trainer.model)
    began = time.perf_counter()
    start, at_base = trainer.ref_model, nullcontext()
    if start is None:
        start, at_base = policy, trainer.as_reference(policy)
    title = "measuring before training"
    with at_base:
        before = evaluate(start, tokenizer, questions, sampling, progress=title)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    title = "measuring after training"
    after = evaluate(policy, tokenizer, questions, sampling, trainer.ref_model, title)
    compared = compare(questions, before, after, sampling.temperature)
    (expected,) = forecast(before.drawn, questions, sampling.samples, [record.alpha])
    goal = {"policy": expected.policy_logp, "reference": expected.base_logp}
    record.held_out = compared | {"forecast": goal}
    record.minutes = (time.perf_counter() - began) / 60
    if trainer.args.draw_curves and trainer.is_world_process_zero():
        save_curves(trainer.state.log_history, trainer.args.output_dir, record)
    return compared
