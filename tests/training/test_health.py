"""What a run measures of itself, and when it ends itself."""

import functools
import math

import pytest
import torch

pytest.importorskip("trl")

from powerflow_fast.training.health import (  # noqa: E402
    PATIENCE,
    TrainingStopped,
    check_gradients,
    distinct_token_ngrams,
)
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import spoil  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402


def rollout_of(completion):
    """A rollout in which completion(step, place) gives the ids."""

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        places = [i % trainer.num_generations for i in range(len(prompts))]
        drawn = [completion(trainer.state.global_step, place) for place in places]
        return {"prompt_ids": ids, "completion_ids": drawn, "logprobs": None}

    return rollout


def test_distinct_token_ngrams_by_hand():
    assert distinct_token_ngrams([[1, 2, 3, 4, 5]]) == 1.0
    assert distinct_token_ngrams([[7] * 13]) == pytest.approx(1 / 10)
    assert distinct_token_ngrams([[1, 2, 1, 2, 1], [3, 4]], n=2) == pytest.approx((2 / 4 + 1) / 2)
    assert distinct_token_ngrams([[1], []]) == 1.0


def test_metrics_of_a_run(tmp_path):
    trainer, seen = make(
        tmp_path, rollout=rollout_of(lambda step, place: [2, 3, 4, 5, 6 + place // 2]), max_steps=2
    )
    trainer.train()
    first, second = seen.logs
    assert first["completions/distinct_per_prompt"] == 2
    assert first["completions/distinct_ngrams"] == 1
    phases = [first[f"time/{name}"] for name in ("rollout", "reference", "policy", "optimizer")]
    assert min(phases) > 0 and sum(phases) <= first["step_time"] * 1.5  # seconds a step
    assert first["completions/empty"] == 0
    assert second["tokens_per_second"] > 0
    assert 0.05 < first["memory/peak_gb"] < 100
    text = (tmp_path / "samples.txt").read_text()
    assert text.count("=== step") == 2
    assert f"prompt: {tiny.PROMPTS[0]}\n--- 1: the capital of France Paris\n" in text


def test_length_collapse_ends_the_run(tmp_path):
    shrinking = rollout_of(lambda step, place: [2 + place] * 2 if step else list(range(2, 20)))
    trainer, seen = make(tmp_path, rollout=shrinking, max_steps=9)
    with pytest.raises(TrainingStopped, match="length collapse at step 3.* 2 tokens.* 18 at"):
        trainer.train()
    assert len(seen.steps) == PATIENCE  # and not one step on the rollout that was the last straw


def test_repetition_ends_the_run_unless_it_is_asked_not_to(tmp_path):
    repeating = rollout_of(lambda step, place: [2 + place] * 20)
    trainer, _ = make(tmp_path, rollout=repeating, max_steps=9)
    with pytest.raises(TrainingStopped, match="repetition at step 2.*lower learning_rate"):
        trainer.train()
    trainer, seen = make(tmp_path, rollout=repeating, max_steps=5, stop_on_collapse=False)
    trainer.train()
    assert len(seen.steps) == 5


def test_one_bad_rollout_is_not_a_collapse(tmp_path):
    def mixed(step, place):  # alike and repeating; or not
        return [2] * 20 if step % 3 else [*range(2 + place, 20)]

    trainer, seen = make(tmp_path, rollout=rollout_of(mixed), max_steps=7)
    trainer.train()
    assert len(seen.steps) == 7


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        (lambda step, place: [2, 3, 4 + step], "alike at step 2.*the same.*samples.txt"),
        (lambda step, place: [tiny.EOS] if place else [3, 4], "empty completions at step 2: 75%"),
    ],
)
def test_completions_with_nothing_to_learn_from_end_the_run(tmp_path, completion, said):
    trainer, _ = make(tmp_path, rollout=rollout_of(completion), max_steps=9)
    with pytest.raises(TrainingStopped, match=said):
        trainer.train()
    trainer, seen = make(
        tmp_path, rollout=rollout_of(completion), max_steps=4, stop_on_collapse=False
    )
    trainer.train()
    assert len(seen.steps) == 4


