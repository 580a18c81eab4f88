"""Runs the experiments' runs in worker processes of one thread each, and forgets no finished one.

Finished runs are kept in benchmarks/.cache/evidence until everything that was asked for is done, so
that an interrupted `make evidence` goes on where it was. A kept run counts only while the code and
its options are the same.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks import evidence, results_file
from benchmarks.evidence import Run

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "benchmarks" / ".cache" / "evidence"


def module(experiment: str):
    """The module of one of `evidence.EXPERIMENTS`."""
    if experiment not in evidence.EXPERIMENTS:
        raise ValueError(f"expected an experiment of {evidence.EXPERIMENTS}, got {experiment!r}")
    return importlib.import_module(f"benchmarks.evidence.{experiment}")


def fingerprint() -> str:
    """A hash of the code that runs depend on."""
    digest = hashlib.sha256()
    folders = ("powerflow_fast", "kernels", "benchmarks/evidence")
    for path in sorted(path for name in folders for path in (ROOT / name).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Kept:
    """The finished runs of one experiment, on disk and in memory."""

    def __init__(self, experiment: str, code: str) -> None:
        self.path, self.code = CACHE / f"{experiment}.json", code
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.runs: dict[str, dict[str, Any]] = kept["runs"] if kept.get("code") == code else {}

    def result_of(self, run: Run) -> dict[str, Any] | None:
        entry = self.runs.get(run.name)
        same = entry is not None and entry["options"] == json.loads(json.dumps(run.options))
        return entry["result"] if same else None

    def add(self, run: Run, entry: dict[str, Any]) -> None:
        self.runs[run.name] = {"options": run.options, **entry}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.with_suffix(".tmp")
        written.write_text(json.dumps({"code": self.code, "runs": self.runs}))
        written.replace(self.path)


def execute(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """In a worker: one run of the module `name`, with the seconds that it took."""
    began, cpu = time.perf_counter(), time.process_time()
    result = importlib.import_module(name).run(**options)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {"result": result, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}


def start_worker() -> None:
    import torch

    torch.set_num_threads(1)


def run_all(experiments: Iterable[str], workers: int, say: Callable[[str], None] = print) -> None:
    """Run, summarise and write every experiment; the kept runs go once all are written."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers
    code = fingerprint()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        for experiment in experiments:
            kept = Kept(experiment, code)
            began = time.perf_counter()
            try:
                _run_experiment(experiment, kept, pool, workers, say)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            content = {
                "workers": workers,
                "minutes": round((time.perf_counter() - began) / 60, 1),
                "cpu_minutes": round(sum(r["cpu_seconds"] for r in kept.runs.values()) / 60, 1),
                "summary": module(experiment).summarise(_results(kept)),
                "runs": kept.runs,
            }
            path = results_file.write(f"evidence-{experiment}", content)
            say(f"{experiment}: {content['minutes']} minutes, written to {path}")
    shutil.rmtree(CACHE, ignore_errors=True)


def _results(kept: Kept) -> dict[str, Any]:
    return {name: entry["result"] for name, entry in kept.runs.items()}


def _run_experiment(experiment: str, kept: Kept, pool, workers: int, say) -> None:
    plan, name = module(experiment).plan, module(experiment).__name__
    running: dict[Future, Run] = {}
    while True:
        wanted = plan(_results(kept))
        names = {run.name for run in wanted}
        for run in wanted:
            known = kept.result_of(run) is not None or run in running.values()
            if not known and len(running) < workers:
                running[pool.submit(execute, name, run.options)] = run
        if not running:
            kept.runs = {name: entry for name, entry in kept.runs.items() if name in names}
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run = running.pop(future)
            entry = future.result()
            kept.add(run, entry)
            known = plan(_results(kept))  # a search that ends adds runs
            finished = [r.name for r in known if kept.result_of(r) is not None]
            mean = sum(kept.runs[name]["seconds"] for name in finished) / len(finished)
            left = mean * (len(known) - len(finished)) / workers / 60
            say(
                f"{experiment} {run.name}: {entry['seconds']:.0f} s; "
                f"{len(finished)} of {len(known)} runs, about {left:.0f} minutes left"
            )
