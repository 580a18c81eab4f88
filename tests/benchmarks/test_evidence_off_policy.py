"""Rollouts drawn ahead: the sampler, a run of each kind, the summary, tables and plot."""

import statistics

import pytest
import torch

from benchmarks import plots, results_file
from benchmarks.evidence import language, off_policy, sharpening
from benchmarks.evidence.tasks import TASKS, Task
from powerflow_fast.data.prompts import Question
from tests.helpers import tiny

pytest.importorskip("trl")

from peft import get_peft_model  # noqa: E402

from benchmarks.evidence.in_process import InProcess  # noqa: E402
from tests.training.test_trainer import make, naive_sum  # noqa: E402

GAP = "sampling/sampling_logp_difference/max"


def test_plan_has_every_setting_and_the_base_on_every_seed():
    runs = off_policy.plan({})
    wanted = {(s, seed) for s in ("base", *off_policy.SETTINGS) for seed in off_policy.SEEDS}
    assert {(run.options["setting"], run.options["seed"]) for run in runs} == wanted
    assert len({run.name for run in runs}) == len(runs) == len(wanted)
    ahead = [options.get("rollout_ahead", 0) for options in off_policy.SETTINGS.values()]
    assert {0, 1, 2, 4, 8} <= set(ahead)


def test_learning_rate_is_the_one_that_sharpening_chose():
    for results in results_file.load("evidence-sharpening"):
        chosen = results["summary"][f"powerflow-{off_policy.ALPHA:g}"]["learning_rate"]
        assert chosen == off_policy.LEARNING_RATE


class Recorded(InProcess):
    """Keeps what was drawn, by rollout, with the sum of log-probs that the policy itself gives."""

    def __init__(self):
        super().__init__()
        self.steps, self.tokens, self.logps, self.naive = [], [], [], []

    def draw(self, prompt_ids, seeds, trainer):
        state = torch.get_rng_state()
        futures = super().draw(prompt_ids, seeds, trainer)
        assert torch.equal(state, torch.get_rng_state())
        answers = [future.result() for future in futures]
        model = get_peft_model(tiny.model(), tiny.lora())  # TRL has patched the trainer's forward
        model.load_state_dict(trainer.model.state_dict())
        model.double().eval()
        with torch.no_grad():
            rows = zip(prompt_ids, [answer["token_ids"] for answer in answers], strict=True)
            sums = [float(naive_sum(model, *row, trainer.temperature)) for row in rows]
        self.steps.append(trainer.state.global_step)
        self.tokens.append([answer["token_ids"] for answer in answers])
        self.logps.append([sum(answer["logprobs"]) for answer in answers])
        self.naive.append(sums)
        return futures


def trained_with(folder, ahead, **options):
    sampler = Recorded()
    defaults = dict(max_steps=5, learning_rate=0.05, temperature=0.7, rollout_ahead=ahead)
    trainer, seen = make(folder, rollout=sampler, **defaults | options)
    trainer.train()
    return sampler, seen.logs


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_rollout_is_drawn_when_asked_for_and_scored_by_what_drew_it(tmp_path, ahead):
    sampler, logs = trained_with(tmp_path, ahead)
    assert sampler.steps == [max(step - ahead, 0) for step in range(5)]
    assert [log["sampling/staleness"] for log in logs] == [min(step, ahead) for step in range(5)]
    assert all(log[GAP] < 1e-4 for log in logs)
    for logps, naive in zip(sampler.logps, sampler.naive, strict=True):
        assert logps == pytest.approx(naive, abs=1e-4)
    assert ("sampling/drift/mean" in logs[-1]) == (ahead > 0)
    assert not sampler.kept and not sampler.asked  # closed at the end
    for completion in sum(sampler.tokens, []):
        assert 1 <= len(completion) <= 6 and tiny.EOS not in completion[:-1]


def test_runs_that_differ_in_age_alone_share_their_random_numbers(tmp_path):
    """What the untrained policy draws for a rollout is the same however far ahead it is drawn."""
    one, _ = trained_with(tmp_path / "one", 1, max_steps=3)
    two, _ = trained_with(tmp_path / "two", 2, max_steps=3)
    assert one.tokens[:2] == two.tokens[:2] and one.tokens[2] != two.tokens[2]
    again, _ = trained_with(tmp_path / "again", 2, max_steps=3)
    assert again.tokens == two.tokens and again.logps == two.logps


