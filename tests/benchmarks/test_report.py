"""The pages' figures and the plots are those of the results files."""

import json
import re

import pytest

from benchmarks import markdown, plots, report, results_file, whole_step_tables
from benchmarks.whole_step import OURS, PHASES, TRL


def test_pages_and_plots_are_what_the_results_say():
    wanted = report.files()
    for path, text in wanted.items():
        assert report.is_current(path, text), f"{path.name}: run `make report`"
    assert set(results_file.FOLDER.glob("*.svg")) <= set(wanted), "run `make report`"


def test_plots_of_two_machines_are_told_from_plots_of_two_results():
    text = plots.svg(lambda figure: figure.subplots().plot([1, 2], [3, 4]))
    nudged = re.sub(r"\d+\.\d{6}", lambda found: f"{float(found[0]) + 1e-6:.6f}", text)
    assert nudged != text and plots.same(text, nudged)
    assert not plots.same(text, plots.svg(lambda figure: figure.subplots().plot([1, 2], [3, 5])))
    assert not plots.same(text, text.replace("<g", "<h", 1))


def test_what_changed_is_said(tmp_path, monkeypatch, capsys):
    page, same, stale = tmp_path / "page.md", tmp_path / "same.md", tmp_path / "gone.svg"
    for path in (page, same, stale):
        path.write_text("old")
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    monkeypatch.setattr(report, "files", lambda: {page: "new", same: "old"})
    report.main()
    assert capsys.readouterr().out.splitlines() == [
        "removed gone.svg: no results stand behind it",
        "changed page.md",
    ]
    assert page.read_text() == "new" and not stale.exists()
    report.main()
    assert capsys.readouterr().out == (
        "nothing changed: 2 pages and plots agree with benchmarks/results/\n"
    )


def test_a_terminal_shows_a_table_in_columns():
    text = markdown.table(("one long title", "b"), [("**x**", "12345"), ("y", "`1`")])
    assert markdown.plain(text).splitlines() == [
        "one long   b",
        "title",
        "---------  -----",
        "x          12345",
        "y          1",
    ]
    lines = markdown.plain("word " * 30).splitlines()
    assert [len(line) for line in lines] == [99, 49]


def test_results_of_another_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    path = results_file.write("head", {"rows": []})
    assert results_file.load("head")[0]["rows"] == []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match=f"{path.name}: expected results format 2, got 0"):
        results_file.load("head")
    page = tmp_path / "README.md"
    page.write_text("no block here")
    monkeypatch.setattr(report, "TABLES", {page: {"head": report.every_table}})
    with pytest.raises(ValueError, match="README.md: expected a block <!-- head -->"):
        report.render(page)


def head_results() -> dict:
    """A results file with every kind of row."""
    common = {"peer": "powerflow-fast", "setting": "", "dtype": "float32", "source": "random"}
    common |= {"seconds": 2.0, "seconds_min": 1.5, "seconds_iqr": 0.1, "rounds": 5, "axis": None}
    head = {"ratio_to_floor": 1.6, "floor_seconds": 1.25, "extra_bytes": 10**7, "error": 3e-7}
    head |= {"floor_flops": 10**12, "floor_bytes": 10**9, "shape_name": "small"}
    shape = {"n": 64, "h": 8, "v": 32, "length": 8}
    naive = {"peer": "naive PyTorch", "seconds": 1.0, "rounds": 1, "seconds_iqr": None}
    rows = [
        {**common, **head, "group": group, "shape": shape, **peer}
        for group in ("tb-frozen", "forward")
        for peer in ({}, naive)
    ]
    for factor in (1, 2):
        size = {"shape": shape | {"n": 64 * factor}, "shape_name": f"tokens_x{factor}"}
        scaled = {"group": "scaling", "axis": "tokens", "seconds": 2.0 * factor}
        rows.append(common | head | size | scaled)
    step = {"model": "1B shape", "tokens": 256, "tokens_per_second": 128.0, "peak_bytes": 10**9}
    rows.append({**common, **step, "group": "training-step"})
    cut = {"grad_tolerance": 1e-3, "entropy": 0.5, "exact_seconds": 4.0, "columns_kept": 0.02}
    cut |= {"products_seconds": 2.0, "skipped_mass": 9e-4, "shape": shape}
    cut |= {"extra_bytes": 12 * 10**7, "exact_extra_bytes": 5 * 10**8}  # on a GPU
    rows.append({**common, **cut, "group": "certified"})
    ceilings = {"float32": {"flops": 1e12, "bandwidth": 1e10}}
    unavailable = {"tb-frozen: verl": "its Triton kernel needs a GPU"}
    return {"rows": rows, "ceilings": ceilings, "unavailable": unavailable, "dropped": ["one"]}


