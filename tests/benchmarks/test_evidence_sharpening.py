"""Sharpening: its stages, the rivals' rewards, the answers read from completions, its tables."""

import math
import sys
import types

import pytest
import torch

from benchmarks import plots
from benchmarks.evidence import language, rivals, sharpening, tasks, training_free
from powerflow_fast.data.prompts import Question
from tests.helpers import tiny

PROMPTS = ["a"] * 4 + ["b"] * 4
TEXTS = [" 7, and", " 7.\n", " 8", "\n\n", " Paris.\n", " New Delhi", " New York", " Paris is"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" Paris.\n", "paris"),
        (" 7, and", "7"),
        (" 10", "10"),
        (" New Delhi,", "new delhi"),
        (" Rome and", "rome"),
        (" the city Oslo", "oslo"),
        (" the capital of", "the"),
        (" Port-au-Prince", "port au prince"),
        (" \n\n", ""),
    ],
)
def test_what_a_completion_answers(completion, answer):
    assert language.answer_of(completion) == answer


def test_the_majority_ignores_completions_that_say_nothing():
    assert language.majority(["", "", "", "a", "b", "b"]) == "b"
    assert language.majority(["b", "a"]) == "b"
    assert language.majority(["", ""]) == ""


def test_rewards_on_groups_that_are_not_contiguous():
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    prompts, texts = [PROMPTS[i] for i in order], [TEXTS[i] for i in order]
    assert rivals.majority_vote(prompts, texts) == [1, 1, 1, 0, 0, 0, 0, 1]
    assert rivals.semantic_entropy(prompts, texts) == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.5]
    assert rivals.TrueAnswer({"a": ("8",), "b": ("Paris",)})(prompts, texts) == [
        *(0, 1, 0, 0, 1, 0, 0, 1)
    ]


def test_nobody_is_rewarded_where_no_completion_answers():
    assert rivals.majority_vote(["a", "a"], ["\n", "  "]) == [0, 0]
    assert rivals.semantic_entropy(["a", "a"], ["\n", "  "]) == [0.5, 0.5]


def test_self_certainty_is_the_divergence_from_uniform():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts, completions = ["rain", "the capital of France is"], [[7, 3], [4]]
    expected = []
    for prompt, ids in zip(prompts, completions, strict=True):
        start = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([start + ids])).logits[0, len(start) - 1 : -1]
        p = logits.softmax(-1)
        uniform = torch.full_like(p, 1 / p.shape[-1])
        expected.append(float((uniform * (uniform / p).log()).sum(-1).mean()))
    reward = rivals.SelfCertainty(model, tokenizer, rows=2)
    assert reward(prompts, completions) == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.01


