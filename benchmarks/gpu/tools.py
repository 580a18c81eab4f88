"""Stages `counters` and `sanitizer`: our launches under Nsight Compute and compute-sanitizer.

Both tools start a program of their own: this module, as `python -m benchmarks.gpu.tools NAME`.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu.kernel_times import CASES, Chunks
from benchmarks.gpu.lines import Line
from benchmarks.gpu.shapes import device_here, dtype_of, shapes
from benchmarks.gpu.worker import Run
from benchmarks.inputs import Shape, draw
from benchmarks.peers import PowerflowFast, Unavailable
from benchmarks.results_file import FOLDER

SMALL = Shape(200, 96, 600, length=20)
SMALL_TINY = Shape(20, 32, 70, length=10)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
# Nsight Compute's columns in % of the column maximum, by what the share is of.
SHARES = {
    "tensor_pipe": r"^sm__pipe_tensor_cycles_active\.avg\.pct_of_peak_sustained_elapsed",
    "l2": r"^lts__throughput\.avg\.pct_of_peak",
    "dram": r"^dram__(throughput|cycles_active)\.avg\.pct_of_peak",
    "issue": r"^sm__inst_(issued|executed)\.avg\.pct_of_peak",
}
CLOCK = "gpc__cycles_elapsed.avg.per_second"
CHECKED = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+)"}


def counters(run: Run) -> Iterator[None]:
    """One launch of each kernel at the first shape: a line each with what the chip did."""
    yield
    ncu = shutil.which("ncu")
    if ncu is None:
        run.case("launches without ncu", lambda: _run(_program("kernels", run.tiny)))
        raise Unavailable("ncu is not installed: no counters")
    table = run.folder / "counters.csv"
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off"]
    command += [word for section in SECTIONS for word in ("--section", section)]
    command += ["--csv", "--page", "raw", "--log-file", str(table)]
    run.case("all launches", lambda: _run([*command, *_program("kernels", run.tiny)]))
    for line in read_counters(table.read_text()):
        run.write({"stage": run.stage, "part": run.part, **line})


def read_counters(text: str) -> Iterator[Line]:
    """Lines from Nsight Compute's raw page: a row of names, a row of units, a row a launch."""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    for row in rows[1:]:
        line: Line = {"case": row["Kernel Name"].partition("(")[0]}
        line["seconds"] = _number(row["gpu__time_duration.sum"]) * _unit(
            rows[0]["gpu__time_duration.sum"]
        )
        for share, pattern in SHARES.items():
            values = [_number(v) for k, v in row.items() if re.search(pattern, k) and v]
            line[share] = max(values, default=None)
        if row.get(CLOCK):
            line["clock"] = _number(row[CLOCK]) * _unit(rows[0][CLOCK])
        yield line


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _unit(name: str) -> float:
    return UNITS[name.lower().replace("second", "s")]


UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS |= {"hz": 1.0, "khz": 1e3, "mhz": 1e6, "ghz": 1e9}


def sanitizer(run: Run) -> Iterator[None]:
    """Small steps under a checker; before its turn, as it is slow and is not timed."""
    program = _program("steps", run.tiny)
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        run.case("steps without a checker", lambda: _run(program))
        raise Unavailable("compute-sanitizer is not installed: nothing was checked")
    command = [checker, "--tool", run.part, "--error-exitcode", "9", *program]
    run.case("steps", lambda: _run(command, CHECKED[run.part]))
    yield


def _program(name: str, tiny: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.tools", name, *(["--tiny"] if tiny else [])]


def _run(command: list[str], count: str | None = None) -> Line:
    """RuntimeError unless the program ends well and the number that `count` finds is 0."""
    # Each tensor is an allocation of its own, with bounds that a checker sees.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        command,
        cwd=FOLDER.parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode != 0:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    if count is None:
        return {}
    found = re.search(count, done.stdout)
    if found is None or int(found[1]) != 0:
        raise RuntimeError(f"expected a summary with 0 errors, got {found and found[0]!r}")
    return {"errors": 0}


def launch_kernels(tiny: bool) -> None:
    """Each kernel once, seen by a profiler that starts when told to."""
    device = device_here()
    shape = next(iter(shapes(tiny).values()))
    chunks = Chunks.draw(shape, dtype_of(device), device)
    for name, case in CASES.items():
        work = case(chunks)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        work.launch()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(name, flush=True)


def run_steps(tiny: bool) -> None:
    """A step with the head frozen, trained, and with the certified gradient of a sharp policy."""
    device = device_here()
    shape = SMALL_TINY if tiny else SMALL
    for trained, options, sharpening in ((False, {}, 1), (True, {}, 1), (True, CERTIFIED, 8)):
        inputs = draw("random", shape, dtype_of(device), device, train_head=trained)
        loss = PowerflowFast(backend="triton", **options).tb(inputs.sharpened(sharpening)).loss
        loss.backward()
        print(f"trained={trained} {options}: loss {loss.item():.4g}", flush=True)


CERTIFIED = {"grad_tolerance": 1e-2}

if __name__ == "__main__":
    {"kernels": launch_kernels, "steps": run_steps}[sys.argv[1]]("--tiny" in sys.argv)
