"""How a case is measured: clock, rounds by a budget, ceilings of the machine, memory at hand."""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from powerflow_fast.logprobs import torch_tiles


class Clock:
    """Seconds on the device: its own events on a GPU, wall time on a CPU. Waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.total = 0.0
        self.last: torch.cuda.Event | None = None

    def now(self) -> float:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:  # events hold float32 milliseconds: sum short spans
            self.total += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.total

    def seconds(self, function: Callable[[], object]) -> float:
        start = self.now()
        function()
        return self.now() - start


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in the same session."""

    flops: float  # multiply-adds counted as two, per second, in a bare matrix product
    bandwidth: float  # bytes read and written per second in a copy

    def best(self, other: Ceilings) -> Ceilings:
        return Ceilings(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth))

    def seconds(self, flops: int, moved: int) -> tuple[float, str]:
        """Seconds for operations and bytes at the ceilings, and which of the two sets them."""
        return max((flops / self.flops, "products"), (moved / self.bandwidth, "bytes"))


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Ceilings:
    """The best of several rounds: large square products and ones of a head's shape; a copy.

    On a CPU without units for `dtype` the float32 product is the faster one, and counts; so does
    the product that the head takes there, where it is faster than torch's.
    """
    side = 64 if tiny else 8192 if device.type == "cuda" else 2048
    sizes = [(side, side, side), (side // 4, side // 4, 16 * side)]
    types = {dtype} if device.type == "cuda" else {dtype, torch.float32}
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        types = {torch.float32}
    clock, rate = Clock(device), 0.0
    for type_ in types:
        for n, h, v in sizes:
            left = torch.randn(n, h, device=device, dtype=type_)
            right = torch.randn(v, h, device=device, dtype=type_)
            ours = (torch_tiles.matmul,) if type_ == torch.float32 else ()
            for product in (torch.mm, *ours):
                call = partial(product, left, right.T)
                call()
                rate = max(rate, 2 * n * h * v / min(clock.seconds(call) for _ in range(6)))
    source = torch.zeros((1 << 20 if tiny else 1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(clock.seconds(lambda: target.copy_(source)) for _ in range(6))
    return Ceilings(rate, 2 * source.numel() / best)


def repeat(call: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Seconds of each of several calls, after one that warms up: at least 3, `budget` in all.

    On a GPU all are queued before any is waited for, so that no gap between launches counts. With
    `budget` 0, one call alone: it walks through, and times nothing.
    """
    clock = Clock(device)
    if budget == 0:
        return [clock.seconds(call)]
    call()
    rounds = max(3, rounds_within(budget, clock.seconds(call)))
    if not clock.on_gpu:
        return [clock.seconds(call) for _ in range(rounds)]
    pairs = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def rounds_within(budget: float, one: float) -> int:
    """Rounds of a case whose one run took `one` seconds: at most 15, one where they are long."""
    return max(1, min(15, int(budget / max(one, 1e-9))))


def quartiles(seconds: list[float]) -> dict[str, float | int | None]:
    """Median, minimum, interquartile range (None below 4 rounds) and number of rounds."""
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) >= 4 else None
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_iqr": None if quarters is None else quarters[2] - quarters[0],
        "rounds": len(seconds),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that a case may use."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    return int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()).group(1)) * 1024
