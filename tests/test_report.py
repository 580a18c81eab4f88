"""The README's figures are those of the results files."""

import json

import pytest

from benchmarks import report, results_file


def test_readme_is_what_the_results_say():
    text = report.README.read_text(encoding="utf-8")
    assert report.render(text) == text, "run `make report`"


def test_results_of_another_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    path = results_file.write("head", {"rows": []})
    assert results_file.load("head")[0]["rows"] == []
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(ValueError, match=f"{path.name}: expected results format 2, got 0"):
        results_file.load("head")
    with pytest.raises(ValueError, match="README.md: expected a block <!-- head -->"):
        report.render("no block here")
