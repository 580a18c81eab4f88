"""The measuring itself: rounds, spread, ceilings, slopes, peak memory."""

import multiprocessing.forkserver

import torch

from benchmarks import memory, method, peers, results_file
from benchmarks.cases import GROUPS, Case
from benchmarks.inputs import Shape, draw


def test_rounds_follow_the_budget():
    assert [method.rounds_within(4.0, one) for one in (0.0, 0.1, 1.0, 3.0, 60.0)] == [
        15,
        15,
        4,
        1,
        1,
    ]


def test_spread():
    assert method.quartiles([3.0, 1.0, 2.0]) == {
        "seconds": 2.0,
        "seconds_min": 1.0,
        "seconds_iqr": None,
        "rounds": 3,
    }
    assert method.quartiles([1.0, 2.0, 3.0, 4.0, 5.0])["seconds_iqr"] == 3.0


def test_floor_is_the_slower_of_operations_and_bytes():
    ceilings = method.Ceilings(flops=100.0, bandwidth=10.0)
    assert ceilings.seconds(200, 10) == (2.0, "products")
    assert ceilings.seconds(200, 30) == (3.0, "bytes")
    later = method.Ceilings(flops=50.0, bandwidth=20.0)
    assert later.best(ceilings) == method.Ceilings(flops=100.0, bandwidth=20.0)


def test_ceilings_are_measured():
    found = method.ceilings(torch.device("cpu"), torch.float32, tiny=True)
    assert 1e7 < found.flops < 1e15 and 1e7 < found.bandwidth < 1e13


def test_slopes():
    rows = [
        {"axis": axis, "peer": "x", "shape_name": f"{axis}_x{factor}", "seconds": seconds}
        for axis, power in (("tokens", 1), ("sequences", 0))
        for factor, seconds in ((f, 0.1 * f**power) for f in (1, 2, 4))
    ]
    found = results_file.slopes([*rows, {"group": "training-step", "seconds": 1.0}])
    assert {axis: round(b, 6) for (_, axis), b in found.items()} == {"tokens": 1.0, "sequences": 0}


class FakeEvent:
    """An event of a device whose time runs by 0.25 s from one record to the next."""

    seconds = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.seconds += 0.25
        self.at = None

    def synchronize(self):
        self.at = FakeEvent.seconds

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_device_events_are_the_clock_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = method.Clock(torch.device("cuda"))
    assert [clock.now() for _ in range(3)] == [0.0, 0.25, 0.5]
    assert clock.seconds(lambda: FakeEvent(enable_timing=True).record()) == 0.5


def test_allocator_peak_on_a_gpu(monkeypatch):
    inputs = draw("random", Shape(8, 4, 16, 4), torch.float32, memory.CPU)
    fakes = {"synchronize": None, "reset_peak_memory_stats": None}
    fakes |= {"memory_allocated": 1000, "max_memory_allocated": 1500}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    returned = 4 * 8  # the log-probs
    measured = memory.on_gpu(GROUPS["forward"], peers.Composed(peers.naive), inputs)
    assert measured == 500 - returned


def _allocate(size: int) -> int:
    memory.reset_resident_peak()
    before = memory.resident("VmRSS")
    torch.ones(size, dtype=torch.uint8)  # freed at once: only the peak knows of it
    return memory.resident("VmHWM") - before


def test_peak_memory_of_a_child_process():
    multiprocessing.forkserver.ensure_running()  # as after a test that needed one of its own
    assert 64e6 <= memory.in_child(_allocate, 64_000_000) <= 72e6
    shape = Shape(128, 32, 16384, length=32)
    peaks = {
        peer: memory.on_cpu(Case("tb-frozen", peer, "", shape, "random", torch.float32), "")
        for peer in ("powerflow-fast", "naive PyTorch")
    }
    logits = 4 * shape.n * shape.v
    assert peaks["naive PyTorch"] > 1.99 * logits  # the system counts pages a little late
    assert peaks["powerflow-fast"] < 0.5 * peaks["naive PyTorch"]
