"""The table before and after a run, in a terminal and on a card, and the record that keeps it."""

import json
import re

import pytest
import torch

pytest.importorskip("transformers")

from powerflow_fast.data.prompts import Question  # noqa: E402
from powerflow_fast.evaluation.comparison import (  # noqa: E402
    as_markdown,
    as_text,
    compare,
    summary,
)
from powerflow_fast.evaluation.record import RunRecord  # noqa: E402
from powerflow_fast.evaluation.scores import (  # noqa: E402
    MEASURES,
    Completions,
    Evaluation,
    Figure,
    Scores,
)

QUESTIONS = [Question("Rain?", ("yes",)), Question("Sun?", ("no",)), Question("Snow?", ("no",))]


def evaluation(accuracy: float, texts: str) -> Evaluation:
    """One sample of each question; every figure but the accuracy is the same for all prompts."""
    same = Figure(0.5, torch.full((3,), 0.5, dtype=torch.float64))
    sampled = Figure(accuracy, torch.tensor([accuracy, accuracy + 0.1, accuracy - 0.1]).double())
    scores = Scores(sampled, None, same, same, same, same, same, samples=1)
    return Evaluation(scores, Completions(texts.split(), torch.ones(3), torch.zeros(3)))


def test_a_comparison_for_a_terminal_and_for_a_card():
    found = compare(QUESTIONS, evaluation(0.25, "no no no"), evaluation(0.5, "yes no yes"), 0.7)
    lines = as_text(found).splitlines()
    assert lines[0].split() == ["3", "held-out", "prompts", "before", "after", "change"]
    assert re.split("  +", lines[1]) == [
        "accuracy, sampled at T=0.7",
        "25.0 ± 11.5 %",
        "50.0 ± 11.5 %",
        "+25.0 ± 0.0 %",
    ]
    assert "accuracy, greedy" not in as_text(found)  # was not measured
    assert lines[7].startswith("(accuracy: an accepted answer") and len(lines[0]) == len(lines[1])
    assert lines[-3:] == ["Snow?", "  before:  no  (right)", "  after:   yes  (wrong)"]
    card = as_markdown(found)
    assert card.startswith("| 3 held-out prompts | before | after | change |\n| --- |")
    assert "One sample each" in card and card.endswith("after:   yes  (wrong)\n```")


def test_one_model_alone_has_its_own_likelihood_and_no_change():
    text = as_text(summary(3, evaluation(0.25, "a b c").scores, None, 1.0))
    assert "log-prob of its samples, nats/token" in text and "change" not in text


def test_plain_numbers_name_every_measure():
    before, after = evaluation(0.25, "a b c").scores, evaluation(0.5, "a b c").scores
    plain = before.as_dict()
    assert [*plain] == [*MEASURES, "samples", "standard_errors"]
    assert plain["accuracy_greedy"] is None and plain["accuracy_sampled"] == 0.25
    changes = after.changes(before)
    assert changes["accuracy_sampled"] == 0.25 and "accuracy_greedy" not in changes
    assert changes["standard_errors"]["mean_length"] == 0


def test_a_record_is_read_back_or_refused(tmp_path):
    record = RunRecord("m", 4.0, None, True, 3, 4, 16, 1.0, 1e-4, "length", "group", 0)
    record.held_out = compare(QUESTIONS, evaluation(0.2, "a b c"), evaluation(0.3, "a b c"), 1.0)
    assert RunRecord.load(tmp_path) is None
    record.save(tmp_path)
    again = RunRecord.load(tmp_path)
    assert again.card() == record.card() == (tmp_path / "README.md").read_text()
    (tmp_path / "run.json").write_text(json.dumps({"colour": "blue"}))
    with pytest.raises(ValueError, match="run.json: not a record of a run"):
        RunRecord.load(tmp_path)
