"""The evidence's runner: stages, resumption, and the page that comes from its results."""

import json
import multiprocessing

import pytest

from benchmarks import evidence, results_file
from benchmarks.evidence import page, runner
from tests.helpers import ranks, toy_experiment


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy as the only experiment, with files of its own."""
    monkeypatch.setattr(toy_experiment, "FOLDER", tmp_path)
    monkeypatch.setattr(runner, "module", lambda name: toy_experiment)
    monkeypatch.setattr(runner, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(results_file, "FOLDER", tmp_path / "results")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the runner sets it
    executed = tmp_path / "executed"
    return lambda: sorted(map(int, executed.read_text().split()))


@pytest.fixture
def forked(monkeypatch):
    """Workers are forked where they have imported torch: those that are spawned take seconds."""
    server = ranks.server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)


def written():
    (path,) = results_file.FOLDER.glob("evidence-toy-*.json")
    return json.loads(path.read_text())


def test_a_later_stage_depends_on_the_first(toy):
    lines = []
    runner.run_all(["toy"], workers=2, say=lines.append)
    assert toy() == [1, 2, 3, 20]
    assert written()["summary"] == {"final": -18}
    assert written()["runs"]["final"]["options"]["x"] == 20
    assert "4 of 4 runs, about 0 minutes left" in lines[-2] and "written to" in lines[-1]
    assert not runner.CACHE.exists()


def test_an_interrupted_run_goes_on_where_it_was(toy, forked, tmp_path):
    (tmp_path / "fail 20").touch()
    with pytest.raises(RuntimeError, match="run 20 failed"):
        runner.run_all(["toy"], workers=1, say=lambda line: None)
    (tmp_path / "fail 20").unlink()
    runner.run_all(["toy"], workers=1, say=lambda line: None)
    assert toy() == [1, 2, 3, 20, 20]


def test_runs_of_other_code_or_options_do_not_count(toy, monkeypatch):
    kept = runner.Kept("toy", "code")
    run = evidence.Run("search 1", {"x": 1})
    kept.add(run, {"result": {"score": 0}})
    assert runner.Kept("toy", "code").result_of(run) == {"score": 0}
    assert runner.Kept("toy", "other code").result_of(run) is None
    assert runner.Kept("toy", "code").result_of(evidence.Run("search 1", {"x": 2})) is None


def test_unknown_experiments_are_refused():
    with pytest.raises(ValueError, match="expected an experiment of .*, got 'nonsense'"):
        runner.module("nonsense")


def test_the_page_holds_tables_and_plots_of_the_results(toy, forked, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "module", lambda name: toy_experiment)
    monkeypatch.setattr(page, "EXPERIMENTS", ("toy", "never_run"))
    monkeypatch.setattr(page, "PAGE", tmp_path / "README.md")
    blocks = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in page.EXPERIMENTS)
    page.PAGE.write_text(blocks)
    runner.run_all(["toy"], workers=1, say=lambda line: None)
    files = page.files()
    text = files.pop(page.PAGE)
    assert "| final |\n| --- |\n| -18 |" in text and "4 runs, 0.0 CPU-minutes" in text
    assert "<!-- never_run -->\nNot run yet.\n<!-- /never_run -->" in text and "old" not in text
    ((path, drawn),) = files.items()
    assert path.name in text and drawn.startswith("<?xml")
    page.PAGE.write_text("no block")
    with pytest.raises(ValueError, match="expected a block <!-- toy -->"):
        page.files()
