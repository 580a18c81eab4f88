"""`make help` shows every target, and `make bench` leaves the pages alone."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_shows_every_target_in_one_column():
    lines = make("help").splitlines()
    shown, columns = set(), set()
    for line in lines:
        names, gap, text = re.fullmatch(r"([a-z0-9 -]+?)( {2,})(\S.*)", line).groups()
        shown |= set(names.split())
        columns.add(len(names + gap))
        assert len(line) <= 100
    assert shown == set(TARGETS.replace("\\", "").split())
    assert len(columns) == 1


def test_bench_leaves_the_pages_alone():
    commands = make("--dry-run", "--assume-old=.venv/.installed", "bench", "ARGS=--tiny")
    assert "--results runs/bench " in commands and commands.rstrip().endswith("--tiny")
    assert "benchmarks.report" not in commands
    ignored = subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", "runs/bench"])
    assert ignored.returncode in (0, 128)  # 128: a plain copy, without git
