import json

import pytest
import torch
from peft import get_peft_model

from benchmarks import plots
from benchmarks.evidence import language, length_bias, unequal_lengths
from benchmarks.evidence.energy import Energy, adapters_off, padded, token_logps
from powerflow_fast import tb_loss
from powerflow_fast.data.prompts import OPEN_PROMPTS, read_questions
from tests.helpers import tiny

PROMPTS = ["the capital of France is", "rain"]
COMPLETIONS = [[7, 1], [13, 14, 15, 1]]  # of different lengths, as are the prompts


def adapted():
    """(base model with adapter layers in it, tokenizer); the adapter is not zero."""
    base = tiny.model()
    policy = get_peft_model(base, tiny.lora())
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return policy, base, tiny.tokenizer()


def plain_logps(model, tokenizer, prompt, ids):
    """Log-probs of one completion, without padding, from the whole logits in float64."""
    asked = tokenizer(prompt)["input_ids"]
    logits = model(torch.tensor([asked + ids])).logits[0, len(asked) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(ids)), ids]


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reward_is_alpha_log_p_less_log_pi(reduction):
    policy, base, tokenizer = adapted()
    expected = []
    for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True):
        log_pi = plain_logps(policy, tokenizer, prompt, ids)
        with policy.disable_adapter():
            log_p = plain_logps(policy, tokenizer, prompt, ids)
        assert (log_pi - log_p).abs().max() > 1e-2  # the adapter matters
        expected.append(getattr(4 * log_p - log_pi, reduction)().item())
    reward = Energy(base, tokenizer, alpha=4.0, reduction=reduction)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-5)
    with policy.disable_adapter():
        log_p = [
            plain_logps(policy, tokenizer, *one) for one in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
    assert reward.log_p == [pytest.approx(torch.cat(log_p).mean().item(), rel=1e-5)]


def test_adapters_are_on_again_and_trainable_even_after_an_error():
    policy, base, tokenizer = adapted()
    rollout = padded(tokenizer, PROMPTS, COMPLETIONS)
    with torch.no_grad():
        before = token_logps(base, rollout)
        with pytest.raises(RuntimeError), adapters_off(base):
            assert not torch.allclose(token_logps(base, rollout), before)
            raise RuntimeError
        assert torch.equal(token_logps(base, rollout), before)
    assert all(p.requires_grad for name, p in policy.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("balance", ["trajectory", "token"])
def test_on_policy_gradient_of_tb_is_that_of_rl_for_the_same_energy(balance):
    """2 / S times the policy gradient with the group's mean as baseline: as the page says."""
    torch.manual_seed(0)
    logps = (-torch.rand(8, 5)).requires_grad_()
    reference, mask = -torch.rand(8, 5), torch.arange(5) < torch.tensor([[1, 3, 5, 4] * 2]).T
    common = dict(alpha=4.0, mask=mask, balance=balance)
    tb_loss(logps, reference, log_z="group", group_size=4, **common).loss.backward()
    reward = -tb_loss(logps.detach(), reference, log_z=0.0, **common).residual
    advantage = reward - reward.view(-1, 4).mean(1).repeat_interleave(4)
    policy_gradient = -(2 / 8) * advantage[:, None] * mask
    torch.testing.assert_close(logps.grad, policy_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["TB, token", "RL, token"])
def test_run_trains_and_leaves_the_base_as_it_was(monkeypatch, method):
    model, tokenizer = tiny.model(), tiny.tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(language, "base_model", lambda: (model, tokenizer))
    for name, value in {"steps": 2, "max_new_tokens": 4, "lora": None}.items():
        monkeypatch.setitem(length_bias.TRAINING, name, value)
    result = length_bias.run(method, seed=1)
    assert len(result["steps"]) == 2
    assert {*length_bias.PANELS, "repeated", "echoes"} <= result["steps"][0].keys()
    assert all(step["log_p"] < 0 for step in result["steps"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_plan_covers_every_method_and_seed_and_is_plain_json():
    runs = length_bias.plan({})
    assert len({run.name for run in runs}) == len(runs)
    listed = len(unequal_lengths.ALPHAS)
    assert all(run.options["method"] == "listed" for run in runs[:listed])
    wanted = {(m, s) for m in length_bias.METHODS for s in length_bias.SEEDS}
    assert {(run.options["method"], run.options["seed"]) for run in runs[listed:]} == wanted
    assert [run.options for run in runs] == json.loads(json.dumps([r.options for r in runs]))


def test_every_rollout_is_of_a_question_and_an_open_prompt():
    questions = {q.prompt for q in read_questions(split="train")}
    opened = {q.prompt for q in read_questions(OPEN_PROMPTS, "train")}
    assert len(length_bias.PROMPTS) == len(length_bias.SEEDS)
    for prompts in length_bias.PROMPTS:
        assert length_bias.TRAINING["prompts_per_step"] == len(prompts) == len(length_bias.KINDS)
        assert prompts[0] in questions and prompts[1] in opened


def test_the_minimum_of_each_form_where_sequences_are_listed(monkeypatch):
    """The trajectory form grows short at alpha > 1, the token form long, LA-TB keeps its length."""
    for name, value in {"LONGEST": 5, "MODELS": 2}.items():
        monkeypatch.setattr(unequal_lengths, name, value)
    found = length_bias.run("listed", alpha=4.0)
    assert all(found[form]["tv"] < 1e-6 for form in unequal_lengths.FORMS)
    for base, short, long, kept in zip(
        found["base"], *(found[form]["length"] for form in unequal_lengths.FORMS), strict=True
    ):
        assert short < 0.8 * base and long > 1.3 * base and abs(kept / base - 1) < 0.35


def made_up(lengths):
    line = {
        "length_open": 30.0,
        "log_p": -2.0,
        "distinct_4grams": 0.5,
        "repeated": 0.25,
        "echoes": 0.75,
        "accuracy": 0.125,
    }
    return {"steps": [{"length_question": float(n), **line} for n in lengths]}


DONE = {
    "LA-TB, seed 0": made_up([20, 20, 20, 20, 18, 16]),
    "LA-TB, seed 1": made_up([22, 22, 20, 20, 20, 20]),
    "TB, trajectory, seed 1": made_up([20, 18, 9, 8, 3, 1]),
    "listed, alpha 2": {
        "base": [2.0, 3.0],
        "trajectory": {"length": [1.0, 1.0], "tv": 1e-9},
        "token": {"length": [7.0, 8.0], "tv": 2e-9},
        "length": {"length": [2.0, 2.5], "tv": 3e-9},
    },
}


def test_summary_compares_first_and_last_third_per_seed():
    summary = length_bias.summarise(DONE)
    methods = summary["methods"]
    assert list(methods) == ["TB, trajectory", "LA-TB"]  # what is done, in the order of METHODS
    assert methods["LA-TB"]["length_question"] == {"start": [20.0, 22.0], "end": [17.0, 20.0]}
    assert methods["TB, trajectory"]["length_question"] == {"start": [19.0], "end": [2.0]}
    assert summary["listed"] == {"2": DONE["listed, alpha 2"]}


def test_table_and_plot_from_results_alone():
    runs = {name: {"result": result, "options": {}} for name, result in DONE.items()}
    results = json.loads(json.dumps({"summary": length_bias.summarise(DONE), "runs": runs}))
    text = length_bias.tables(results)
    assert "| LA-TB | 21 -> 18 ± 2 | 30 -> 30 ± 0 | 50 % -> 50 % ± 0 % |" in text
    assert "| -2.00 -> -2.00 ± 0.00 | 12 % -> 12 % ± 0 % |" in text
    assert "| TB, trajectory | 19 -> 2 | 30 -> 30 |" in text  # of one seed
    assert "| mean length, limit 8 | alpha 2 |" in text and "| TB, token | 7.5 |" in text
    assert "at most 3e-09, over 4 models, 1 alphas and 3 forms" in text
    drawn = [plots.svg(lambda figure: length_bias.draw(figure, results)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert "TB, trajectory" in drawn[0] and "RL, token" not in drawn[0]


def test_smooth_is_the_mean_of_the_last_values():
    assert length_bias.smooth([3.0, 6.0, 9.0, 0.0]) == [3.0, 4.5, 6.0, 5.0]


def test_within_counts_by_kind_of_prompt():
    within = length_bias.Within({"<user>What?": "What now?", "<user>Rain.": "Rain."}, ("four",))
    prompts = ["<user>What?"] * 2 + ["<user>Rain."] * 2
    texts = ["What is it? It is four.", "Five.", "It rains.", "Rain. Or four."]
    ids = [[1, 2, 3, 4, 1, 2, 3, 4], [5, 6], [7], [8, 9, 10]]  # 4 of 5 4-grams are distinct
    assert within(prompts, texts, ids) == [0.0] * 4
    (line,) = within.steps
    assert line["distinct_4grams"] == 0.8 and line["accuracy"] == 0.5
    assert line["length_question"] == 5 and line["length_open"] == 2
    assert (line["sample_question"], line["sample_open"]) == (texts[0], texts[2])
    assert line["echoes"] == 0.25  # the last repeats "Rain."
