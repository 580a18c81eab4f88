"""`pytest benchmarks/` as a user starts it, in tiny sizes."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import results_file
from benchmarks.cases import table
from benchmarks.heads import TOLERANCE

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *options]
    # pytest-benchmark would take itself for a worker of this run's xdist, and write nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def benchmarks(*options: str) -> subprocess.CompletedProcess:
    return run("pytest", "benchmarks", "--tiny", "-q", "-p", "no:cacheprovider", *options)


def test_results_and_the_options_of_pytest_benchmark(tmp_path):
    chosen = ("--groups", "forward,scaling", "--peers", "powerflow-fast,naive PyTorch,verl")
    store = ("--benchmark-storage", f"file://{tmp_path}/store")
    output = tmp_path / "own.json"
    save = ("--benchmark-autosave", "--benchmark-json", str(output), "--results", str(tmp_path))
    first = benchmarks(*chosen, *store, *save)
    assert first.returncode == 0, first.stdout
    (path,) = tmp_path.glob("head-*.json")
    results = json.loads(path.read_text())
    assert results["format"] == results_file.FORMAT
    assert results["unavailable"] == {"forward: verl": "its Triton kernel needs a GPU"}
    rows = results["rows"]
    assert {(r["group"], r["peer"]) for r in rows} == {
        (group, peer)
        for group in ("forward", "scaling")
        for peer in ("powerflow-fast", "naive PyTorch")
    }
    for row in rows:
        ceiling = results["ceilings"][row["dtype"]]
        products = row["floor_flops"] / ceiling["flops"]
        floor = max(products, row["floor_bytes"] / ceiling["bandwidth"])
        assert row["ratio_to_floor"] == pytest.approx(row["seconds"] / floor)
        assert row["seconds_min"] <= row["seconds"] and row["rounds"] >= 1
        assert row["error"] < TOLERANCE[getattr(torch, row["dtype"])]
    own = json.loads(output.read_text())["benchmarks"]
    ratios = sorted(one["extra_info"]["ratio_to_floor"] for one in own)
    assert ratios == sorted(row["ratio_to_floor"] for row in rows)
    assert "slope of powerflow-fast in tokens" in first.stdout

    forward = ("--groups", "forward", "--peers", "powerflow-fast")
    histogram = find_spec("pygal") is not None  # pytest-benchmark[histogram]
    compare = ["--benchmark-compare"]
    compare += ["--benchmark-histogram", str(tmp_path / "plot")] if histogram else []
    second = benchmarks(*forward, *store, *compare)
    assert second.returncode == 0, second.stdout
    assert "Comparing against benchmarks from" in second.stdout + second.stderr
    assert list(tmp_path.glob("plot*.svg")) or not histogram


def test_unknown_names_are_refused():
    for option, name in (("--groups", "forwards"), ("--peers", "powerflow")):
        done = benchmarks(option, name, "--collect-only")
        assert done.returncode == 4
        assert f"{option}: expected some of " in done.stderr and f"got {name}" in done.stderr


def test_whole_trainers_run_on_request_alone():
    path = "benchmarks/test_grpo_step.py"
    for options, found in (
        (["benchmarks"], False),
        ([path], True),
        (["benchmarks", "--groups", "grpo-step"], True),
    ):
        done = run("pytest", *options, "--tiny", "--collect-only", "-q", "-p", "no:cacheprovider")
        assert (f"{path}::test_grpo_is" in done.stdout) == found, done.stdout


def test_what_the_budget_drops_is_named(tmp_path):
    done = benchmarks("--groups", "forward", "--peers", "powerflow-fast", "--budget", "0")
    dtypes = {case.dtype for case in table(torch.device("cpu"), tiny=True)}  # one or two
    assert f"dropped: {len(dtypes)} after 0 s" in done.stdout
    assert "test_head[forward-tiny-random-float32-powerflow-fast]" in done.stdout
