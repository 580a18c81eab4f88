"""The certified gradient against the exact one, as the policy sharpens.

On a CPU: text that SmolLM2 wrote, its own logits multiplied, as of a policy that was trained
towards p^alpha. On a GPU, where that model may not be at hand: random inputs of the anchor shape.
A flat policy cannot be cut and takes the exact route; the sharper it is, the fewer columns matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from benchmarks import memory, method, peers
from benchmarks.cases import GROUPS, head_dtypes, shapes
from benchmarks.conftest import SESSION
from benchmarks.inputs import INPUT_SETS, Inputs, Shape, draw
from powerflow_fast import reference

STEP = GROUPS["tb-frozen"]
CHECKED_SEQUENCES = 2
LEAST_COSINE = 0.9999  # of the gradient to float64's, at a tolerance of 1e-3 or less


class Setting(NamedTuple):
    source: str
    sharpening: float
    tolerance: float

    @property
    def name(self) -> str:
        return f"{self.source}, sharpened x{self.sharpening:g}"


TEXT = [
    Setting("SmolLM2", 1.0, 1e-3),
    Setting("SmolLM2", 2.0, 1e-3),
    Setting("SmolLM2", 2.0, 1e-4),
    Setting("SmolLM2", 4.0, 1e-3),
    Setting("SmolLM2", 4.0, 1e-4),
]
RANDOM = [Setting("random", s, t) for s, t in itertools.product((1.0, 2.0, 4.0), (1e-3, 1e-2))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    on_text = session.device.type == "cpu" and not session.tiny
    metafunc.parametrize(
        "setting", TEXT if on_text else RANDOM, ids=lambda s: f"{s.name}, {s.tolerance:g}"
    )
    metafunc.parametrize("dtype", head_dtypes(session.device), ids=str)


def input_sets(setting: Setting, shape: Shape, dtype: torch.dtype, device) -> list[Inputs]:
    drawn = (draw(setting.source, shape, dtype, device, seed=seed) for seed in range(INPUT_SETS))
    return [inputs.sharpened(setting.sharpening) for inputs in drawn]


def bare_products(inputs: Inputs) -> Callable[[], object]:
    """What the exact step cannot do without, as plain products in the inputs' type."""
    p = torch.rand(len(inputs.hidden), len(inputs.weight), device=inputs.hidden.device)
    p = p.to(inputs.hidden.dtype)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def run() -> None:
        hidden @ weight.T
        inputs.ref_hidden @ weight.T
        p @ weight

    return run


def extra_bytes(method_: peers.Composed, inputs: Inputs) -> int | None:
    """Peak memory beside inputs and gradient, on a GPU."""
    return memory.on_gpu(STEP, method_, inputs) if inputs.hidden.is_cuda else None


@pytest.mark.benchmark(group="certified")
def test_certified(benchmark, session, record, device, setting, dtype):
    session.cached.clear()  # inputs of the groups before
    name, shape = next(iter(shapes(device, tiny=session.tiny).items()))
    if setting.source == "SmolLM2":
        shape = Shape(1024, shape.h, shape.v, shape.length)  # blocks of 128 tokens
    try:
        sets = input_sets(setting, shape, dtype, device)
    except FileNotFoundError as reason:  # the real model's package
        session.skip("certified", "powerflow-fast", str(reason))
    first = sets[0].sequences(CHECKED_SEQUENCES)
    _, entropy = reference.linear_logprobs(first.hidden.detach(), first.weight, first.targets)
    exact, sparse = peers.PowerflowFast(), peers.PowerflowFast(grad_tolerance=setting.tolerance)
    certificates = [sparse.tb(inputs).metrics for inputs in sets]
    worst = max(metrics["skipped_mass"].item() for metrics in certificates)
    assert worst <= setting.tolerance
    ours, truth = (
        gradient.double().flatten()
        for gradient in (
            STEP.outputs_of(sparse, sets[0], CHECKED_SEQUENCES)[0],
            STEP.truth(sets[0], CHECKED_SEQUENCES, peers.ALPHA)[0],
        )
    )
    cosine = torch.nn.functional.cosine_similarity(ours, truth, dim=0).item()
    assert setting.tolerance > 1e-3 or cosine > LEAST_COSINE

    clock = method.Clock(device)
    turns = itertools.cycle(sets)
    products = bare_products(sets[0])
    products()
    one = clock.seconds(lambda: STEP.run(exact, next(turns)))
    exact_times, products_times = [], []

    def in_turns() -> None:  # so that a change of the machine's load meets all three
        exact_times.append(clock.seconds(lambda: STEP.run(exact, next(turns))))
        products_times.append(clock.seconds(products))

    rounds = max(3, method.rounds_within(session.case_seconds, one))
    benchmark.pedantic(lambda: STEP.run(sparse, next(turns)), setup=in_turns, rounds=rounds)
    times = benchmark.stats.stats.data if benchmark.enabled else exact_times
    row = {
        "group": "certified",
        "peer": "powerflow-fast",
        "source": setting.name,
        "shape_name": name,
        "shape": vars(shape),
        "dtype": str(dtype).removeprefix("torch."),
        **method.quartiles(times),
        "exact_seconds": method.quartiles(exact_times)["seconds"],
        "products_seconds": method.quartiles(products_times)["seconds"],
        "grad_tolerance": setting.tolerance,
        "entropy": entropy.mean().item(),
        "extra_bytes": extra_bytes(sparse, sets[0]),
        "exact_extra_bytes": extra_bytes(exact, sets[0]),
        "columns_kept": certificates[0]["columns_kept"].item(),
        "skipped_mass": worst,
        "cosine": cosine,
        "error": ((ours - truth).norm() / truth.norm()).item(),
    }
    benchmark.extra_info.update(row)
    record(row)
