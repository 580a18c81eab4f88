"""python -m benchmarks.evidence [EXPERIMENT ...] [--workers N]: run experiments, write the page."""

from __future__ import annotations

import argparse
import os

from benchmarks import evidence, report
from benchmarks.evidence import runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all of them")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    unknown = set(args.experiments) - set(evidence.EXPERIMENTS)
    if unknown:
        parser.error(f"{sorted(unknown)}: expected some of {', '.join(evidence.EXPERIMENTS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    runner.run_all(args.experiments or evidence.EXPERIMENTS, args.workers)
    report.main()


if __name__ == "__main__":
    main()
