"""Several updates per rollout, the sampler's own log-probs, schedules, and ways of computing."""

import pytest
import torch

pytest.importorskip("trl")

from peft import get_peft_model  # noqa: E402
from peft.tuners.trainable_tokens import TrainableTokensLayer  # noqa: E402

from powerflow_fast.models.packing import Rows  # noqa: E402
from powerflow_fast.training import forward as forward_module  # noqa: E402
from powerflow_fast.training.checks import check_policy  # noqa: E402
from powerflow_fast.training.health import TrainingStopped  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.training.test_trainer import assert_close, make  # noqa: E402


def sampler(shift):
    """tiny.rollout with log-probs that differ from the policy's by `shift` per token."""

    def rollout(prompts, trainer):
        drawn = tiny.rollout(prompts, trainer)
        logps = []
        model = get_peft_model(tiny.model(), tiny.lora()).eval()
        for prompt, ids in zip(drawn["prompt_ids"], drawn["completion_ids"], strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            logps.append((chosen + shift).tolist())
        return drawn | {"logprobs": logps}

    return rollout


def test_the_samplers_log_probs_weigh_the_loss_and_are_measured(tmp_path):
    """exp(mean(log pi - old)) = exp(0.1) for every sequence, inside the clip of 0.2."""
    weighted, seen = make(tmp_path, rollout=sampler(-0.1), max_sampler_gap=2.0)
    plain, plain_seen = make(tmp_path)
    weighted.train()
    plain.train()
    log, factor = seen.logs[0], 1.1051709
    assert log["importance/mean"] == pytest.approx(factor, rel=1e-5)
    assert log["loss"] == pytest.approx(factor * plain_seen.logs[0]["loss"], rel=1e-4)
    assert log["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1, rel=1e-4)
    assert log["sampling/sampling_logp_difference/max"] == pytest.approx(0.1, rel=1e-4)
    far, far_seen = make(tmp_path, rollout=sampler(-1.0), max_sampler_gap=2.0)
    far.train()
    assert far_seen.logs[0]["importance/mean"] == pytest.approx(1.2)
    assert far_seen.logs[0]["importance/clipped_share"] == 1


def test_a_sampler_further_off_than_rounding_ends_the_run(tmp_path):
    trainer, _ = make(tmp_path, rollout=sampler(-0.2))
    with pytest.raises(TrainingStopped, match="0.2 nats/token off the policy's, at most 0.1"):
        trainer.train()


def test_a_log_prob_the_sampler_does_not_know_is_the_policys_own(tmp_path):
    def rollout(prompts, trainer):
        drawn = sampler(0.0)(prompts, trainer)
        for row in drawn["logprobs"]:
            row[0] = None
        return drawn

    trainer, seen = make(tmp_path, rollout=rollout)
    trainer.train()
    assert seen.logs[0]["importance/mean"] == pytest.approx(1.0, rel=1e-5)


def test_the_reference_is_computed_once_for_several_updates(tmp_path, monkeypatch):
    calls = []
    forward = Rows.hidden_states

    def counting(rows, model):
        calls.append(torch.is_grad_enabled())
        return forward(rows, model)

    monkeypatch.setattr(Rows, "hidden_states", counting)
    trainer, seen = make(tmp_path, num_iterations=3, max_steps=3)
    calls.clear()  # of trials
    trainer.train()
    assert calls == [False, False, True, True, True]  # reference and policy once; three updates
    fresh, fresh_seen = make(tmp_path)
    fresh.train()
    assert seen.logs[0]["loss"] == pytest.approx(fresh_seen.logs[0]["loss"], rel=1e-5)
    assert_close(seen.steps[0], fresh_seen.steps[0])


REUSE = {
    "once": {},
    "twice": dict(num_iterations=2, max_steps=2),
    "split": dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
}


@pytest.mark.parametrize("options", REUSE.values(), ids=list(REUSE))
def test_an_offloaded_reference_comes_once_per_rollout_and_changes_nothing(tmp_path, options):
    tiny.model().save_pretrained(tmp_path / "model")
    runs, events = [], []
    for offload in (False, True):
        trainer, seen = make(
            tmp_path,
            model=str(tmp_path / "model"),
            peft=False,
            offload_reference=offload,
            **options,
        )
        with torch.no_grad():  # so that policy and reference differ
            trainer.model.model.embed_tokens.weight.mul_(1.1)
        trainer.start_kl = float("inf")
        if offload:
            move = trainer.ref_model.to
            trainer.ref_model.to = lambda device, f=move: events.append(str(device)) or f(device)
            trainer.ref_model.model.register_forward_hook(lambda *_: events.append("pass"))
        trainer.train()
        runs.append(seen)
    passes = options.get("gradient_accumulation_steps", 1)
    assert events == ["cpu", *["pass"] * passes, "cpu"]  # to the device, which is the CPU here
    for kept, offloaded in zip(*(run.steps for run in runs), strict=True):
        assert_close(offloaded, kept, 1e-6)
    assert runs[1].logs[0]["loss"] == pytest.approx(runs[0].logs[0]["loss"], rel=1e-6)
    assert runs[1].logs[0]["kl"] > 1e-3


def test_offloading_is_refused_where_there_is_no_whole_copy_to_move(tmp_path):
    with pytest.raises(ValueError, match="offload_reference: .* there is no second copy"):
        make(tmp_path, offload_reference=True)
    tiny.model().save_pretrained(tmp_path / "model")
    whole = dict(model=str(tmp_path / "model"), peft=False, offload_reference=True)
    trainer, _ = make(tmp_path / "run", **whole)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="offload_reference: expected a whole copy.*FSDP"):
        check_policy(trainer, trainer.model)


def test_alpha_grows_and_a_rollout_keeps_the_alpha_it_was_drawn_with(tmp_path):
    trainer, seen = make(tmp_path, alpha=3.0, alpha_warmup_steps=4, max_steps=6)
    trainer.train()
    assert [log["alpha"] for log in seen.logs] == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0, 3.0])
    at_one = seen.logs[0]  # policy = reference and alpha = 1: log Z' and the loss are 0
    assert at_one["loss"] == pytest.approx(0, abs=1e-9) and at_one["log_z"] == pytest.approx(
        0, abs=1e-6
    )
    twice, seen = make(
        tmp_path, alpha=3.0, alpha_start=2.0, alpha_warmup_steps=4, num_iterations=2, max_steps=4
    )
    given = []
    loss = forward_module.fused_linear_tb_loss
    forward_module.fused_linear_tb_loss = lambda *a, alpha, **k: (
        given.append(float(torch.as_tensor(alpha).reshape(-1)[0])),
        loss(*a, alpha=alpha, **k),
    )[1]
    try:
        twice.train()
    finally:
        forward_module.fused_linear_tb_loss = loss
    updates = [given[i] for i in (1, 2, 4, 5)]  # 0 and 3 score the rollout
    assert updates == pytest.approx([2.0, 2.0, 2.5, 2.5])


