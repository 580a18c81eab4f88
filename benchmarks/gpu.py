"""On a GPU: the kernels' tests without the interpreter, then the benchmarks, under 10 minutes.

    python -m benchmarks.gpu [--results FOLDER] [--minutes 9.5] [--tune] [--dry-run]

Runs from a plain copy of this repository with torch, triton, transformers, pytest and
pytest-benchmark installed; peers are measured where they are. With too little time the least
important cases are dropped, and the end says which. `--tune` has the kernels choose their tiles by
timing them (powerflow_fast/tuning.py), which takes from the same minutes. `--dry-run` walks through
everything in tiny sizes, on a CPU too, where the kernels run in the interpreter; it times nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Independent processes: most of their time goes into compiling kernels, one core each. Not among
# them: the facts of machine code, which are those of other chips too and take no device.
TESTS = (
    *sorted({*ROOT.glob("tests/kernels/test_*.py")} - {*ROOT.glob("tests/kernels/*machine*.py")}),
    ROOT / "tests" / "test_cuda.py",
    ROOT / "tests" / "test_backends_agree.py",
)
DRY_TESTS = TESTS[-2:]
TESTS_SHARE = 0.35  # of the minutes, at most; the rest is the benchmarks'
GRACE = 90.0  # seconds for the test that runs when the tests' budget ends
ENDING = 45.0  # seconds kept back: one case may still run when the budget ends


def main() -> int:
    args = arguments()
    missing = missing_packages()
    if missing:
        print(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
        return 2
    import torch

    if not torch.cuda.is_available() and not args.dry_run:
        print("no GPU that torch can use; --dry-run walks through on a CPU, `make bench` times it")
        return 2
    start, total = time.monotonic(), 60 * args.minutes
    tests, share = (DRY_TESTS, 2.0) if args.dry_run else (TESTS, TESTS_SHARE * total)
    tests_pass = run_tests(tests, share)
    left = total - (time.monotonic() - start)
    code = run_benchmarks(args, max(left - ENDING, 1.0))
    minutes = (time.monotonic() - start) / 60
    verdicts = ["pass" if good else "FAIL" for good in (tests_pass, code == 0)]
    print(f"\nTests {verdicts[0]}, benchmarks {verdicts[1]}, {minutes:.1f} minutes.")
    return 0 if tests_pass and code == 0 else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = os.environ.get("POWERFLOW_RESULTS", ROOT / "benchmarks" / "results")
    parser.add_argument("--results", type=Path, default=default, help="folder for the results file")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--tune", action="store_true", help="choose tile shapes by timing them")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no results file")
    args = parser.parse_args()
    if args.minutes <= 1:
        parser.error(f"--minutes: expected more than 1, got {args.minutes:g}")
    return args


def missing_packages() -> list[str]:
    from importlib.util import find_spec

    needed = {"torch": "torch", "triton": "triton", "transformers": "transformers"}
    needed |= {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark"}
    return [package for module, package in needed.items() if find_spec(module) is None]


def pytest_command(*options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]


def run_tests(tests: tuple[Path, ...], seconds: float) -> bool:
    """Every file in its own process; what no longer fits into `seconds` is skipped."""
    print(f"Tests of the kernels on this device, {seconds:.0f} s at most", flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    budget = ("-p", "benchmarks.budget", "--budget", f"{seconds}", "--tb=short")
    running = [
        subprocess.Popen(
            pytest_command(*budget, str(path)),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for path in tests
    ]
    good, start = True, time.time()
    for path, process in zip(tests, running, strict=True):
        try:
            output, _ = process.communicate(timeout=max(start + seconds + GRACE - time.time(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + f"\nstopped: hung past {seconds + GRACE:.0f} s"
        dropped = re.search(r"dropped: \d+ after \d+ s", output)
        said = output.strip().splitlines()[-1] + (f" ({dropped[0]})" if dropped else "")
        print(f"{path.relative_to(ROOT)}: {said}", flush=True)
        if process.returncode != 0:
            good = False
            print(output, flush=True)
    return good


def run_benchmarks(args: argparse.Namespace, seconds: float) -> int:
    print(f"\nBenchmarks, {seconds:.0f} s at most", flush=True)
    options = ["benchmarks", "--budget", f"{seconds}", "--tb=short", "-rs"]
    if args.dry_run:
        options += ["--tiny", "--peers", "powerflow-fast,naive PyTorch,verl"]
        options += ["--groups", "tb-frozen,certified,training-step,tb-trained"]
    else:
        options += ["--results", str(Path(args.results).resolve())]
    environment = os.environ | ({"POWERFLOW_TUNE": "1"} if args.tune else {})
    return subprocess.run(pytest_command(*options), cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
