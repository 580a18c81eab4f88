"""Runs the stages: parts prepare side by side, then measure one after another, each up to a limit.

The processes are forks of one server that has imported what all of them need and has not touched
the device: a part starts at once, and what it does to its process ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.gpu import lines
from benchmarks.gpu.worker import Run, work

PRELOAD = ["benchmarks.gpu.worker", "powerflow_fast", "triton", "torch._dynamo", "transformers"]
GRACE = 5.0  # seconds that a process has to end once it is done or killed


@dataclass(frozen=True)
class Part:
    """One process of a stage."""

    name: str
    function: str  # "module:name" of a generator function, as worker.py says
    seconds: float  # that it may measure


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    parts: tuple[Part, ...]
    prepare_seconds: float  # that all parts together may prepare, from the stage's turn on
    early: bool = False  # its parts begin to prepare with the first stage: they compile for long

    @property
    def limit(self) -> float:
        """Seconds of the whole stage."""
        return self.prepare_seconds + sum(part.seconds for part in self.parts)


@dataclass
class Running:
    part: Part
    process: BaseProcess
    connection: Connection
    began: float
    ready: bool = False
    ended: str = ""  # how, once it has


def run_stages(stages: Sequence[Stage], path: Path, tiny: bool, patience: float = 1.0) -> bool:
    """Whether every part ended by itself without a failed case; limits are times `patience`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def start(stage: Stage) -> list[Running]:
        return [_start(context, stage, part, path, tiny) for part in stage.parts]

    good = True
    started = {stage.name: start(stage) for stage in stages if stage.early}
    try:
        for stage in stages:
            print(f"{stage.name}: {stage.title}", flush=True)
            if stage.name not in started:
                started[stage.name] = start(stage)
            good &= _run_stage(stage, started[stage.name], path, patience)
            _kill_all(started[stage.name])
    finally:
        for parts in started.values():
            _kill_all(parts)
    return good


def _start(context, stage: Stage, part: Part, path: Path, tiny: bool) -> Running:
    ours, theirs = context.Pipe()
    run = Run(stage.name, part.name, path, tiny, theirs)
    process = context.Process(target=work, args=(run, part.function, path.parent / "log.txt"))
    process.start()
    theirs.close()
    return Running(part, process, ours, time.monotonic())


def _run_stage(stage: Stage, parts: list[Running], path: Path, patience: float) -> bool:
    good = True
    limit = patience * stage.prepare_seconds
    until = time.monotonic() + limit
    for running in parts:
        good &= _follow(running, until, limit, until_ready=True)
    for running in parts:
        if not running.ended:
            running.connection.send("go")
            limit = patience * running.part.seconds
            good &= _follow(running, time.monotonic() + limit, limit)
        seconds = round(time.monotonic() - running.began, 2)
        where = {"stage": stage.name, "part": running.part.name}
        lines.append(path, {**where, "ended": running.ended, "seconds": seconds})
        if running.ended != "done":
            print(f"  {running.part.name}: {running.ended}", flush=True)
    return good


def _follow(running: Running, until: float, limit: float, until_ready: bool = False) -> bool:
    """Prints the part's lines until it is ready, ends, or is over the limit and killed."""
    good = True
    while not running.ended and not (until_ready and running.ready):
        left = until - time.monotonic()
        if not wait([running.connection], max(left, 0)):
            _kill(running)
            doing = "preparing" if until_ready else "measuring"
            running.ended = f"stopped after {limit:g} s of {doing}"
            return False
        try:
            message = running.connection.recv()
        except (EOFError, ConnectionResetError):
            running.process.join(GRACE)
            code = running.process.exitcode
            running.ended = "done" if code == 0 else f"crashed: {_reason(code)}"
            return good and code == 0
        if message == "ready":
            running.ready = True
        else:
            good &= "failed" not in message
            print(f"  {describe(message)}", flush=True)
    return good


def _reason(code: int | None) -> str:
    if code is None:
        return "does not end"
    return f"exit status {code}" if code >= 0 else signal.Signals(-code).name


def _kill_all(parts: Sequence[Running]) -> None:
    for running in parts:
        _kill(running)


def _kill(running: Running) -> None:
    """The process and whatever it started."""
    try:
        os.killpg(running.process.pid, signal.SIGKILL)
    except ProcessLookupError:
        running.process.kill()  # before it had a group of its own, or over
    running.process.join(GRACE)


def describe(line: lines.Line) -> str:
    """A line of results for whoever watches."""
    text = f"{line['part']}, {line['case']}" if "case" in line else line["part"]
    for key in ("skipped", "failed"):
        if key in line:
            return f"{text}: {key}: {line[key]}"
    figures = [form(line[key]) for key, form in FIGURES.items() if line.get(key) is not None]
    return f"{text}: {', '.join(figures) or 'done'}"


FIGURES = {
    "seconds": lambda value: f"{1e3 * value:.4g} ms",
    "tflops": lambda value: f"{value:.4g} TFLOP/s",
    "vendor_tflops": lambda value: f"vendor {value:.4g}",
    "bandwidth": lambda value: f"{value / 1e12:.3g} TB/s",
    "tokens_per_second": lambda value: f"{value:.0f} tokens/s",
    "tensor_pipe": lambda value: f"tensor pipe {value:.1f} %",
    "error": lambda value: f"error {value:.1e}",
    "extra_bytes": lambda value: f"extra {value / 1e6:.0f} MB",
    "peak_bytes": lambda value: f"peak {value / 1e9:.3g} GB",
    "planned_bytes": lambda value: f"planned {value / 1e9:.3g} GB",
}
