"""One part of a stage in a process of its own: it prepares, waits for its turn, then measures.

A part is a generator function of a `Run`. What stands before its first `yield` prepares (imports,
compiles, small trials) while other parts of the stage do the same; what follows has the device to
itself. Every case is written to the results file the moment it ends.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from triton import knobs

from benchmarks.gpu import lines
from benchmarks.gpu.shapes import device_here
from benchmarks.method import free_bytes
from benchmarks.peers import Unavailable


@dataclass
class Run:
    """What a part knows of its run."""

    stage: str
    part: str
    path: Path  # of the results file
    tiny: bool  # a dry run: tiny sizes
    connection: Connection | None = None  # to the runner, which prints what ended

    @property
    def device(self) -> torch.device:
        return device_here()

    def budget(self, seconds: float) -> float:
        """Seconds of rounds for a case: 0 in a dry run."""
        return 0.0 if self.tiny else seconds

    @property
    def folder(self) -> Path:
        return self.path.parent

    def case(
        self, name: str, measure: Callable[[], lines.Line], needs_bytes: float = 0
    ) -> lines.Line:
        """Writes the figures that `measure` returns, or why there are none.

        With less memory at hand than `needs_bytes` the case is skipped. After an error of the
        device itself the process cannot go on, so that error is raised again.
        """
        line: lines.Line = {"stage": self.stage, "part": self.part, "case": name}
        began = time.perf_counter()
        try:
            free = free_bytes(self.device)
            if needs_bytes > free:
                line["skipped"] = (
                    f"needs about {needs_bytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
                )
            else:
                line |= measure()
        except Unavailable as reason:
            line["skipped"] = str(reason)
        except torch.OutOfMemoryError:
            line["skipped"] = "out of memory"
        except Exception as error:
            traceback.print_exc()
            line["failed"] = f"{type(error).__name__}: {error}"[:500]
            if isinstance(error, torch.AcceleratorError):
                raise
        finally:
            line["wall_seconds"] = round(time.perf_counter() - began, 3)
            self.write(line)
        return line

    def write(self, line: lines.Line) -> None:
        lines.append(self.path, line)
        if self.connection is not None:
            self.connection.send(line)


def work(run: Run, function: str, log: Path) -> None:
    """The process: `function` is "module:name" of the part's generator function."""
    os.setsid()  # so that a kill takes the programs that it starts along
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _log_to(log, f"\n== {run.stage}: {run.part}\n")
    compiled = Compiled()
    try:
        module, _, name = function.partition(":")
        measure = getattr(importlib.import_module(module), name)(run)
        next(measure)
        run.connection.send("ready")
        run.connection.recv()
        for _ in measure:
            pass
    except Unavailable as reason:
        run.write({"stage": run.stage, "part": run.part, "skipped": str(reason)})
    finally:
        if compiled.compiled:
            lines.append(run.path, {"stage": run.stage, "part": run.part, **vars(compiled)})


class Compiled:
    """Counts what Triton compiles in this process, a peer's kernels too; not what was cached."""

    def __init__(self) -> None:
        self.compiled, self.compile_seconds = 0, 0.0
        knobs.compilation.listener = self._count

    def _count(self, *, src, times, cache_hit: bool, **_) -> None:
        if not cache_hit:
            print(f"Triton compiled {src.name} in {times.total / 1e6:.1f} s")
            self.compiled += 1
            self.compile_seconds += times.total / 1e6


def _log_to(path: Path, title: str) -> None:
    """Whatever this process prints, compilers and libraries too, goes to the log."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, title.encode())
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)
