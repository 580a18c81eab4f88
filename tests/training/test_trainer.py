"""PowerFlowTrainer on a random model small enough to recompute everything naively."""

import json
import math
from functools import partial

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.training.health import TrainingStopped  # noqa: E402
from powerflow_fast.training.metrics import METRICS  # noqa: E402
from tests.helpers import ddp_run, ranks, tiny  # noqa: E402


def make(
    folder,
    *,
    model=None,
    peft=True,
    rollout=tiny.rollout,
    psi=None,
    data=None,
    evaluation=None,
    **options,
):
    """(trainer, recorded gradients and logs)."""
    seen = tiny.Gradients()
    trainer = PowerFlowTrainer(
        model=tiny.model() if model is None else model,
        args=tiny.config(folder, **options),
        train_dataset=tiny.dataset() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if peft else None,
        psi_funcs=psi,
        rollout_func=rollout,
        callbacks=[seen],
    )
    return trainer, seen


def start_from_nonzero_adapter(trainer):
    """LoRA starts at zero; move it, so that policy and reference differ, which runs refuse."""
    trainer.start_kl = math.inf
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def naive_sum(model, prompt_ids, completion_ids, temperature):
    """Sum of log-probs of one unpadded completion in float64, from the model's own logits."""
    ids = torch.tensor([prompt_ids + completion_ids])
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion_ids)[:, None]).sum()


def naive_loss(trainer, alpha, psi, temperature=1.0):
    """Eq. 10 with the group log Z', one sequence after the other."""
    model = get_peft_model(tiny.model(), tiny.lora())  # TRL has patched the trainer's forward
    model.load_state_dict(trainer.model.state_dict())
    model.double().eval()
    prompts = [p for p in tiny.PROMPTS[:2] for _ in range(4)]
    rollout = tiny.rollout(prompts, trainer)
    policy, energy = [], []
    for i, (prompt_ids, ids) in enumerate(
        zip(rollout["prompt_ids"], rollout["completion_ids"], strict=True)
    ):
        policy.append(naive_sum(model, prompt_ids, ids, temperature) / len(ids))
        with torch.no_grad(), model.disable_adapter():
            reference = naive_sum(model, prompt_ids, ids, temperature) / len(ids)
        energy.append(alpha * (reference + psi[i]))
    policy, energy = torch.stack(policy).view(2, 4), torch.stack(energy).view(2, 4)
    log_z = (energy - policy).mean(1, keepdim=True).detach()
    loss = (log_z + policy - energy).square().mean()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def assert_close(got, expected, tolerance=1e-5):
    assert got.keys() == expected.keys() and got
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        error = (got[name].double() - gradient.double()).abs().max()
        assert error <= tolerance * scale, (name, float(error), scale)


def odd_psi(completions, **_):
    return [-0.5 if i % 2 else 0.0 for i in range(len(completions))]


