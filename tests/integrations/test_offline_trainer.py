"""`patch_head` under transformers' own Trainer, and `LATBTrainer` against the loss by hand."""

import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PromptTuningConfig, get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from powerflow_fast import tb_loss  # noqa: E402
from powerflow_fast.integrations import verl  # noqa: E402
from powerflow_fast.integrations.transformers import LATBTrainer, patch_head  # noqa: E402
from powerflow_fast.training.health import TrainingStopped  # noqa: E402
from powerflow_fast.training.metrics import METRICS  # noqa: E402
from tests.helpers import ranks, tiny  # noqa: E402

COMPLETIONS = ("Paris", "three four five", "rain sea a b")
ROWS = [{"prompt": p, "completion": c} for c in COMPLETIONS for p in tiny.PROMPTS]


def arguments(folder, **options):
    defaults = dict(
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        disable_tqdm=True,
    )
    return TrainingArguments(str(folder), **defaults | options)


def adapted(model=None):
    torch.manual_seed(1)
    model = get_peft_model(tiny.model() if model is None else model, tiny.lora())
    with torch.no_grad():  # away from the reference, so that the ratio and Delta show
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def offline(folder, rows=ROWS, model=None, **options):
    args = {k: options.pop(k) for k in list(options) if k in TrainingArguments.__dataclass_fields__}
    return LATBTrainer(
        adapted() if model is None else model,
        arguments(folder, **args),
        rows,
        processing_class=tiny.tokenizer(),
        **options,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def by_hand(model, rows, old=None, psi=0.0, alpha=4.0):
    """The loss of all rows at once, from plain logits."""
    encode = tiny.tokenizer()
    total, groups = [], []
    for row in rows:
        prompt = encode(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *encode(row["completion"])["input_ids"], tiny.EOS]])
        both = []
        for context in (torch.enable_grad, model.disable_adapter):
            with context():
                logits = model(ids).logits[:, :-1].log_softmax(-1)
            logps = logits.gather(-1, ids[:, 1:, None])[0, :, 0]
            both.append(logps[len(prompt) - 1 :])
        total.append(both)
        groups.append(tiny.PROMPTS.index(row["prompt"]))
    lengths = torch.tensor([0] + [len(a) for a, _ in total])
    return tb_loss(
        torch.cat([a for a, _ in total]),
        torch.cat([b for _, b in total]),
        cu_seqlens=lengths.cumsum(0).int(),
        log_z="group",
        group_ids=torch.tensor(groups),
        alpha=alpha,
        psi=psi,
        old_logps=old,
    )


def test_the_offline_loss_is_the_one_by_hand(tmp_path):
    trainer = offline(tmp_path, per_device_train_batch_size=4, max_steps=1)
    expected = by_hand(trainer.model, ROWS).loss
    assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_old_log_probs_weigh_and_psi_shifts(tmp_path):
    model = adapted()
    out = by_hand(model, ROWS)
    drift = 0.1 * torch.randn(len(out.logps))
    old, psi = out.logps.detach() - drift, -0.5 * torch.arange(len(ROWS)) / len(ROWS)
    expected = by_hand(model, ROWS, old, psi)
    parts = old.split(out.lengths.tolist())
    rows = [
        row | {"old_logps": part.tolist(), "psi": float(p)}
        for row, part, p in zip(ROWS, parts, psi, strict=True)
    ]
    trainer = offline(tmp_path, rows, model, per_device_train_batch_size=4, max_steps=1)
    assert losses(trainer)[0] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert expected.importance.std() > 0.01


def test_the_step_does_not_depend_on_micro_batches(tmp_path):
    whole = offline(tmp_path, per_device_train_batch_size=4)
    split = offline(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4)
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(split.model)[name], value, rtol=1e-3, atol=1e-5)


TWO_STEPS = dict(optim="sgd", learning_rate=0.1, max_steps=2)


def test_two_ranks_train_as_one(tmp_path):
    ranks.finish(2, functools.partial(train_on_a_rank, tmp_path), tmp_path)
    ours = torch.load(tmp_path / "weights.pt", weights_only=True)
    alone = offline(tmp_path, per_device_train_batch_size=4, **TWO_STEPS)
    start = weights(alone.model)
    alone.train()
    for name, value in weights(alone.model).items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)
        assert not torch.equal(value, start[name])


def train_on_a_rank(folder):
    batch = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    trainer = offline(folder / "run", ddp_backend="gloo", **batch, **TWO_STEPS)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        policy = trainer.accelerator.unwrap_model(trainer.model)
        torch.save(weights(policy), folder / "weights.pt")


