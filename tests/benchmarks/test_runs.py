"""`pytest benchmarks/` as a user starts it, in tiny sizes; how names are picked."""

import itertools
import json
import re
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from benchmarks import results_file
from benchmarks.cases import table
from benchmarks.conftest import Session
from benchmarks.heads import TOLERANCE
from benchmarks.names import pick
from benchmarks.peers import PEERS, ROUNDED
from tests.benchmarks.test_report import head_results, whole_step_results
from tests.helpers import pytest_run


@pytest.fixture
def run(tmp_path):
    """Runs `pytest OPTIONS`."""
    numbers = itertools.count()
    return lambda *options: pytest_run.run(tmp_path / f"run{next(numbers)}", *options)


@pytest.fixture
def benchmarks(run):
    return partial(run, "benchmarks", "--tiny", "-q", "-p", "no:cacheprovider")


def test_results_and_the_options_of_pytest_benchmark(tmp_path, run, benchmarks):
    chosen = ("--groups", "forward,scaling", "--peers", "powerflow-fast,naive PyTorch,verl")
    store = ("--benchmark-storage", f"file://{tmp_path}/store")
    output = tmp_path / "own.json"
    save = ("--benchmark-autosave", "--benchmark-json", str(output), "--results", str(tmp_path))
    first = benchmarks(*chosen, *store, *save)
    assert first.returncode == 0, first.stdout
    (path,) = tmp_path.glob("*-*.json")
    assert path.name.startswith("tiny-")  # `make report` never takes it for a measurement
    assert f"Written to {path}" in first.stdout
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
    assert f"{len(rows)} cases walked through in tiny sizes: right, not timed." in first.stdout
    assert "Not measured here: verl (its Triton kernel needs a GPU)." in first.stdout
    for figure in ("floor", "TFLOP", "time in", "exponent"):
        assert figure not in first.stdout

    # Times are shown at full size alone.
    quick = ("benchmarks", "--groups", "forward", "--peers", "powerflow-fast", "-k", "float32")
    histogram = find_spec("pygal") is not None  # pytest-benchmark[histogram]
    compare = ["--benchmark-compare", "--case-seconds", "0.01"]
    compare += ["--benchmark-histogram", str(tmp_path / "plot")] if histogram else []
    second = run(*quick, *store, *compare, "-q", "-p", "no:cacheprovider")
    assert second.returncode == 0, second.stdout
    assert "Comparing against benchmarks from" in second.stdout + second.stderr
    assert list(tmp_path.glob("plot*.svg")) or not histogram
    theirs, ours = re.split(r"\d passed", second.stdout)
    assert "time in" in theirs and re.search(r"\npowerflow-fast +[\d.]+ m?s \([\d.]+x\)", ours)
    assert "Written to" not in ours


def test_unknown_names_are_refused(benchmarks):
    for option, name, near in (
        ("--groups", "forwards", "forward"),
        ("--peers", "round_logits", ROUNDED),
    ):
        done = benchmarks(option, name, "--collect-only")
        assert done.returncode == 4
        assert f"{option}: expected some of " in done.stderr
        assert f"got {name} (nearest: {near})" in done.stderr
    assert f'powerflow-fast, "{ROUNDED}", naive PyTorch' in done.stderr


def test_names_with_a_comma_can_be_picked():
    assert pick(["powerflow-fast, round_logits"], PEERS) == {ROUNDED}
    assert pick(["powerflow-fast,naive PyTorch"], PEERS) == {"powerflow-fast", "naive PyTorch"}
    three = {"powerflow-fast", ROUNDED, "verl"}
    assert pick(["verl, powerflow-fast,powerflow-fast,round_logits"], PEERS) == three
    assert pick(["powerflow-fast", ROUNDED, "verl"], PEERS) == three
    with pytest.raises(ValueError, match=r"got liger \(nearest: Liger \w+.*\), an empty name$"):
        pick(["liger,", "verl"], PEERS)


def test_what_cannot_be_run_or_written_is_said(tmp_path, benchmarks):
    file = tmp_path / "file"
    file.touch()
    done = benchmarks("--results", str(file), "--collect-only")
    assert done.returncode == 4
    assert f"--results: expected a folder, got {file} (File exists)" in done.stderr
    folder = tmp_path / "folder"
    done = benchmarks("--groups", "scaling", "--peers", ROUNDED, "--results", str(folder))
    assert f'No case in these groups on this device for: "{ROUNDED}".' in done.stdout
    assert f"Nothing was measured, nothing written to {folder}" in done.stdout


def test_the_end_of_a_run(tmp_path, monkeypatch):
    """The tables of the pages, where the file is, and how to contribute it."""
    session = Session.__new__(Session)
    session.tiny, session.rows, session.notes = False, [], ["a note"]
    results = head_results()
    session.rows, session.ceilings = results["rows"], {}
    session.unavailable = results["unavailable"]
    session.steps, session.busy = whole_step_results(), []
    text = re.sub(" +", " ", "\n".join(session.report(tmp_path, ["one"])))
    for shown in (
        "naive PyTorch 1.00 s (one run) 1.60x 10 MB 3e-07",
        "Dropped for lack of time: 1 cases",
        "256 + 8 x 64 tokens powerflow-fast 20.00 (2) 853",
        "Not measured here: Unsloth (it needs a GPU).",
        "a note",
        f"Written to {tmp_path}/head-",
        f"Written to {tmp_path}/whole-step-",
        "To contribute it: copy it to benchmarks/results/ and run `make report`.",
    ):
        assert shown in text
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    assert "To contribute" not in "\n".join(session.report(tmp_path, []))
    assert "Written" not in "\n".join(session.report(None, []))


def test_whole_trainers_run_on_request_alone(run):
    path = "benchmarks/test_grpo_step.py"
    for options, found in (
        (["benchmarks"], False),
        ([path], True),
        (["benchmarks", "--groups", "grpo-step"], True),
    ):
        done = run(*options, "--tiny", "--collect-only", "-q", "-p", "no:cacheprovider")
        assert (f"{path}::test_grpo_is" in done.stdout) == found, done.stdout


def test_whole_steps_are_walked_through(benchmarks):
    """Ours and TRL's with transformers' sampler; with vLLM's, where POWERFLOW_VLLM names it."""
    done = benchmarks("--groups", "whole-step")
    assert done.returncode == 0, done.stdout
    assert re.search("2 passed, 3 skipped|4 passed, 1 skipped", done.stdout)
    assert "steps a minute" not in done.stdout  # of a tiny model


def test_what_the_budget_drops_is_named(benchmarks):
    done = benchmarks("--groups", "forward", "--peers", "powerflow-fast", "--budget", "0")
    dtypes = {case.dtype for case in table(torch.device("cpu"), tiny=True)}  # one or two
    assert f"dropped: {len(dtypes)} after 0 s" in done.stdout
    assert "test_head[forward-tiny-random-float32-powerflow-fast]" in done.stdout
