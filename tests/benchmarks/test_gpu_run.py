"""The staged benchmark of a GPU: its dry run on a CPU, kills, crashes, limits, bad input."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import lines, runner, tools, worker
from benchmarks.gpu.runner import Part, Stage
from benchmarks.gpu.stages import STAGES
from tests.helpers import ranks

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "1"))
# `make test-kills` walks through all. These are the longest, and what they call has tests.
LEFT_OUT = ("correct", "whole-step") if KILLS == 1 else ()
WALKED = [stage for stage in STAGES if stage.name not in LEFT_OUT]


@pytest.fixture(scope="module", autouse=True)
def fork_server():
    """A process has one: the runner's imports too little for the tests of ranks that follow."""
    ranks.server()


def start(*options: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def cases(text: str) -> list[str]:
    """Cases that the output says have ended."""
    return re.findall(
        r"^  ([^:]+(?:::[^:]+)?): (?!skipped: [^:]*not installed|stopped)", text, re.M
    )


def written(folder: Path) -> tuple[dict, list[dict]]:
    (path,) = folder.glob("gpu-*.jsonl")
    return lines.read(path)


def names(found: list[dict]) -> set[str]:
    return {f"{line['part']}, {line['case']}" if "case" in line else line["part"] for line in found}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    process = start("--out", str(folder), "--stages", ",".join(stage.name for stage in WALKED))
    output, _ = process.communicate()
    assert process.returncode == 0, output + (folder / "log.txt").read_text()[-5000:]
    return output, folder


def test_dry_run_walks_through_the_stages(dry_run):
    output, folder = dry_run
    header, found = written(folder)
    assert header["dry_run"] and header["commit"] and "torch" in header["versions"]
    ended = {(line["stage"], line["part"]): line["ended"] for line in found if "ended" in line}
    assert ended == {(s.name, p.name): "done" for s in WALKED for p in s.parts}
    assert not [line for line in found if "failed" in line]
    for stage in WALKED:  # every stage has a figure, or a reason for each part that has none
        of_stage = [line for line in found if line["stage"] == stage.name]
        assert any("case" in line and "skipped" not in line for line in of_stage), stage.name
    errors = [line["error"] for line in found if line.get("group") in ("pair", "tb-trained")]
    assert errors and max(errors) < 1e-4
    assert set(cases(output)) <= names(found)
    assert json.loads((folder / "tiles.json").read_text())


def test_limits_are_named_and_stay_under_fifteen_minutes(dry_run):
    output, folder = dry_run
    for stage in WALKED:
        assert re.search(rf"^limit +{stage.limit:.0f} s  {stage.name}: ", output, re.M)
    assert f"limit {sum(stage.limit for stage in WALKED):4.0f} s  in all" in output
    assert sum(stage.limit for stage in STAGES) < 900
    assert written(folder)[0]["limits"] == {stage.name: stage.limit for stage in WALKED}


def test_what_is_imported_before_the_fork_does_not_touch_the_device():
    """A process that is forked from one that started CUDA cannot use it."""
    program = f"""
import importlib, torch
def touched(*_): raise SystemExit("started the device")
for name in ("is_available", "device_count", "_lazy_init", "get_device_properties"):
    setattr(torch.cuda, name, touched)
for name in {runner.PRELOAD}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_page_says_the_limits():
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for stage in STAGES:
        assert re.search(rf"^\| `{stage.name}` \| .* \| {stage.limit:.0f} s \|$", page, re.M)


@pytest.mark.parametrize("number", range(KILLS))
def test_kill_loses_the_running_case_at_most(tmp_path, number):
    few = ("--stages", "ceilings,correct,kernels") if KILLS == 1 else ()
    process = start("--out", str(tmp_path), *few)
    draw = random.Random()
    output = ""
    for _ in range(draw.randrange(12, 40 if few else 100)):  # lines, the first ones of limits
        output += process.stdout.readline()
    time.sleep(draw.uniform(0, 0.5))
    process.kill()
    output += process.communicate()[0]
    assert process.returncode == -signal.SIGKILL
    _, found = written(tmp_path)
    assert set(cases(output)) <= names(found)
    deadline = time.monotonic() + 10
    while writers(tmp_path / "log.txt") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not writers(tmp_path / "log.txt")  # no process outlives the run


def writers(path: Path) -> list[str]:
    """Processes that have the file open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.samefile(fd, path) for fd in (process / "fd").glob("[12]")):
                found.append(process.name)
        except OSError:
            continue
    return found