def test_self_certainty_follows_the_adapter_that_is_trained():
    from peft import get_peft_model

    model, tokenizer = tiny.model(), tiny.tokenizer()
    reward = rivals.SelfCertainty(model, tokenizer)
    before = reward(["rain"], [[7, 3]])
    adapted = get_peft_model(model, tiny.lora())
    assert reward(["rain"], [[7, 3]]) == pytest.approx(before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert reward(["rain"], [[7, 3]]) != pytest.approx(before, rel=1e-2)


def test_samples_read_a_prompt_once_and_follow_the_model():
    """Shares of 4000 samples are the model's own probabilities; padding changes nothing."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts, count = ["rain", "the capital of France is"], 4000
    state = torch.get_rng_state()
    drawn = language.sample(model, tokenizer, prompts, count, 2, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert len(drawn.texts) == len(drawn.logps) == 2 * count and 1 <= drawn.lengths.mean() <= 2
    for i, prompt in enumerate(prompts):
        start = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            first = model(torch.tensor([start])).logits[0, -1].softmax(-1)
            token = int(first.argmax())
            second = model(torch.tensor([[*start, token]])).logits[0, -1].softmax(-1)
        best = tokenizer.decode([token, int(second.argmax())], skip_special_tokens=True)
        assert drawn.greedy[i] == best
        places = [j for j in range(i * count, (i + 1) * count) if drawn.texts[j] == best]
        share = len(places) / count
        expected = float(first[token] * second.max())
        assert drawn.logps[places].exp().tolist() == pytest.approx([expected] * len(places))
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / count))


def test_weighted_samples_have_the_accuracy_of_the_power(monkeypatch):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    monkeypatch.setattr(language, "base_model", lambda: (model, tokenizer))
    questions = [Question("rain", ("sea",), "heldout"), Question("the sea", ("Paris",), "heldout")]
    for alpha in (1.0, 2.0, 4.0):
        expected = []
        for question in questions:
            with torch.no_grad():
                ids = torch.tensor([tokenizer(question.prompt)["input_ids"]])
                power = (alpha * model(ids).logits[0, -1].log_softmax(-1)).softmax(-1)
            expected.append(float(power[tokenizer.convert_tokens_to_ids(question.answers[0])]))
        found = language.power_accuracy(
            model, questions, alpha, samples=4000, max_new_tokens=1, seed=0
        )
        assert found == pytest.approx(sum(expected) / 2, abs=0.02)


@pytest.fixture
def gym(monkeypatch):
    """A stand-in for reasoning-gym, which the tests do without: three items and their traps."""
    items = [("3 - 9", "-6"), ("9 - 3", "6"), ("9 + 3", "12"), ("9 - 3", "6"), ("5 - 4", "1")]
    made = [{"metadata": {"expression": e}, "answer": a} for e, a in items]
    module = types.SimpleNamespace(create_dataset=lambda name, **options: made)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)


def test_generated_questions_are_statements_without_repeats(gym):
    found = tasks.task("differences")
    (first,) = found.held_out
    assert (first.prompt, first.answers) == ("The result of 9 - 3 is", ("6",))
    assert [q.prompt for q in found.train] == ["The result of 5 - 4 is"]


def test_reasoning_gym_itself():
    pytest.importorskip("reasoning_gym", reason="in the extra `evidence` only")
    for name, operator in (("products", "*"), ("differences", "-")):
        found = tasks.task(name)
        assert len(found.held_out) >= sharpening.QUESTIONS
        assert not {q.prompt for q in found.train} & {q.prompt for q in found.held_out}
        for question in (*found.train, *found.held_out):
            a, b = question.prompt.split(f" {operator} ")
            a, b = int(a[-1]), int(b[0])
            assert question.answers == (str(a * b if operator == "*" else a - b),)


@pytest.mark.parametrize("name", ["capitals", "sums"])
def test_every_third_own_question_is_held_out(name):
    found = tasks.task(name)
    assert len(found.held_out) >= sharpening.QUESTIONS
    assert 0 <= len(found.train) - 2 * len(found.held_out) + 2 <= 2
    assert not {q.prompt for q in found.train} & {q.prompt for q in found.held_out}


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="name: expected a task of .*, got 'riddles'"):
        tasks.task("riddles")


def test_every_step_has_one_prompt_of_every_task(gym):
    chosen = [tasks.task(name) for name in ("capitals", "sums")]
    questions = sharpening.mixed(chosen, seed=3, steps=4)
    assert questions == sharpening.mixed(chosen, seed=3, steps=4)
    assert questions != sharpening.mixed(chosen, seed=4, steps=4)
    for i in range(4):
        assert questions[2 * i] in chosen[0].train and questions[2 * i + 1] in chosen[1].train
    assert len({q.prompt for q in questions}) == 8


def searched(method, scores):
    """Results of search runs with these accuracies on training questions, 0.1 apart over tasks."""
    places = [-0.15, -0.05, 0.05, 0.15]
    return {
        f"search {method} {rate:g}": {
            "train": {
                name: {"sampled": score + place}
                for name, place in zip(sharpening.TASKS, places, strict=True)
            }
        }
        for rate, score in zip(sharpening.LEARNING_RATES, scores, strict=True)
    }


def test_seeds_wait_for_their_methods_search():
    first = sharpening.plan({})
    searches = [run for run in first if run.name.startswith("search")]
    rates = len(sharpening.LEARNING_RATES)
    assert len(searches) == rates * len(sharpening.SEARCHED)
    unsearched = [*sharpening.UNTRAINED, sharpening.SHIPPED]
    assert len(first) == len(searches) + len(unsearched) * len(sharpening.SEEDS)
    assert {r.options["learning_rate"] for r in first if "shipped" in r.name} == {None}
    assert {run.options["seed"] for run in searches}.isdisjoint(sharpening.SEEDS)
    assert {run.options["split"] for run in searches} == {"train"}
    half = searched("ttrl", [0.2] * rates)
    half.popitem()
    assert sharpening.plan(half) == first
    later = sharpening.plan(searched("ttrl", [0.2] * (rates - 1) + [0.3]))
    new = [run for run in later if run not in first]
    assert [run.name for run in new] == [f"ttrl {seed}" for seed in sharpening.SEEDS]
    assert {run.options["learning_rate"] for run in new} == {sharpening.LEARNING_RATES[-1]}


def test_of_equal_learning_rates_the_lowest_is_taken():
    assert sharpening.best({1e-3: 0.5, 3e-4: 0.5}) == 3e-4
    assert sharpening.best({1e-3: 0.6, 3e-4: 0.5}) == 1e-3
    assert sharpening.best({}) is None


@pytest.fixture
def results():
    def held_out(value):
        return {t: dict.fromkeys(sharpening.MEASURES, value) for t in sharpening.TASKS}

    done = {}
    for seed in sharpening.SEEDS:
        done[f"base {seed}"] = {"held_out": held_out(0.20 + 0.01 * seed)}
        powers = dict.fromkeys(sharpening.TARGETS, 0.6) | {"2": 0.4 + 0.01 * seed}
        done[f"target {seed}"] = {"held_out": dict.fromkeys(sharpening.TASKS, powers)}
        free = {
            label: {"accuracy": 0.3 + 0.1 * seed, "tokens": 3.0, "seconds": 0.01}
            for label in training_free.LABELS
        }
        for label in training_free.POWER:
            free[label]["seconds"] = 0.51
        for method in training_free.METHODS:
            done[f"{method} {seed}"] = {"held_out": dict.fromkeys(sharpening.TASKS, free)}
    for i, method in enumerate(sharpening.METHODS):
        if method in sharpening.SEARCHED:
            done |= searched(method, [0.25, 0.5, 0.4])
        for seed in sharpening.SEEDS:
            steps = [{"accuracy": 0.2 + 0.1 * s, "seconds": 5.0 * s} for s in range(3)]
            value = held_out(0.5 + 0.01 * i + 0.01 * seed)
            done[f"{method} {seed}"] = {"held_out": value, "steps": steps, "seconds": 15.0 + seed}
    return {"summary": sharpening.summarise(done)}


def test_summary_pairs_every_seed_with_the_base(results):
    summary = results["summary"]
    for i, method in enumerate(sharpening.METHODS):
        gains = summary[method]["gain_sampled"]
        assert set(gains) == {*sharpening.TASKS, "mean"}
        assert gains["sums"] == pytest.approx([0.3 + 0.01 * i] * 5)
        searched = method in sharpening.SEARCHED
        rate = sharpening.LEARNING_RATES[1] if searched else None
        assert summary[method]["learning_rate"] == rate


def test_tables_and_plot_come_from_the_summary(results):
    text = sharpening.tables(results)
    assert "| PowerFlow, alpha 2 | 53 ± 2 (+31 ± 0) |" in text
    assert "| base model | 22 ± 2 |" in text
    assert "| p^2, where PowerFlow goes | 42 ± 2 (+20 ± 0) |" in text
    assert "| p^4, where PowerFlow goes | 60 ± 0 (+38 ± 2) |" in text
    assert "| 0.001 | 25 / 50 / 40 | 17 ± 2 |" in text
    assert "| default |  | 17 ± 2 |" in text
    assert "| best of 64 | 50 ± 16 | 3 | 10 | 0 |" in text
    assert "| PowerFlow, alpha 4 | 54 ± 2 | 3 | 10 | 17 |" in text
    assert "is that of 34 answers against power 4 x 4 and 34 answers against power 8 x 8." in text
    short = sharpening.accuracy_table(results, alphas=("4",))
    assert "alpha 4" in short and "alpha 2" not in short and "p^2" not in short
    assert "| alpha 2 | +20 | +31 | 11 | " in text and "| all | +" in text
    drawn = plots.svg(lambda figure: sharpening.draw(figure, results))
    assert all(label in drawn for label in sharpening.LABELS.values())


def test_of_the_base_by_what_an_answer_costs(monkeypatch):
    """The likeliest and the most frequent of every n samples; a question counts each group."""
    monkeypatch.setattr(training_free, "base_model", lambda: (None, None))
    monkeypatch.setattr(training_free, "COUNTS", (2, 4))
    monkeypatch.setattr(training_free, "DRAWN", 4)
    texts = [" 7", " 8", " 8", " 8 and", " Rome", " Paris", "", " Rome"]
    logps = torch.tensor([-1.0, -2.0, -3.0, -2.0, -2.0, -1.0, -5.0, -9.0])
    drawn = language.Samples(texts, logps, torch.ones(8), ["", ""])
    monkeypatch.setattr(training_free, "sample", lambda *_: drawn)
    questions = [Question("a", ("8",)), Question("b", ("Rome",))]
    found = training_free.run(training_free.VOTES, questions, 3, seed=0)
    accuracy = {label: figures["accuracy"] for label, figures in found.items()}
    assert accuracy == {
        "one sample": 5 / 8,
        "best of 2": 1 / 4,  # 7, "8 and", Paris, ""
        "best of 4": 0,  # 7, Paris
        "majority of 2": 3 / 4,  # 7 (of two, the first), 8, Rome, Rome
        "majority of 4": 1,
    }
    assert found["best of 4"]["tokens"] == 12