def test_it_learns_and_evaluates_with_a_reference_model(tmp_path):
    torch.manual_seed(0)
    trainer = offline(
        tmp_path,
        model=tiny.model(),
        ref_model=tiny.model(),
        eval_dataset=ROWS,
        max_steps=25,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (ROWS, {"model": tiny.model()}, "ref_model: expected a model"),
        (ROWS, {"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input_is_named(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        offline(tmp_path, rows, **options)


def test_transformers_own_trainer_needs_no_other_change(tmp_path):
    encode = tiny.tokenizer()
    rows = [encode(f"{r['prompt']} {r['completion']}")["input_ids"][:5] for r in ROWS]
    rows = [{"input_ids": ids, "labels": ids} for ids in rows if len(ids) == 5]

    def run(patch):
        model = tiny.model()
        if patch:
            patch_head(model, with_labels=True)
        trainer = Trainer(model, arguments(tmp_path, gradient_accumulation_steps=2), None, rows)
        return losses(trainer), model

    (before, _), (after, model) = run(False), run(True)
    assert len(before) == 3 and after == pytest.approx(before, rel=1e-4)
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits
        own = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        assert logits.shape == (1, 5, 20) and torch.equal(logits, own)  # no labels, no change
        assert torch.equal(model(ids, labels=ids, fused_lm_head=False).logits, logits)
        longer = model.generate(ids, max_new_tokens=2, do_sample=False)
        assert longer.shape == (1, 7)
        assert torch.equal(longer[:, 5:], model(longer).logits[:, 4:6].argmax(2))


def test_adapters_and_virtual_tokens_are_scored(tmp_path):
    ids = torch.randint(2, 20, (2, 6))
    for model in (adapted(), get_peft_model(tiny.model(), virtual())):
        model.eval()
        patch_head(model)
        with torch.no_grad():
            ours = model(ids, labels=ids, fused_lm_head=True).log_probs[:, -5:]
            logits = model(ids).logits[:, -6:-1].log_softmax(-1)
        expected = logits.gather(-1, ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def virtual():
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def test_nothing_to_score_is_a_connected_zero():
    model = tiny.model()
    patch_head(model, outputs=("log_probs", "entropy", "is_top1", "mean_logits"))
    ids = torch.randint(2, 20, (2, 6))
    out = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss == 0 and out.label_mask.sum() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None


def test_bad_calls_are_named():
    model = tiny.model()
    with pytest.raises(ValueError, match="outputs: expected a choice"):
        patch_head(model, outputs=("logits",))
    patch_head(model)
    ids = torch.randint(2, 20, (2, 6))
    with pytest.raises(ValueError, match="expected labels"):
        model(ids, fused_lm_head=True)


def test_figures_are_those_of_all_rows_and_of_training_or_evaluation_alone(tmp_path):
    rows = [r | {"completion": " ".join([r["completion"]] * (1 + i))} for i, r in enumerate(ROWS)]
    logs = {}
    for size in (4, 2, 1):
        trainer = offline(
            tmp_path,
            rows,
            eval_dataset=rows[:8],
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=1,
            metric_for_best_model="eval_kl",
        )
        evaluated = trainer.evaluate()
        assert not any(name in evaluated for name in ("kl", "residual/std"))
        trainer.train()
        training = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert not any(name.startswith("eval") for name in training)
        names = {shown for shown, _ in METRICS.values()} & training.keys()
        assert len(names) == 9
        logs[size] = [evaluated[f"eval_{n}"] for n in names] + [training[n] for n in sorted(names)]
    for size in (2, 1):
        assert sorted(logs[size]) == pytest.approx(sorted(logs[4]), rel=1e-4, abs=1e-6)


def spoil(model) -> None:
    """A gradient that is no number behind a loss that is one."""
    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
    parameter.register_hook(lambda grad: torch.full_like(grad, torch.nan))


def test_a_gradient_that_is_not_finite_is_never_applied(tmp_path):
    trainer = offline(tmp_path, save_strategy="steps", save_steps=1, max_grad_norm=1.0)
    spoil(trainer.model)
    before = weights(trainer.model)
    with pytest.raises(TrainingStopped, match="the gradient of .*lora_A.* at step 0 is not finite"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in weights(trainer.model).items())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_loss_that_is_not_finite_is_not_logged_as_0(tmp_path):
    """As where fp16's scaler skips every step, and Trainer leaves such a loss out."""
    trainer = offline(tmp_path)
    out = tb_loss(torch.zeros(2, 3), torch.zeros(2, 3), log_z=0.0, alpha=1.0)
    trainer.sums["train"].add(out._replace(residual=torch.tensor([0.5, torch.nan])))
    trainer.model.train()
    with pytest.raises(TrainingStopped, match="the loss up to step 0 is not finite"):
        trainer.log({"loss": 0.0})
    assert not trainer.state.log_history


def test_options_of_an_earlier_patch_stay(tmp_path):
    model = adapted()
    patch_head(model, grad_tolerance=1e-3)
    trainer = offline(tmp_path, model=model, head={"round_logits": True})
    options = trainer.model.get_base_model()._fused_head_options
    assert options == {"grad_tolerance": 1e-3, "round_logits": True}


def test_sequences_are_not_cut_over_ranks(tmp_path):
    args = arguments(tmp_path)
    args.parallelism_config = SimpleNamespace(cp_size=2, sp_size=1)
    with pytest.raises(ValueError, match="parallelism_config: cp_size=2 splits each sequence"):
        LATBTrainer(adapted(), args, ROWS, processing_class=tiny.tokenizer())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 0}, "alpha: expected a finite number > 0, got 0"),
        ({"alpha": "4"}, "alpha: expected"),
        ({"log_z": "learned"}, "log_z: expected 'group' or a finite number, got 'learned'"),
        ({"log_z": float("nan")}, "log_z: expected"),
        ({"clip_eps": -1.0}, "clip_eps: expected"),
        ({"temperature": None}, "temperature: expected"),
        ({"head": {"grad_tolerance": 2}}, "grad_tolerance: expected"),
        ({"head": {"softcap": 3.0}}, "softcap: no such option of the head"),
    ],
    ids=str,
)
def test_options_are_checked_at_construction(options, said, tmp_path):
    with pytest.raises(ValueError, match=f"^{said}"):
        offline(tmp_path, **options)