def test_steps_of_no_gradient_end_the_run_unless_alpha_is_1(tmp_path):
    """Here a callback takes the gradients away."""

    class Zero(tiny.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

    for alpha, steps in ((4.0, 2), (1.0, 5)):  # that are taken
        trainer, _ = make(tmp_path, max_steps=5, alpha=alpha)
        trainer.callback_handler.callbacks.insert(0, Zero())
        if alpha == 1:
            trainer.train()
        else:
            with pytest.raises(TrainingStopped, match="gradient was 0 in the 3 steps up to 2"):
                trainer.train()
        assert trainer.state.global_step == steps


def test_completions_of_a_word_are_asked_about(tmp_path):
    trainer, _ = make(tmp_path, rollout=rollout_of(lambda step, place: [2 + place, tiny.EOS]))
    with pytest.warns(UserWarning, match="completions have 2 tokens.*chat template"):
        trainer.train()


class Poison(tiny.TrainerCallback):
    """From step 1 on, the adapter holds a NaN."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")


def test_a_loss_that_is_no_number_ends_the_run_before_the_step(tmp_path):
    trainer, seen = make(tmp_path, max_steps=3)
    trainer.add_callback(Poison())
    with pytest.raises(TrainingStopped, match="step 1 is not finite.*max_grad_norm"):
        trainer.train()
    assert len(seen.steps) == 1


def test_the_start_of_the_watch_survives_a_resume(tmp_path):
    shrinking = rollout_of(lambda step, place: [2 + place] * 2 if step else list(range(2, 20)))
    options = dict(rollout=shrinking, save_strategy="steps", save_steps=1)
    make(tmp_path, max_steps=2, **options)[0].train()
    trainer, _ = make(tmp_path, max_steps=9, **options)
    with pytest.raises(TrainingStopped, match="length collapse at step 3"):
        trainer.train(resume_from_checkpoint="last")


def test_a_gradient_that_is_not_finite_is_neither_applied_nor_saved(tmp_path):
    trainer, _ = make(tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    spoil(trainer.model)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingStopped, match="the gradient of .*lora_A.* at step 0 is not finite"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_tokens_per_second_counts_reused_rollouts(tmp_path):
    trainer, seen = make(tmp_path, num_iterations=2, max_steps=4)
    trainer.train()
    assert [log["tokens_per_second"] > 0 for log in seen.logs] == [True] * 4


def test_completions_that_are_masked_count_for_repetition(tmp_path):
    """Cut-off completions give no gradient, but they are what the policy writes."""
    repeating = rollout_of(lambda step, place: [2 + place] * 6)  # as long as they may be
    trainer, seen = make(tmp_path, rollout=repeating, mask_truncated_completions=True)
    trainer.train()
    assert seen.logs[0]["completions/distinct_ngrams"] == pytest.approx(1 / 3)
    assert seen.logs[0]["completions/distinct_per_prompt"] == 4


class Penalty:
    """A psi function that is an object."""

    def __init__(self, values):
        self.values = values

    def __call__(self, completions, **_):
        return self.values(len(completions))


def plain(values):
    def psi(completions, **_):
        return values(len(completions))

    return psi


def later(values):
    async def psi(completions, **_):
        return values(len(completions))

    return psi


def part(values):
    return functools.partial(lambda values, completions, **_: values(len(completions)), values)


BAD_PSI = [
    (lambda n: [None, *[0.0] * (n - 2), math.nan], "gave nan for completion 7"),
    (lambda n: [0.0] * (n - 1) + [math.inf], "gave inf for completion 7"),
    (lambda n: torch.full((n,), math.nan), "gave nan for completion 0"),
    (lambda n: ["bad"] * n, "gave 'bad' for completion 0"),
    (lambda n: [0.0], "gave 1 values for 8 completions"),
    (lambda n: None, "gave NoneType for 8 completions"),
]


@pytest.mark.parametrize("kind", [plain, later, part, Penalty])
def test_a_psi_that_is_no_number_is_an_error_of_its_function(kind, tmp_path):
    for values, said in BAD_PSI if kind is plain else BAD_PSI[:1]:
        trainer, seen = make(tmp_path, psi=kind(values))
        with pytest.raises(ValueError, match=rf"psi_funcs: (psi|<lambda>|Penalty) {said}"):
            trainer.train()
        assert not seen.steps
    trainer, seen = make(tmp_path, psi=kind(lambda n: [None, *[-0.5] * (n - 1)]))
    trainer.train()
    assert len(seen.steps) == 1


def test_parameters_that_an_update_made_infinite_are_not_saved(tmp_path):
    """The gradient is finite, the step is not."""
    trainer, seen = make(
        tmp_path, save_strategy="steps", save_steps=1, max_steps=3, learning_rate=3e38
    )
    with pytest.raises(TrainingStopped, match="a parameter of .*lora_.* after step 1"):
        trainer.train()
    assert len(seen.steps) == 1 and not list(tmp_path.glob("checkpoint*"))
    trainer, _ = make(tmp_path, max_steps=1, learning_rate=3e38)  # and at the end, to be saved
    with pytest.raises(TrainingStopped, match="a parameter of"):
        trainer.train()


def test_a_rank_without_a_part_of_any_parameter_answers_with_the_others():
    asked = []

    def gather(own):  # the other rank's is not finite
        asked.append(own)
        return torch.cat([own, torch.tensor([math.inf])])

    none = torch.nn.Parameter(torch.empty(0, 4))
    none.grad = torch.empty(0, 4)
    with pytest.raises(TrainingStopped, match="the gradient at step 3 is not finite"):
        check_gradients(3, [("lora_A", none)], gather)
    assert asked == [torch.zeros(1)]


def test_a_sampler_that_says_minus_infinity_ends_the_run(tmp_path):
    def rollout(prompts, trainer):
        drawn = tiny.rollout(prompts, trainer)
        logps = [[-1.0] * len(ids) for ids in drawn["completion_ids"]]
        logps[3][0] = -float("inf")
        return drawn | {"logprobs": logps}

    trainer, seen = make(tmp_path, rollout=rollout)
    with pytest.raises(TrainingStopped, match="log-prob of -inf for a token that it drew"):
        trainer.train()
    assert not seen.steps
