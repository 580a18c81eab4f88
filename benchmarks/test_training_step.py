"""A whole training step with LoRA: tokens per second and peak memory by head, on real shapes."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import memory, method, peers
from benchmarks.cases import FEW_PEERS
from benchmarks.conftest import SESSION
from benchmarks.training_step import StepCase, TrainingStep, cases


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    found = cases(session.device, method.free_bytes(session.device), tiny=session.tiny)
    metafunc.parametrize("model", found, ids=lambda case: case.id)
    metafunc.parametrize("peer", FEW_PEERS)


@pytest.mark.benchmark(group="training-step")
def test_training_step(benchmark, session, record, device, model, peer):
    pytest.importorskip("transformers")
    try:
        row = measure(benchmark, session, device, model, peer)
    except peers.Unavailable as reason:
        session.skip("training-step", peer, str(reason))
    except torch.OutOfMemoryError:
        session.skip("training-step", peer, f"out of memory with the {model.id}")
    finally:
        gc.collect()  # the optimizer and the model refer to each other
    benchmark.extra_info.update(row)
    record(row)


def measure(benchmark, session, device, model: StepCase, peer: str) -> dict:
    session.cached.clear()  # inputs of the groups before
    setting, way = next(iter(peers.methods(peer, device).items()))
    needed, free = peak_needed(model, peer), method.free_bytes(device)
    if needed > free:
        reason = f"{model.id} needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        session.skip("training-step", peer, reason)
    step, clock = TrainingStep(model, way, device), method.Clock(device)
    first = step().item()
    expected = session.first_loss.setdefault(model.id, first)  # every peer's model is the same
    rounding = torch.finfo(model.dtype).eps
    assert first == pytest.approx(expected, rel=16 * rounding), f"{peer} has another loss"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rounds = max(3, method.rounds_within(2 * session.case_seconds, clock.seconds(step)))
    benchmark.pedantic(step, rounds=rounds)
    times = benchmark.stats.stats.data if benchmark.enabled else [clock.seconds(step)]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        del step  # the child builds its own
        peak = memory.in_child(_peak_on_cpu, model, peer, setting)
    timed = method.quartiles(times)
    return {
        "group": "training-step",
        "peer": peer,
        "setting": setting,
        "model": model.id,
        "tokens": model.tokens,
        "sequence_length": model.length,
        "dtype": str(model.dtype).removeprefix("torch."),
        **timed,
        "tokens_per_second": model.tokens / timed["seconds"],
        "peak_bytes": peak,
        "first_loss": first,
    }


def peak_needed(model: StepCase, peer: str) -> int:
    logits = peers.PEERS[peer].logit_bytes * model.tokens * model.shape.vocab_size
    return int(1.1 * model.dtype.itemsize * model.shape.parameters()) + logits


def _peak_on_cpu(model: StepCase, peer: str, setting: str) -> int:
    """Peak resident size of a process that builds the model and takes two steps."""
    before = memory.resident("VmRSS")
    step = TrainingStep(model, peers.methods(peer, memory.CPU)[setting], memory.CPU)
    memory.reset_resident_peak()
    step()
    step()
    return memory.resident("VmHWM") - before
