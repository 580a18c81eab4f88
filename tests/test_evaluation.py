"""What the demo and `eval` measure, against hand counts and the model's own logits."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402

from powerflow_fast.evaluation import (  # noqa: E402
    Sampling,
    complete,
    distinct_ngrams,
    distinct_per_prompt,
    evaluate,
    is_correct,
)
from powerflow_fast.prompts import Question  # noqa: E402
from tests import tiny  # noqa: E402


@pytest.mark.parametrize(
    ("completion", "answers", "right"),
    [
        ("The capital is Paris.", ["Paris"], True),
        ("PARIS!", ["paris"], True),
        ("Parisian food", ["Paris"], False),
        ("It is 15", ["5"], False),
        ("It is 5.", ["7", "5"], True),
        ("New  Delhi, of course", ["New Delhi"], True),
        ("New, Delhi", ["New Delhi"], True),  # punctuation does not count
        ("Delhi New", ["New Delhi"], False),
        ("", ["5"], False),
        ("Bogotá", ["Bogota", "Bogotá"], True),
    ],
)
def test_correct_means_whole_words(completion, answers, right):
    assert is_correct(completion, answers) is right


def test_diversity_by_hand():
    assert distinct_ngrams(["a b a b"]) == pytest.approx(2 / 3)  # ab ba ab
    assert distinct_ngrams(["a", ""]) == 0.0
    assert distinct_per_prompt(["A.", "a", "b", "c"], samples=2) == 1.5  # {a}, {b, c}
    openings = ["The rain falls.", "The rain stops!", "It is the rain", "the  rain"]
    assert distinct_per_prompt(openings, samples=4, first=2) == 2
    assert distinct_per_prompt(openings, samples=4) == 4


def test_completions_and_their_likelihood_under_the_base():
    """Greedy text is the arg max of each step; base log-probs ignore the adapter; state is kept."""
    model = get_peft_model(tiny.model(), tiny.lora()).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    tokenizer = tiny.tokenizer()
    prompt = "the capital of France is"
    state = torch.get_rng_state()
    drawn = complete(model, tokenizer, [prompt, "rain"], Sampling(max_new_tokens=5), greedy=True)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    model.eval()
    for place, start in enumerate([prompt, "rain"]):
        ids = tokenizer(start)["input_ids"]
        new = []
        while len(new) < 5 and tiny.EOS not in new:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert drawn.texts[place] == tokenizer.decode(new, skip_special_tokens=True)
        with model.disable_adapter(), torch.no_grad():
            logits = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1]
        logp = float(logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum())
        assert drawn.lengths[place] == len(new)
        assert float(drawn.base_logps[place]) == pytest.approx(logp, abs=1e-5)


def test_samples_follow_the_models_distribution():
    """First-token frequencies of 4000 samples at T=1 against the softmax, 5 standard errors."""
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    sampling = Sampling(samples=4000, max_new_tokens=1, batch_size=1000)
    texts = complete(model, tokenizer, ["rain"], sampling).texts
    ids = torch.tensor([tokenizer("rain")["input_ids"]])
    expected = model(ids).logits[0, -1].double().softmax(-1)
    for word, probability in zip(tiny.WORDS.split(), expected.tolist(), strict=True):
        if not word.startswith("<"):
            error = (probability * (1 - probability) / 4000) ** 0.5
            assert abs(texts.count(word) / 4000 - probability) < 5 * error, word


def test_evaluate_is_repeatable_and_open_prompts_have_no_accuracy():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    questions = [Question("rain", ("sea",)), Question("the sea is", ("a",))]
    prompts = [q.prompt for q in questions]
    sampling = Sampling(samples=3, max_new_tokens=4)
    first = evaluate(model, tokenizer, questions, sampling, prompts)
    assert first == evaluate(model, tokenizer, questions, sampling, prompts)
    assert 0 <= first.accuracy_sampled <= 1 and 1 <= first.distinct_answers <= 3
    opened = evaluate(model, tokenizer, [Question("rain")], sampling, ["rain"])
    assert opened.accuracy_sampled is None and opened.accuracy_greedy is None