def test_tables_and_plots_of_every_group(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    results_file.write("head", head_results())
    text = report.every_table()
    for line in (
        "| float32, N=64, H=8, V=32 | one step | over the floor (1.25 s) | extra memory "
        "| gradient error |",
        "| naive PyTorch | 1.00 s (one run) | 1.60x | 10 MB | 3e-07 |",
        "| **powerflow-fast** | 2.00 s (5 runs, IQR 5 %) | 1.60x | 10 MB | 3e-07 |",
        "| **powerflow-fast** | 2.00 s (1.60x) | 2.00 s (1.60x) |",
        "| **powerflow-fast** | 2.00 s (5 runs, IQR 5 %) | 128 | 1.00 GB |",
        "| 0.50 nats (random) | 1e-03 | 2.00x | 0.50x | 2.0 % | 9e-04 | 500 MB, 120 MB |",
        "| tokens: **powerflow-fast** | 2.00 s | 4.00 s | 1.00 | 10, 10 MB | 0.00 |",
        "Not measured here: verl (its Triton kernel needs a GPU).",
        "Dropped for lack of time: 1 cases",
    ):
        assert line in text
    (results,) = results_file.load("head")
    assert [name.partition("-")[0] for name in plots.names(results)] == list(plots.TITLES)
    for name in plots.names(results):
        drawn = plots.draw(name, results)
        assert drawn == plots.draw(name, results) and "</svg>" in drawn
        assert f"(results/{name})" in text
    short = report.step_tables()
    assert "| naive PyTorch | 1.00 s (one run) | 1.60x | 10 MB | 3e-07 |" in short
    assert "| **powerflow-fast** | 2.00 s (5 runs, IQR 5 %) | 128 | 1.00 GB |" in short
    assert "(benchmarks/results/tokens-" in short and "nats" not in short
    results["rows"], results["ceilings"] = results["rows"][:2], {}
    assert plots.names(results) == []  # no plot without data


def whole_step_results() -> dict:
    """A results file of whole steps: both trainers at the anchor, ours at another size."""
    common = {"model": "SmolLM2", "sampler": "transformers", "group": 8}
    rows = []
    for trainer, prompt, seconds in ((OURS, 256, 3.0), (TRL, 256, 6.0), (OURS, 64, 1.0)):
        size = {"prompt": prompt, "completion": 64, "tokens": 8 * (prompt + 64)}
        shares = {"sampling": 0.5, "update": 0.4, "rest": 0.1}
        phases = {name: [share * seconds] * 2 for name, share in shares.items()}
        figures = {"seconds": [seconds] * 2, "phases": phases, "peak_bytes": seconds * 1e9}
        rows.append(common | size | figures | {"trainer": trainer})
    rows.append(rows[1] | {"sampler": "vLLM"})
    return {"rows": rows, "unavailable": {"whole-step: Unsloth": "it needs a GPU"}}


def test_whole_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    assert report.whole_steps() == report.short_whole_steps() == ""
    results_file.write("whole-step", whole_step_results() | {"dropped": ["one"]})
    text, short = report.whole_steps(), report.short_whole_steps()
    ours = "**powerflow-fast** | 20.00 (2) | 853 | 1.50 s (50 %) | 1.20 s (40 %) | 0.30 s (10 %) "
    assert f"| 256 + 8 x 64 tokens | {ours}| 3.00 GB |" in text
    assert "| 256 + 8 x 64 tokens | GRPOTrainer | 10.00 (2) | 427 |" in text
    assert "| 64 + 8 x 64 tokens | **powerflow-fast** | 60.00 (2) |" in text
    assert "| SmolLM2, sampled by vLLM | trainer |" in text
    assert "Not measured here: Unsloth (it needs a GPU)." in text
    assert "Dropped for lack of time: 1 cases" in text
    assert "| **powerflow-fast** | transformers | 20.00 (2) |" in short
    assert "| GRPOTrainer | vLLM | 10.00 (2) |" in short and "60.00" not in short
    (results,) = results_file.load("whole-step")
    name, drawn = whole_step_tables.plot_name(results), whole_step_tables.draw(results)
    assert f"(results/{name})" in text and results_file.FOLDER / name in report.files()
    assert drawn == whole_step_tables.draw(results)
    for shown in ("64 + 8 x 64 tokens", "256 + 8 x 64 tokens", "vLLM", *PHASES):
        assert shown in drawn
