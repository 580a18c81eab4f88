"""A run measured on held-out questions before and after; the result goes to record and curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from powerflow_fast.data.prompts import Question
from powerflow_fast.evaluation import comparison
from powerflow_fast.evaluation.curves import save as save_curves
from powerflow_fast.evaluation.forecast import forecast
from powerflow_fast.evaluation.scores import Evaluation, Sampling, evaluate


@dataclass(frozen=True)
class Measured:
    """Held-out questions before and after a run."""

    before: Evaluation
    after: Evaluation
    summary: dict[str, Any]  # plain numbers and texts; `RunRecord.held_out`

    def text(self) -> str:
        """The table and the examples, for a terminal."""
        lines = [comparison.text(self.summary)]
        if self.summary["examples"]:
            lines += ["", "One sample of some, not chosen by what came out:"]
            lines += [comparison.example_lines(self.summary["examples"])]
        return "\n".join(lines)


def compare(
    before: Evaluation, after: Evaluation, questions: Sequence[Question], sampling: Sampling
) -> Measured:
    """Two evaluations on the same `questions`, drawn with `sampling`."""
    scores = (before.scores, after.scores)
    summary = comparison.summary(len(questions), *scores, sampling.temperature) | {
        "examples": comparison.examples(questions, before, after),
        "before": before.scores.as_dict(),
        "after": after.scores.as_dict(),
    }
    return Measured(before, after, summary)


def train_and_measure(
    trainer: Any,
    questions: Sequence[Question],
    sampling: Sampling,
    resume_from_checkpoint: str | bool | None = None,
) -> Measured:
    """`trainer.train()` between two measurements, which are added to the trainer's record.

    The first is of the reference: a run starts from it, and so did one that is resumed.

    Args:
        trainer: a PowerFlowTrainer.
        questions: held out, with prompts in the format of the training prompts.
        sampling: how completions are drawn.
        resume_from_checkpoint: as `trainer.train` takes it.
    """
    tokenizer, record = trainer._tokenizer, trainer.record
    policy = trainer.accelerator.unwrap_model(trainer.model)
    began = time.perf_counter()
    start, at_base = trainer.ref_model, nullcontext()
    if start is None:
        start, at_base = policy, trainer.as_reference(policy)
    with at_base:
        sampled = replace(sampling, progress="measuring before training")
        before = evaluate(start, tokenizer, questions, sampled)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    sampled = replace(sampling, progress="measuring after training")
    after = evaluate(policy, tokenizer, questions, sampled, trainer.ref_model)
    measured = compare(before, after, questions, sampling)
    (expected,) = forecast(before.drawn, questions, sampling.samples, [record.alpha])
    goal = {"policy": expected.policy_logp, "reference": expected.base_logp}
    record.held_out = measured.summary | {"forecast": goal}
    record.minutes = (time.perf_counter() - began) / 60
    if trainer.args.draw_curves and trainer.is_world_process_zero():
        save_curves(trainer.state.log_history, trainer.args.output_dir, record)
    return measured
