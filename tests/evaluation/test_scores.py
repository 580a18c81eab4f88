"""What the demo and `eval` measure, against hand counts and the model's own logits."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402
from peft import get_peft_model  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.data.prompts import Question, in_chat  # noqa: E402
from powerflow_fast.evaluation import scores  # noqa: E402
from powerflow_fast.evaluation.scores import (  # noqa: E402
    Sampling,
    _distinct_share,
    _ratio,
    complete,
    distinct_per_prompt,
    distinct_word_ngrams,
    evaluate,
    is_correct,
)
from powerflow_fast.models.sampling import sample  # noqa: E402
from tests.helpers import tiny  # noqa: E402


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
    assert distinct_word_ngrams(["a b a b"]) == pytest.approx(2 / 3)  # ab ba ab
    assert distinct_word_ngrams(["a", ""]) == 0.0
    assert distinct_per_prompt(["A.", "a", "b", "c"], samples=2).value == 1.5  # {a}, {b, c}
    openings = ["The rain falls.", "The rain stops!", "It is the rain", "the  rain"]
    assert distinct_per_prompt(openings, samples=4, first=2).value == 2
    assert distinct_per_prompt(openings, samples=4).value == 4


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
    sampling = Sampling(samples=3, max_new_tokens=4)
    first = evaluate(model, tokenizer, questions, sampling).scores.as_dict()
    assert first == evaluate(model, tokenizer, questions, sampling).scores.as_dict()
    assert 0 <= first["accuracy_sampled"] <= 1 and 1 <= first["distinct_answers"] <= 3
    opened = evaluate(model, tokenizer, [Question("rain")], sampling).scores
    assert opened.accuracy_sampled is None and opened.accuracy_greedy is None
    assert opened.as_dict()["standard_errors"] == {}  # of one prompt


def test_standard_errors():
    """Of a mean over prompts the usual one; of a change, of the paired differences."""
    right = torch.tensor([0, 3, 4, 1, 2])
    figure, later = _ratio(right, torch.tensor(4)), _ratio(right.flip(0), torch.tensor(4))
    shares = right.double() / 4
    assert figure.value == pytest.approx(0.5)
    assert figure.error == pytest.approx(float(shares.std() / 5**0.5))
    change, error = later.difference(figure)
    assert change == pytest.approx(0)
    assert error == pytest.approx(float((shares.flip(0) - shares).std() / 5**0.5))


def test_word_pairs_without_one_prompt():
    groups = [["a b c", "a b"], ["b c d"], ["x"]]
    figure = _distinct_share(groups)
    assert figure.value == distinct_word_ngrams([text for group in groups for text in group])
    for i, without in enumerate(figure.without.tolist()):
        rest = [text for j, group in enumerate(groups) for text in group if j != i]
        assert without == pytest.approx(distinct_word_ngrams(rest))


def test_the_base_is_measured_where_the_adapter_is_off_already():
    """Nested `disable_adapter` would switch it on again after the first batch."""
    model = get_peft_model(tiny.model(), tiny.lora()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1.0)
    sampling = Sampling(samples=2, max_new_tokens=5, batch_size=1)
    prompts = ["rain", "the sea is"]
    with model.disable_adapter():
        drawn = complete(model, tiny.tokenizer(), prompts, sampling)
    own = complete(tiny.model().eval(), tiny.tokenizer(), prompts, sampling)
    assert drawn.texts == own.texts and torch.equal(drawn.base_logps, own.base_logps)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [None, "chat"])
def test_prompts_are_token_for_token_those_of_training(tmp_path, bos, template, monkeypatch):

    tokenizer = tiny.tokenizer()
    if bos:
        tokenizer = tiny.with_bos(tokenizer)
    if template:
        tokenizer.chat_template = (
            "{% for m in messages %}the {{ m['content'] }} <eos> {% endfor %}"
            "{% if add_generation_prompt %}a b{% endif %}"
        )
    prompts = in_chat(tiny.PROMPTS, tokenizer)
    seen = []
    trainer = PowerFlowTrainer(
        model=tiny.model(),
        args=tiny.config(tmp_path, max_steps=1, per_device_train_batch_size=16),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=tiny.lora(),
    )
    made = trainer._tokenize_prompts
    monkeypatch.setattr(trainer, "_tokenize_prompts", lambda p: seen.append(made(p)) or seen[-1])
    trainer.train()
    trained = {tuple(row) for row in seen[0][0]}
    measured = []
    monkeypatch.setattr(
        scores,
        "sample",
        lambda model, ids, mask, **k: measured.append((ids, mask)) or sample(model, ids, mask, **k),
    )
    complete(tiny.model(), tokenizer, prompts, Sampling(samples=1, max_new_tokens=2))
    (ids, mask) = measured[0]
    rows = {tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True)}
    assert rows == trained and len(rows) == 4
    assert all((row[0] == 1) == (bos and not template) for row in rows)