def run_parts(tmp_path, *functions: str, seconds: float = 60.0) -> tuple[bool, dict, list[dict]]:
    """Stages of one part each -> whether all is well, how each ended, lines."""
    stages = [
        Stage(name, name, (Part(name, f"tests.helpers.gpu_parts:{name}", seconds),), 60)
        for name in functions
    ]
    path = lines.start(tmp_path, {"device": "a CPU", "dry_run": True})
    good = runner.run_stages(stages, path, tiny=True)
    _, found = lines.read(path)
    return good, {x["stage"]: x["ended"] for x in found if "ended" in x}, found


def test_a_stage_that_crashes_leaves_the_others_alone(tmp_path, capsys):
    good, ended, found = run_parts(tmp_path, "aborts", "aborts_early", "writes")
    assert not good
    assert ended == {"aborts": "crashed: SIGABRT", "aborts_early": "crashed: SIGABRT"} | {
        "writes": "done"
    }
    assert [x["case"] for x in found if "case" in x] == ["before", "first", "second"]
    assert "aborts: crashed: SIGABRT" in capsys.readouterr().out


def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path):
    good, ended, found = run_parts(tmp_path, "hangs", "starts_a_program", "writes", seconds=1.5)
    stopped = "stopped after 1.5 s of measuring"
    assert not good
    assert ended == {"hangs": stopped, "starts_a_program": stopped, "writes": "done"}
    assert [x["case"] for x in found if "case" in x] == ["before", "first", "second"]
    assert not writers(tmp_path / "log.txt")


def test_a_part_that_hangs_while_it_prepares(tmp_path):
    parts = [
        Part(name, f"tests.helpers.gpu_parts:{name}", 60) for name in ("hangs_early", "writes")
    ]
    path = lines.start(tmp_path, {"device": "a CPU", "dry_run": True})
    assert not runner.run_stages([Stage("both", "both", tuple(parts), 6)], path, tiny=True)
    ended = {x["part"]: x["ended"] for x in lines.read(path)[1] if "ended" in x}
    assert ended == {"hangs_early": "stopped after 6 s of preparing", "writes": "done"}


def test_an_early_stage_prepares_while_the_first_one_runs(tmp_path):
    def stage(name: str, early: bool) -> Stage:
        return Stage(name, name, (Part(name, f"tests.helpers.gpu_parts:{name}", 60),), 60, early)

    path = lines.start(tmp_path, {"device": "a CPU", "dry_run": True})
    stages = [stage("waits_for_the_other", False), stage("says_that_it_began", True)]
    assert runner.run_stages(stages, path, tiny=True)
    ended = [x["part"] for x in lines.read(path)[1] if "ended" in x]
    assert ended == ["waits_for_the_other", "says_that_it_began"]


