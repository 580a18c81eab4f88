"""Whole optimizer steps with sampling: PowerFlowTrainer against TRL's GRPOTrainer.

    pytest benchmarks/ --groups whole-step --results runs/bench --budget 2400

vLLM samples, too, where it is installed or POWERFLOW_VLLM names a folder with it (`make test-vllm`
fills .vllm). The budget drops the last cases; the most telling ones come first.
"""

from __future__ import annotations

import statistics

import pytest
import torch

pytest.importorskip("trl")

from benchmarks import step_models, whole_step  # noqa: E402
from benchmarks.conftest import SESSION  # noqa: E402
from benchmarks.whole_step import OURS, TRAINERS, TRL, TRL_WHOLE, Case  # noqa: E402
from benchmarks.whole_step_tables import ANCHOR  # noqa: E402

SIZES = (ANCHOR, (1024, 64), (64, 64), (256, 256), (1024, 256), (64, 256))
VLLM_SIZES = (ANCHOR, (1024, 64))
GPU_MODELS = ("Qwen2.5-1.5B", "Llama-3-8B")
FASTER = 2.0  # ours at the anchor, in steps a minute
SMALLER = 0.5  # in memory, where as many sequences go through the model at once; else no larger


def cases(on_gpu: bool, tiny: bool) -> list[Case]:
    """In the order of what they tell."""
    if tiny:
        small = dict(prompt=8, completion=4, group=2)
        trainers = [(name, by) for by in ("transformers", "vLLM") for name in (OURS, TRL)]
        return [Case(step_models.TINY, *trainer, **small) for trainer in trainers]
    found = []
    for model in GPU_MODELS if on_gpu else (step_models.SMOLLM2,):
        for sizes in SIZES:
            found += [Case(model, name, "transformers", *sizes) for name in TRAINERS]
            if sizes == ANCHOR and not on_gpu:
                found.append(Case(model, TRL_WHOLE, "transformers", *sizes))
            if sizes in VLLM_SIZES:
                found += [Case(model, name, "vLLM", *sizes) for name in (OURS, TRL)]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "step" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        found = cases(session.device.type == "cuda", session.tiny)
        metafunc.parametrize("step", found, ids=lambda case: case.id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all cases: vLLM compiles once for a model's path."""
    return tmp_path_factory.mktemp("whole-step")


def test_step(step, session, folder):
    session.steps["unavailable"]["whole-step: Unsloth"] = whole_step.why_not_unsloth()
    if step.sampler == "vLLM" and (reason := whole_step.why_not_vllm()):
        session.steps["unavailable"]["whole-step: vLLM"] = reason
        pytest.skip(reason)
    limits = dict(most=1) if session.tiny else {}
    session.steps["rows"].append(whole_step.row(step, folder, **limits))


def test_ours_at_the_anchor(session):
    if session.tiny or torch.cuda.is_available():
        pytest.skip("the bars are those of a CPU")
    rows = {
        row["trainer"]: row
        for row in session.steps["rows"]
        if (row["prompt"], row["completion"]) == ANCHOR and row["sampler"] == "transformers"
    }
    if not {OURS, TRL, TRL_WHOLE} <= rows.keys():
        pytest.skip("not all of it was measured")
    seconds = {name: statistics.median(row["seconds"]) for name, row in rows.items()}
    peak = {name: row["peak_bytes"] for name, row in rows.items()}
    assert seconds[TRL] >= FASTER * seconds[OURS], seconds
    assert peak[OURS] <= min(peak[TRL], SMALLER * peak[TRL_WHOLE]), peak