def test_only_adapters_that_are_waited_for_are_kept(tmp_path):
    kept = []

    class Counted(InProcess):
        def retire(self, needed):
            super().retire(needed)
            kept.append(sorted(self.kept))

    trainer, _ = make(tmp_path, rollout=Counted(), rollout_ahead=2, max_steps=6, learning_rate=0.05)
    trainer.train()
    assert max(map(len, kept)) <= 4 and kept[0] == ["update 0"]
    assert all(f"update {step}" in names for step, names in enumerate(kept))


@pytest.fixture
def toy(monkeypatch):
    """SmolLM2 and its tasks as the tiny model, four prompts, and adapters on all of its layers."""
    model, tokenizer = tiny.model(), tiny.tokenizer()
    for module in (language, sharpening):
        monkeypatch.setattr(module, "base_model", lambda: (model, tokenizer))
    monkeypatch.setattr(sharpening, "UPPER", {"r": 4})
    monkeypatch.setattr(sharpening, "QUESTIONS", 2)
    questions = tuple(Question(prompt, ("Paris",)) for prompt in tiny.PROMPTS)
    monkeypatch.setattr(off_policy, "task", lambda name: Task(name, questions, questions))
    monkeypatch.setattr(sharpening, "task", off_policy.task)
    return model, tokenizer


def test_a_run_of_every_kind(toy):
    base = off_policy.run("base", seed=0)
    assert set(base["held_out"]) == set(TASKS)
    rate, off_policy.LEARNING_RATE = off_policy.LEARNING_RATE, 0.02
    try:
        found = off_policy.run("2 ahead", seed=0, steps=4)
    finally:
        off_policy.LEARNING_RATE = rate
    assert set(found["curves"]) == set(off_policy.CURVES)
    assert found["curves"]["staleness"] == [0, 1, 2, 2]
    assert max(found["curves"]["gap"]) < 1e-4
    assert found["curves"]["drift"][0] == 0 and min(found["curves"]["drift"][1:]) > 0
    assert found["kl_at_the_end"] > 1e-4 and len(found["accuracy"]) == 4
    assert off_policy.run("base", seed=0) == base  # the adapter is off again


def test_kl_is_that_of_the_whole_vocabulary(toy):
    model, tokenizer = toy
    adapted = get_peft_model(model, tiny.lora())
    assert off_policy.kl_to_base(adapted, tiny.PROMPTS, 3, seed=0) == pytest.approx(0, abs=1e-5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = []
    for prompt in tiny.PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            policy = adapted(ids).logits[0, -1].double().log_softmax(-1)
            with adapted.disable_adapter():
                base = adapted(ids).logits[0, -1].double().log_softmax(-1)
        expected.append(float((policy.exp() * (policy - base)).sum()))
    found = off_policy.kl_to_base(adapted, tiny.PROMPTS, 1, seed=0)
    assert found == pytest.approx(statistics.mean(expected), abs=1e-4) and found > 0.01
    adapted.unload()


def test_within_the_spread_is_one_standard_deviation():
    reference = [0.4, 0.5, 0.6]  # 0.5 ± 0.1
    assert off_policy.within([0.59, 0.61], reference)
    assert off_policy.within([0.41, 0.41], reference)
    assert not off_policy.within([0.61, 0.61], reference)


@pytest.fixture
def results():
    def held_out(value):
        return {name: {"sampled": value} for name in TASKS}

    done = {}
    for seed in off_policy.SEEDS:
        done[f"base {seed}"] = {"held_out": held_out(0.25)}
        for i, setting in enumerate(off_policy.SETTINGS):
            curves = {name: [0.0, 0.25 * i] for name in off_policy.CURVES} | {"gap": [0.0, 2e-6]}
            done[f"{setting} {seed}"] = {
                "held_out": held_out(0.6 - 0.05 * i + 0.03 * seed),
                "kl_at_the_end": 0.5,
                "curves": curves,
            }
    return {"summary": off_policy.summarise(done)}


def test_tables_and_plot_come_from_the_summary(results):
    text = off_policy.tables(results)
    assert "| base | 25 ± 0 | 25 ± 0 | 25 ± 0 | 25 ± 0 | 25 ± 0 |  |  |" in text
    accuracy = " | ".join(["66 ± 5"] * 5)
    assert f"| on policy | {accuracy} |  |  |" in text
    assert "| 61 ± 5 | -5, -5, -5, -5, -5 | no |" in text
    assert "| 1 ahead | 0.1 | 0.50 ± 0.00 | 12 %, 25 % | 0.12, 0.25 | 2e-06 |" in text
    drawn = plots.svg(lambda figure: off_policy.draw(figure, results))
    assert all(setting in drawn for setting in off_policy.SETTINGS)
