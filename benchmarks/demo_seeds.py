"""The demo's figure: `powerflow-fast demo` with three seeds, mean of the held-out changes.

    python -m benchmarks.demo_seeds [--alpha 4.0] [--seeds 0 1 2] [--threads 2] [--note TEXT]

Each seed is a process of its own, started through the command line as a user would, one after the
other. The result goes to benchmarks/results/demo-alpha<alpha>-<device>.json with every seed's
numbers and the machine's load before it began.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import results_file
from powerflow_fast.evaluation.scores import MEASURES


def run_seed(seed: int, args: argparse.Namespace, folder: Path) -> dict:
    """The summary of one run, with its log left in `folder`."""
    output = folder / f"seed-{seed}"
    command = [sys.executable, "-m", "powerflow_fast.cli", "demo", "--seed", str(seed)]
    command += ["--alpha", str(args.alpha), "--output-dir", str(output)]
    command += ["--threads", str(args.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with open(folder / f"seed-{seed}.log", "w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment)
    summary = json.loads((output / "summary.json").read_text())
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
    parser.add_argument("--note", default="", help="kept in the result, e.g. what else ran")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)  # part of the device's name
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        runs = [run_seed(seed, args, Path(folder)) for seed in args.seeds]
    result = {
        "load_before": [round(value, 2) for value in load],
        "note": args.note,
        "mean": summarise(runs),
        "runs": runs,
    }
    path = results_file.write(f"demo-alpha{args.alpha:g}", result)
    print(json.dumps(result["mean"], indent=1), f"\nWritten to {path}")


if __name__ == "__main__":
    main()
