"""Stage `ceilings`: what this GPU reaches in bare matrix products and in a copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks import method
from benchmarks.gpu.lines import Line
from benchmarks.gpu.shapes import dtype_of, shapes
from benchmarks.gpu.worker import Run
from powerflow_fast.logprobs.products import matmul

ROWS = 1024  # of exp-logits that are alive at a time
SECONDS = 0.3  # of rounds for each case


def ceilings(run: Run) -> Iterator[None]:
    device, dtype = run.device, dtype_of(run.device)
    torch.zeros(1, device=device)  # starts the device
    yield
    side = 64 if run.tiny else 8192
    shape = next(iter(shapes(run.tiny).values()))
    n, h, v = shape.n, shape.h, shape.v
    rows, columns = min(ROWS, n), v // 8

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    def times(left: torch.Tensor, right: torch.Tensor, wide: bool = False) -> Line:
        multiply = matmul if wide else torch.mm
        spent = method.quartiles(
            method.repeat(lambda: multiply(left, right), device, run.budget(SECONDS))
        )
        flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return spent | {"tflops": flops / spent["seconds"] / 1e12, "flops": flops}

    size = dtype.itemsize
    run.case(f"product {side} x {side} x {side}", lambda: times(draw(side, side), draw(side, side)))
    run.case(
        f"hidden [{n}, {h}] @ weight.T [{h}, {v}]",
        lambda: times(draw(n, h), draw(v, h).T),
        size * (n * h + v * h + n * v),
    )
    run.case(
        f"exp-logits [{rows}, {v}] @ weight [{v}, {h}], float32 result",
        lambda: times(draw(rows, v), draw(v, h), True),
        size * (rows * v + v * h),
    )
    run.case(
        f"dlogits.T [{columns}, {n}] @ hidden [{n}, {h}], float32 result",
        lambda: times(draw(n, columns).T, draw(n, h), True),
        size * (n * columns + n * h) + 4 * columns * h,
    )
    run.case("copy", lambda: _copy(run, device), 3 << 30 if not run.tiny else 0)


def _copy(run: Run, device: torch.device) -> Line:
    source = torch.ones(1 << (12 if run.tiny else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = method.quartiles(
        method.repeat(lambda: target.copy_(source), device, run.budget(SECONDS))
    )
    return spent | {"bandwidth": 2 * source.numel() / spent["seconds"]}
