"""A step of whole trainers by the length of the prompt: once, for each completion, and TRL's.

pytest benchmarks/test_shared_prompt.py --results runs/bench
"""

from __future__ import annotations

import importlib.util
import statistics

import pytest
import torch

pytest.importorskip("trl")

from benchmarks import trainers  # noqa: E402

STEPS = 4  # the first is not counted
SIZES = (
    trainers.Rollout(prompts=1, group=8, completion=64, prompt=64),
    trainers.Rollout(prompts=1, group=8, completion=64, prompt=256),
    trainers.Rollout(prompts=1, group=8, completion=256, prompt=256),
)
TINY = (trainers.Rollout(prompts=1, group=2, completion=4, prompt=8),)
BARS = {(256, 64): 2.2, (256, 256): 1.4}  # times the step with a prompt for each


def test_shared_prompt(tmp_path, session):
    session.prompts = {"rows": [], "unavailable": {"Unsloth": _why_not_unsloth()}}
    gains = {}
    for sizes in TINY if session.tiny else SIZES:
        seconds = {}
        for number, kind in enumerate(trainers.KINDS):
            steps = 2 if session.tiny else STEPS
            folder = tmp_path / f"{sizes.prompt}-{sizes.completion}-{number}"
            times = trainers.seconds(kind, sizes, steps, folder)
            seconds[kind] = statistics.median(times)
            row = {"kind": kind, **vars(sizes), "seconds": times, "median_seconds": seconds[kind]}
            row["peak_bytes"] = trainers.peak_bytes(kind, sizes, folder)
            session.prompts["rows"].append(row)
        once, each, _ = (seconds[kind] for kind in trainers.KINDS)
        gains[sizes.prompt, sizes.completion] = each / once
    if torch.cuda.is_available() or session.tiny:
        return
    assert all(gains[size] >= bar for size, bar in BARS.items()), gains


def _why_not_unsloth() -> str:
    if not torch.cuda.is_available():
        return "Unsloth needs a GPU"
    if importlib.util.find_spec("unsloth") is None:
        return "Unsloth is not installed"
    return "Unsloth patches its peers' trainers, which would no longer be measured as they are"