def test_what_goes_wrong_in_a_case_is_its_line(tmp_path):
    good, ended, found = run_parts(tmp_path, "goes_wrong", "is_absent")
    assert not good and set(ended.values()) == {"done"}
    lines_ = {x.get("case"): x for x in found if "ended" not in x}
    assert lines_["wrong"]["failed"] == "ArithmeticError: unit gradient 1e-1 > 1e-2"
    assert lines_["too large"]["skipped"] == "out of memory"
    assert re.fullmatch(
        r"needs about 1e\+09 GB, [\d.]+ GB are free", lines_["larger than memory"]["skipped"]
    )
    assert lines_["after"]["error"] == 1e-7
    assert lines_[None]["skipped"] == "the package is not installed"
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--stages", "kernel"), "--stages: expected some of ceilings, correct, "),
        (("--stages", "kernel"), "got kernel"),
        (("--peers", "powerflow-fast,vllm"), "--peers: expected some of powerflow-fast, quack"),
        (("--peers", "powerflow-fast,vllm"), "got vllm"),
        (("--patience", "0"), "--patience: expected a number > 0, got 0"),
        (("--patience", "long"), "--patience: expected a number > 0, got long"),
    ],
)
def test_unknown_names_are_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        command.main(["--dry-run", *options])
    assert said in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused(tmp_path, capsys):
    path = lines.start(tmp_path, {"device": "a GPU"})
    before = path.read_text()
    assert command.main(["--dry-run", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert f"--out: expected a folder without a run, {tmp_path} holds gpu-a-gpu.jsonl" in said
    assert path.read_text() == before
    assert command.main(["--dry-run", "--out", str(path)]) == 2  # a file
    assert re.search(f"^--out: .*{path}", capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_or_a_package(tmp_path, monkeypatch, capsys):
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "no GPU that torch can use; --dry-run walks through" in capsys.readouterr().out
    monkeypatch.setattr(command, "find_spec", lambda name: None if "bench" in name else name)
    assert command.main([]) == 2
    assert (
        "not installed: pytest-benchmark; pip install pytest-benchmark" in capsys.readouterr().out
    )
    assert not list(tmp_path.iterdir())


def test_stages_and_peers_that_are_chosen():
    kept = command.chosen(STAGES, {"heads", "trained-head", "kernels"}, {"quack chunked"})
    found = {stage.name: [part.name for part in stage.parts] for stage in kept}
    assert found == {"kernels": ["ours"], "heads": ["quack chunked"]}
    assert command.chosen(STAGES, None, None) == list(STAGES)


def test_lines_are_read_back(tmp_path):
    path = lines.start(tmp_path, {"device": "NVIDIA H100 80GB HBM3"})
    assert path.name == "gpu-nvidia-h100-80gb-hbm3.jsonl"
    lines.append(path, {"stage": "ceilings", "case": "copy"})
    with path.open("a") as file:
        file.write('{"stage": "cei')  # the machine stopped here
    assert lines.read(path)[1] == [{"stage": "ceilings", "case": "copy"}]
    path.write_text(path.read_text() + "\n{}\n")
    with pytest.raises(ValueError, match=f"{path.name}: line 3 is not JSON"):
        lines.read(path)
    path.write_text('{"format": 0}\n')
    with pytest.raises(ValueError, match="expected lines of format 1, got 0"):
        lines.read(path)


def test_what_triton_compiles_is_counted_and_what_was_cached_is_not(monkeypatch, capsys):
    monkeypatch.setattr(knobs.compilation, "listener", None)
    compiled = worker.Compiled()
    kernel, times = SimpleNamespace(name="statistics_kernel"), SimpleNamespace(total=1_500_000)
    for cache_hit in (False, True, False):
        arguments = dict(metadata={}, metadata_group={}, times=times, cache_hit=cache_hit)
        knobs.compilation.listener(src=kernel, **arguments)
    assert vars(compiled) == {"compiled": 2, "compile_seconds": 3.0}
    assert "statistics_kernel in 1.5 s" in capsys.readouterr().out


def test_counters_of_nsight_compute():
    head = '"ID","Kernel Name","gpu__time_duration.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","lts__throughput.avg.pct_of_peak_sustained_elapsed","dram__throughput.avg.pct_of_peak_sustained_elapsed","sm__inst_issued.avg.pct_of_peak_sustained_active","lts__throughput.max.pct_of_peak_sustained_elapsed","gpc__cycles_elapsed.avg.per_second"'  # noqa: E501
    text = f"""==PROF== Connected to process 1
{head}
"","","us","%","%","%","%","%","Ghz"
"0","statistics_kernel","5,012.30","91.20","70.10","20.00","33.00","742.00","1.59"
"1","combine_kernel(int)","97.00","","12.00","80.50","5.00","99.00",""
"""
    first, second = tools.read_counters(text)
    assert first == {
        "case": "statistics_kernel",
        "seconds": pytest.approx(5.0123e-3),
        "tensor_pipe": 91.2,
        "l2": 70.1,
        "dram": 20.0,
        "issue": 33.0,
        "clock": pytest.approx(1.59e9),
    }
    assert second["case"] == "combine_kernel" and second["tensor_pipe"] is None
