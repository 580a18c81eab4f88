"""Steps per minute: PowerFlowTrainer against TRL's GRPOTrainer, same model and rollouts.

pytest benchmarks/test_trainer_step.py --results runs/bench
"""

from __future__ import annotations

import statistics

import pytest

pytest.importorskip("trl")

from benchmarks import trainers  # noqa: E402

STEPS = 6  # the first is not counted
SIZES = trainers.Rollout(prompts=2, group=4, completion=64)
BAR = 0.9  # of TRL's steps per minute


def test_steps_per_minute(tmp_path, session):
    times: dict[str, list[float]] = {"powerflow": [], "grpo": []}
    for turn in range(2):  # in turns, so that a change of the machine's load meets both
        for kind in times:
            times[kind] += trainers.seconds(kind, SIZES, STEPS, tmp_path / f"{kind}{turn}")
    rate = {kind: 60 / statistics.median(seconds) for kind, seconds in times.items()}
    session.trainer = {"steps_per_minute": rate, "seconds": times}
    assert rate["powerflow"] >= BAR * rate["grpo"]