def test_a_reference_that_would_move_or_has_other_tokens(tmp_path):
    model = tiny.model()
    with pytest.raises(ValueError, match="ref_model: it shares .* with the model that is trained"):
        offline(tmp_path, model=model, ref_model=model)
    wrapped = get_peft_model(model, tiny.lora())
    with pytest.raises(ValueError, match=r"ref_model: it shares .*lora_A"):
        offline(tmp_path, model=wrapped, ref_model=wrapped.get_base_model())
    with pytest.raises(ValueError, match="ref_model: expected a vocabulary of 20, got one of 30"):
        offline(tmp_path, model=tiny.model(), ref_model=tiny.model(vocab_size=30))


def test_an_evaluation_depends_on_its_rows_alone(tmp_path):
    """Groups of different sizes, any batches, after a `predict`, and under a name of its own."""
    rows = [*ROWS, *({"prompt": "rain", "completion": "sea " * n} for n in range(1, 5))]
    found = []
    for size in (1, 3, 4):
        trainer = offline(tmp_path, eval_dataset=rows, per_device_eval_batch_size=size)
        trainer.predict(trainer.train_dataset[:2])
        found.append({k: x for k, x in trainer.evaluate().items() if "/" in k or "loss" in k})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-5) and len(found[0]) > 7
    assert found[2] == pytest.approx(found[0], rel=1e-4, abs=1e-5)
    named = offline(tmp_path, eval_dataset={"all": rows, "some": ROWS}).evaluate()
    assert named["eval_all_residual/std"] == pytest.approx(found[0]["eval_residual/std"], rel=1e-4)
    assert named["eval_all_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-4)
    assert named["eval_some_loss"] != pytest.approx(found[0]["eval_loss"], rel=1e-2)


@pytest.mark.parametrize("name", ["softcap", "entropy", "group_name", "colour"])
def test_options_that_a_door_would_drop_are_refused(name):
    for door in (lambda **head: patch_head(tiny.model(), **head), verl.register):
        with pytest.raises(ValueError, match=f"^{name}: no such option of the head"):
            door(**{name: 1})


@pytest.mark.parametrize("referee", [False, True], ids=["adapter off", "a second copy"])
def test_offline_groups_share_their_prompt(referee, tmp_path):
    """Three completions of each prompt: its tokens pass once, with the same losses."""
    runs, passed = {}, {}
    for way in ("off", "on"):
        model = adapted()
        options = dict(ref_model=tiny.model()) if referee else {}
        trainer = offline(tmp_path / way, model=model, shared_prompt=way, **options)
        tokens = passed.setdefault(way, [])
        model.get_base_model().model.embed_tokens.register_forward_hook(
            lambda m, args, out, tokens=tokens: tokens.append(args[0].numel())
        )
        trainer.train()
        runs[way] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert runs["on"] == pytest.approx(runs["off"], rel=1e-4)
    assert all(on < off for on, off in zip(passed["on"], passed["off"], strict=True))
