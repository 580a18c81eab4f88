"""`python -m benchmarks.gpu`: everything that one visit to a GPU should bring home.

    python -m benchmarks.gpu --out FOLDER [--stages ceilings,kernels] [--peers powerflow-fast,quack]
    python -m benchmarks.gpu --dry-run     # every stage in tiny sizes, on a CPU too; times nothing

Runs from a plain copy of this repository with torch, triton, transformers, pytest and
pytest-benchmark; peers are measured where they are installed. Stages run in the order of what they
are worth, each part in a process of its own with a time limit. Every result is a line of
FOLDER/gpu-DEVICE.jsonl the moment it is there; FOLDER/log.txt has the rest. Copy the former to
benchmarks/results/ and `make report` has its tables.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks.names import listed, pick

DRY = 5  # times the limits in a dry run: a CPU is slow and does other things
NEEDED = ("torch", "triton", "transformers", "pytest", "pytest_benchmark")


def main(argv: list[str] | None = None) -> int:
    missing = [name.replace("_", "-") for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
        return 2
    # So that asking for a device does not start it: what is forked could not start it again.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before anything of ours is imported
    from benchmarks import results_file
    from benchmarks.gpu import lines, runner
    from benchmarks.gpu.stages import STAGES

    args = arguments(argv, STAGES)
    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU that torch can use; --dry-run walks through on a CPU, `make bench` times it")
        return 2
    stages = chosen(STAGES, args.stages, args.peers)
    header = {
        "device": results_file.device_name(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "commit": results_file.commit(),
        "versions": results_file.versions(),
        "dry_run": args.dry_run,
        "limits": {stage.name: stage.limit for stage in stages},
    }
    try:
        path = lines.start(args.out, header)
    except OSError as error:  # it holds a run, is no folder, or cannot be written to
        print(f"--out: {error}")
        return 2
    show_limits(stages)
    began = time.monotonic()
    patience = args.patience * (DRY if args.dry_run else 1)
    good = runner.run_stages(stages, path, args.dry_run, patience)
    print(f"{time.monotonic() - began:.0f} s. {'Done' if good else 'NOT ALL DONE'}: {path}")
    return 0 if good else 1


def arguments(argv: list[str] | None, stages: Sequence) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    names = [stage.name for stage in stages]
    parts = [part for stage in stages for part in stage.parts if is_peer(part)]
    peers = list(dict.fromkeys(part.name for part in parts))
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"gpu-{stamp}", metavar="FOLDER")
    parser.add_argument("--stages", type=some_of(names), help=f"of: {listed(names)}")
    parser.add_argument("--peers", type=some_of(peers), help=f"of: {listed(peers)}")
    parser.add_argument(
        "--patience", type=positive, default=1.0, help="times the limits; 5 where kernels compile"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too")
    return parser.parse_args(argv)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def some_of(known: list[str]):
    """A type for argparse: names of `known`, separated by commas."""

    def parse(text: str) -> set[str]:
        try:
            return pick([text], known)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def is_peer(part) -> bool:
    return ".steps:" in part.function


def chosen(stages: Sequence, names: set[str] | None, peers: set[str] | None) -> list:
    """The stages named; of their parts that stand for a peer, those of the peers named."""
    kept = []
    for stage in stages:
        parts = [p for p in stage.parts if peers is None or not is_peer(p) or p.name in peers]
        if parts and (names is None or stage.name in names):
            kept.append(replace(stage, parts=tuple(parts)))
    return kept


def show_limits(stages: Sequence) -> None:
    for stage in stages:
        parts = ", ".join(f"{part.name} {part.seconds:g} s" for part in stage.parts)
        prepare = f"{stage.prepare_seconds:g} s to prepare"
        print(f"limit {stage.limit:4.0f} s  {stage.name}: {prepare}; {parts}")
    print(f"limit {sum(stage.limit for stage in stages):4.0f} s  in all", flush=True)


if __name__ == "__main__":
    sys.exit(main())
