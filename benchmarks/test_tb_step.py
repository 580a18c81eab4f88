"""One LA-TB step, forward and backward, with a frozen head: ours against what a user has today.

Every head must first give the float64 gradient of a small case; then time and memory are taken.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from benchmarks import inputs, memory, peers
from powerflow_fast import reference

CPU_SHAPE = inputs.Shape(n=1024, h=576, v=49152)
GPU_SHAPE = inputs.Shape(n=16384, h=4096, v=131072, length=512)
SMALL = inputs.Shape(n=128, h=64, v=3000)
# Relative error of the hidden gradient in the small case: a rounding of logits to the input's type
# (naive bf16) is what its users accept; float32 has no excuse.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}
SLOW = 8.0  # seconds a step; above it, one round is enough
VERY_SLOW = 30.0  # above it, one step is the figure, and memory is not measured


def shape_for(device: torch.device) -> inputs.Shape:
    return GPU_SHAPE if device.type == "cuda" else CPU_SHAPE


def exact_gradient(case: inputs.Inputs) -> torch.Tensor:
    """d loss / d hidden in float64, from the specification."""
    hidden = case.hidden.detach().double().requires_grad_()
    bounds = case.cu_seqlens.diff().tolist()
    logps, _ = reference.linear_logprobs(hidden, case.weight, case.targets)
    ref_logps, _ = reference.linear_logprobs(case.ref_hidden, case.weight, case.targets)
    ones = torch.ones(len(bounds), dtype=torch.float64, device=hidden.device)
    loss, _ = reference.tb_loss(
        logps.split(bounds),
        ref_logps.detach().split(bounds),
        log_z=0 * ones,
        alpha=peers.ALPHA * ones,
        psi=0 * ones,
        weights=ones,
    )
    loss.backward()
    return hidden.grad


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bare_seconds(case: inputs.Inputs, device: torch.device, rounds: int = 5) -> float:
    products = peers.bare_products(case)
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        products()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", peers.names())
def test_tb_step_with_a_frozen_head(benchmark, record, device, name, dtype):
    try:
        loss = peers.loss_function(name, device)
    except peers.Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 heads are not trained on GPUs")

    small = inputs.draw(SMALL, dtype, device.type)
    expected = exact_gradient(small)
    error = ((peers.step(loss, small) - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE[dtype], f"{name} is wrong: relative error {error:.1e}"

    shape = shape_for(device)
    cases = [inputs.draw(shape, dtype, device.type, seed=seed) for seed in range(2)]
    bare = bare_seconds(cases[0], device)
    turn = iter(range(10**6))

    def run() -> None:
        peers.step(loss, cases[next(turn) % len(cases)])  # no case is hot in a cache
        synchronize(device)

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    first = seconds()
    if first <= VERY_SLOW:  # the first step may have compiled something
        first = seconds()
    row = {
        "group": "tb_step_frozen_head",
        "peer": name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"n": shape.n, "h": shape.h, "v": shape.v},
        "bare_products_seconds": bare,
        "gradient_error": error,
    }
    if first > VERY_SLOW:
        record(row | timing([first], bare, shape) | {"extra_bytes": None})
        pytest.skip(f"{name}: {first:.0f} s a step, measured once: no {row['dtype']} units here")
    benchmark.group = f"LA-TB step, frozen head, {row['dtype']}"
    slow = first > SLOW
    benchmark.pedantic(run, rounds=1 if slow else 7)
    row |= timing(benchmark.stats.stats.data, bare, shape)
    row["extra_bytes"] = memory.in_child_process(name, dtype, shape, device.type)
    row["extra_share_of_logits"] = row["extra_bytes"] / (4 * shape.n * shape.v)
    benchmark.extra_info.update(row)
    record(row)


def timing(seconds: list[float], bare: float, shape: inputs.Shape) -> dict[str, float]:
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "rounds": len(seconds),
        "ratio_to_bare": median / bare,
        "tflops_of_three_products": 3 * shape.product_flops / median / 1e12,
    }
