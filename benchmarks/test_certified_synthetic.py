"""The certified gradient on random inputs, sharpened: for GPUs, where no real text is at hand.

A flat policy cannot be cut and takes the exact route; the sharper it is, the fewer columns matter.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import method, peers
from benchmarks.cases import GROUPS, shapes
from benchmarks.conftest import SESSION
from benchmarks.inputs import INPUT_SETS, draw
from powerflow_fast import reference

STEP = GROUPS["tb-frozen"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    elsewhere = session.device.type == "cpu" and not session.tiny
    skip = pytest.mark.skipif(elsewhere, reason="on a CPU, text of a real model is measured")
    sharpening = [pytest.param(factor, marks=skip) for factor in (1.0, 2.0, 4.0)]
    metafunc.parametrize("sharpening", sharpening)
    metafunc.parametrize("tolerance", (1e-3, 1e-2))


@pytest.mark.benchmark(group="certified")
def test_certified_synthetic(benchmark, session, record, device, sharpening, tolerance):
    session.cached.clear()  # inputs of the groups before
    name, shape = next(iter(shapes(device, tiny=session.tiny).items()))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    drawn = (draw("random", shape, dtype, device, seed=seed) for seed in range(INPUT_SETS))
    sets = [inputs.sharpened(sharpening) for inputs in drawn]
    first = sets[0].sequences(1)
    _, entropy = reference.linear_logprobs(first.hidden.detach(), first.weight, first.targets)
    exact, sparse = peers.PowerflowFast(), peers.PowerflowFast(grad_tolerance=tolerance)
    metrics = sparse.tb(sets[0]).metrics
    assert metrics["skipped_mass"] <= tolerance
    expected = STEP.truth(sets[0], 1, peers.ALPHA)[0]
    error = (STEP.outputs_of(sparse, sets[0], 1)[0].double() - expected).norm() / expected.norm()

    turns, clock = itertools.cycle(sets), method.Clock(device)
    one = clock.seconds(lambda: STEP.run(exact, next(turns)))
    rounds = method.rounds_within(session.case_seconds, one)
    exact_times = [clock.seconds(lambda: STEP.run(exact, next(turns))) for _ in range(rounds)]
    benchmark.pedantic(lambda: STEP.run(sparse, next(turns)), rounds=rounds)
    times = benchmark.stats.stats.data if benchmark.enabled else exact_times
    row = {
        "group": "certified",
        "peer": "powerflow-fast",
        "source": f"random, sharpened x{sharpening:g}",
        "shape_name": name,
        "shape": vars(shape),
        "dtype": str(dtype).removeprefix("torch."),
        **method.spread(times),
        "exact_seconds": method.spread(exact_times)["seconds"],
        "grad_tolerance": tolerance,
        "entropy": entropy.mean().item(),
        "columns_kept": metrics["columns_kept"].item(),
        "skipped_mass": metrics["skipped_mass"].item(),
        "error": error.item(),
    }
    benchmark.extra_info.update(row)
    record(row)