@pytest.mark.parametrize("micro_batch", [8, 4, 2])  # one batch; whole groups; split groups
def test_loss_and_gradient_equal_naive_float64(tmp_path, micro_batch):
    trainer, seen = make(
        tmp_path,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
        psi=odd_psi,
        temperature=0.7,
        alpha=2.5,
    )
    start_from_nonzero_adapter(trainer)
    loss, gradients = naive_loss(trainer, 2.5, [0.0, -0.5] * 4, temperature=0.7)
    trainer.train()
    assert seen.logs[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(seen.steps[0], gradients)


def test_a_tolerance_reaches_the_head_and_its_certificate_the_logs(tmp_path):
    runs = []
    for tolerance in (0.0, 0.2):
        trainer, seen = make(tmp_path, grad_tolerance=tolerance)
        # Sharp enough that of 20 columns a few may go.
        trainer.model.get_base_model().lm_head.weight.data.mul_(20)
        start_from_nonzero_adapter(trainer)
        trainer.train()
        runs.append(seen)
    exact, sparse = (seen.logs[0] for seen in runs)
    assert sparse["loss"] == pytest.approx(exact["loss"], rel=1e-5)
    assert 0 < sparse["certified/columns_kept"] < 1 and "certified/columns_kept" not in exact
    assert 0 < sparse["certified/skipped_mass"] <= 0.2
    name = next(iter(runs[0].steps[0]))
    assert not torch.equal(runs[0].steps[0][name], runs[1].steps[0][name])


@pytest.mark.parametrize("log_z", ["group", "learned"])
def test_micro_batches_do_not_matter_with_empty_sequences(tmp_path, log_z):
    """Truncated completions are masked: the denominator must not count them, in any split."""
    runs = {}
    for micro_batch in (8, 4, 2):
        trainer, seen = make(
            tmp_path,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=8 // micro_batch,
            mask_truncated_completions=True,
            log_z=log_z,
            psi=odd_psi,
        )
        start_from_nonzero_adapter(trainer)
        trainer.train()
        runs[micro_batch] = seen
        assert seen.logs[0]["completions/zero_length"] == 2
    names = {shown for shown, _ in METRICS.values()} & runs[8].logs[0].keys() | {"loss"}
    assert len(names) > 9
    for micro_batch in (4, 2):
        assert_close(runs[micro_batch].steps[0], runs[8].steps[0])
        for name in names:
            expected = pytest.approx(runs[8].logs[0][name], rel=1e-5, abs=1e-6)
            assert runs[micro_batch].logs[0][name] == expected, name


def test_policy_starts_at_the_reference_with_real_sampling_and_dropout(tmp_path):
    model = tiny.model(attention_dropout=0.3)
    seen = tiny.Gradients()
    trainer = PowerFlowTrainer(
        model=model,
        args=tiny.config(tmp_path, max_steps=2, log_completions=True),
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(lora_dropout=0.3),
        callbacks=[seen],
    )
    trainer.train()
    first, second = seen.logs
    assert first["logps/policy"] == first["logps/reference"]
    assert first["kl"] == pytest.approx(0.0, abs=1e-12)
    assert second["kl"] > 1e-6  # and it did learn
    assert not any(key.startswith("reward") for key in first)  # no reward in sight
    assert list((tmp_path / "completions").glob("*.parquet"))


def test_reference_of_a_given_adapter_is_that_adapter(tmp_path):
    model = get_peft_model(tiny.model(), tiny.lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trainer, seen = make(tmp_path, model=model, peft=False, max_steps=2)
    trainer.train()
    assert seen.logs[0]["logps/policy"] == pytest.approx(seen.logs[0]["logps/reference"], abs=1e-6)
    assert seen.logs[1]["kl"] > 1e-6


def test_full_fine_tuning_has_its_own_reference(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    trainer, seen = make(
        tmp_path / "run", model=str(tmp_path / "model"), peft=False, max_steps=2, learning_rate=1e-3
    )
    before = [p.clone() for p in trainer.ref_model.parameters()]
    trainer.train()
    assert seen.logs[0]["logps/policy"] == pytest.approx(seen.logs[0]["logps/reference"], abs=1e-6)
    assert seen.logs[1]["kl"] > 1e-7
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.ref_model.parameters()))  # noqa: B905


def test_old_policy_weights_are_means_and_clipped(tmp_path):
    trainer, seen = make(tmp_path, num_iterations=3, max_steps=3, clip_eps=1e-3, learning_rate=0.05)
    trainer.train()
    assert seen.logs[0]["importance/clipped_share"] == 0
    assert seen.logs[2]["importance/clipped_share"] > 0.5
    assert abs(seen.logs[2]["importance/mean"] - 1) <= 1e-3 + 1e-6


def test_learned_log_z_has_its_own_rate_and_a_warm_start(tmp_path):
    trainer, seen = make(
        tmp_path,
        log_z="learned",
        log_z_lr=0.02,
        max_steps=3,
        lr_scheduler_type="linear",
        learning_rate=1e-4,
    )
    rates = []
    step = trainer.log_z.optimizer.step
    trainer.log_z.optimizer.step = lambda: (
        rates.append(trainer.log_z.optimizer.param_groups[0]["lr"]),
        step(),
    )
    group, group_seen = make(tmp_path / "group", learning_rate=1e-4)
    start = [p.clone() for p in trainer.log_z.head.parameters()]
    trainer.train()
    group.train()
    assert rates == [0.02] * 3
    assert seen.logs[0]["log_z"] == pytest.approx(group_seen.logs[0]["log_z"], rel=1e-5)
    assert seen.logs[0]["residual/mean"] == pytest.approx(0.0, abs=1e-5)
    moved = [not torch.equal(a, b) for a, b in zip(start, trainer.log_z.head.parameters())]  # noqa: B905
    assert any(moved)
    names = {n for group in trainer.optimizer.param_groups for n in map(id, group["params"])}
    assert not names & {id(p) for p in trainer.log_z.head.parameters()}


def test_resuming_equals_not_stopping(tmp_path):
    """Adapter, optimizer and the log Z' head with its optimizer come back from the checkpoint."""
    options = dict(log_z="learned", max_steps=4, save_strategy="steps", save_steps=2)
    whole, _ = make(tmp_path / "a", **options)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    resumed, seen = make(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(seen.steps) == 2
    for one, other in ((whole.log_z.head, resumed.log_z.head), (whole.model, resumed.model)):
        theirs = other.state_dict()
        for name, value in one.state_dict().items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-6)


def test_adapter_loads_with_peft_alone(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    model = type(tiny.model()).from_pretrained(tmp_path / "base")
    trainer, _ = make(tmp_path / "run", model=model, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(2, 10)[None]
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    base = tiny.model().eval()
    assert (loaded(ids).logits - base(ids).logits).abs().max() > 1e-4


def test_evaluation_reports_the_loss_of_its_own_rollouts(tmp_path):
    trainer, _ = make(tmp_path, per_device_eval_batch_size=8, num_generations_eval=4)
    metrics = trainer.evaluate(tiny.dataset(1))
    loss, _ = naive_loss(trainer, 4.0, [0.0] * 8)
    assert metrics["eval_loss"] > 0 and metrics["eval_kl"] == pytest.approx(0, abs=1e-9)
    assert loss > 0


def test_liger_gives_its_layer_kernels_and_not_its_head(tmp_path):
    """transformers applies them when training starts; they need a GPU."""
    trainer, _ = make(tmp_path, use_liger_kernel=True)
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        config = {"fused_linear_cross_entropy": True}
        make(tmp_path, use_liger_kernel=True, liger_kernel_config=config)


def _no_rollout(prompts, trainer):
    raise AssertionError("generation was reached")


def test_unusable_input_is_refused_before_generation(tmp_path):
    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            trainer, _ = make(tmp_path, rollout=_no_rollout, **options)
            trainer.train()

    refused("column 'prompt'", data=Dataset.from_dict({"question": ["a"]}))
    refused("empty", data=Dataset.from_dict({"prompt": []}))
    small = tiny.model(max_position_embeddings=16)
    refused("prompt 1 has 7 .*context of 16", model=small, max_completion_length=10)
    small.config.save_pretrained(tmp_path / "config")  # no weights: nothing is loaded before
    tiny.tokenizer().save_pretrained(tmp_path / "config")
    options = dict(model=str(tmp_path / "config"), max_completion_length=10)
    refused("prompt 1 has 7 .*context of 16", **options)
    wrapped = get_peft_model(tiny.model(), tiny.lora())
    refused("`PeftModel` instance together with a `peft_config`", model=wrapped)  # TRL's
    refused("carries an adapter, but the model is no PeftModel", model=wrapped.get_base_model())
    refused("path", peft=False)  # a model in memory only: no reference to load
    frozen = get_peft_model(tiny.model(), tiny.lora(inference_mode=True))
    frozen.requires_grad_(False)
    refused("nothing to train|frozen", model=frozen, peft=False)
    on_head = get_peft_model(tiny.model(), tiny.lora(target_modules=["lm_head", "q_proj"]))
    refused("lm_head", model=on_head, peft=False)
    with pytest.raises(ValueError, match="psi_funcs"):
        PowerFlowTrainer(tiny.model(), reward_funcs=odd_psi)
    with pytest.raises(ValueError, match="PowerFlowConfig"):
        PowerFlowTrainer(tiny.model(), args=object(), train_dataset=tiny.dataset())


def test_an_adapter_that_does_not_start_at_zero_ends_the_run(tmp_path):
    trainer, seen = make(tmp_path)
    start_from_nonzero_adapter(trainer)
    trainer.start_kl = type(trainer).start_kl
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingStopped, match="before the first step .KL 2.*PiSSA, OLoRA.*at most"):
        trainer.train()
    assert not seen.steps
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_conversational_prompts_and_psi_on_messages(tmp_path):
    seen, told = tiny.Gradients(), []

    def psi(prompts, completions, topic, **_):
        told.append((prompts[0], completions[0], topic[0]))
        return [-0.5] * len(prompts)

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": p}], "topic": "t"} for p in tiny.PROMPTS]
    trainer = PowerFlowTrainer(
        tiny.model(),
        tiny.config(tmp_path),
        Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=tiny.lora(),
        psi_funcs=psi,
        callbacks=[seen],
    )
    trainer.train()
    prompt, completion, topic = told[0]
    assert prompt == rows[0]["prompt"] and completion[0]["role"] == "assistant" and topic == "t"
    # psi is the same for all: it moves log Z' by alpha * psi and leaves the residual alone.
    assert seen.logs[0]["rewards/psi/mean"] == -0.5
    at_start = 4.0 * (seen.logs[0]["logps/reference"] - 0.5) - seen.logs[0]["logps/policy"]
    assert seen.logs[0]["log_z"] == pytest.approx(at_start, abs=1.0)


def test_two_processes_equal_one(tmp_path):
    """Same global batch of 16: loss, adapter and log Z' head agree with the run of one process."""
    kinds = {"one": 1, "ddp": 2, "fsdp2": 2}
    for kind, world in kinds.items():
        ranks.finish(world, partial(ddp_run.run, tmp_path, kind), tmp_path / kind)
    expected, *others = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in kinds)
    assert min(expected["saved"]) > 0  # prompts are shared
    for result in others:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["saved"] == expected["saved"]
        assert result["parameters"].keys() == expected["parameters"].keys()
        for name, value in expected["parameters"].items():
            error = (result["parameters"][name] - value).abs().max()
            assert error <= 1e-5 * value.abs().max(), (name, float(error))


def test_adapter_config_names_its_base(tmp_path):
    model = tiny.model()
    model.config._name_or_path = model.name_or_path = "someone/base"
    trainer, _ = make(tmp_path, model=model)
    trainer.save_model(str(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    assert isinstance(trainer.model, PeftModel)