def test_the_learning_rate_of_log_z_follows_the_scheduler_only_when_asked(tmp_path):
    rates = {}
    for scheduled in (False, True):
        trainer, _ = make(
            tmp_path,
            log_z="learned",
            log_z_lr=0.02,
            log_z_lr_scheduled=scheduled,
            lr_scheduler_type="linear",
            max_steps=4,
        )
        optimizer, seen = trainer.log_z.optimizer, []
        step = optimizer.step
        optimizer.step = lambda o=optimizer, s=seen, f=step: (
            s.append(o.param_groups[0]["lr"]),
            f(),
        )
        trainer.train()
        rates[scheduled] = seen
    assert rates[False] == [0.02] * 4
    assert rates[True] == pytest.approx([0.02, 0.015, 0.01, 0.005])


@pytest.mark.parametrize("kind", ["dora", "checkpointing"])
def test_other_ways_to_train_start_at_the_reference_and_learn(tmp_path, kind):
    from powerflow_fast import PowerFlowTrainer

    seen = tiny.Gradients()
    trainer = PowerFlowTrainer(
        model=tiny.model(),
        args=tiny.config(tmp_path, max_steps=2, gradient_checkpointing=kind == "checkpointing"),
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(use_dora=kind == "dora"),
        rollout_func=tiny.rollout,
        callbacks=[seen],
    )
    trainer.train()
    plain, plain_seen = make(tmp_path / "plain", max_steps=2)
    plain.train()
    assert seen.logs[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert seen.logs[0]["loss"] == pytest.approx(plain_seen.logs[0]["loss"], rel=1e-5)
    assert seen.logs[1]["kl"] > 1e-6
    if kind == "checkpointing":
        assert_close(seen.steps[1], plain_seen.steps[1])


@pytest.mark.parametrize(
    "several",
    [dict(num_iterations=2), dict(steps_per_generation=2)],
    ids=["iterations", "steps_per_generation"],
)
def test_several_updates_do_not_depend_on_the_split(tmp_path, several):
    """Group log Z' is the rollout's for all of its updates, whole groups or not."""
    runs = []
    for size in (8, 4, 2):
        options = dict(several)
        if "steps_per_generation" in options:
            options["steps_per_generation"] *= 8 // size
        trainer, seen = make(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=2,
            learning_rate=0.05,
            **options,
        )
        trainer.train()
        runs.append(seen.steps)
    for run in runs[1:]:
        assert_close(run[0], runs[0][0])
        assert_close(run[1], runs[0][1])


def test_a_head_with_trained_tokens_is_merged_as_often_as_it_is_used(tmp_path, monkeypatch):
    """Each merge is a copy of [V, H]: embedding and head, of the policy and of the reference."""
    merges = []
    merge = TrainableTokensLayer.get_merged_weights

    def counting(self, adapters):
        merges.append(self)
        return merge(self, adapters)

    model = tiny.model(tie_word_embeddings=True)
    lora = tiny.lora(target_modules=["q_proj"], trainable_token_indices=[2, 3])
    trainer, seen = make(tmp_path, model=get_peft_model(model, lora), peft=False)
    rollout = trainer._prepare_inputs

    def after_rollout(inputs):
        prepared = rollout(inputs)
        merges.clear()
        return prepared

    trainer._prepare_inputs = after_rollout
    monkeypatch.setattr(TrainableTokensLayer, "get_merged_weights", counting)
    trainer.train()
    assert len(seen.steps) == 1 and len(merges) == 4
