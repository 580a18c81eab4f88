"""What a patched model returns, to a caller and to Trainer, and how the patch comes off again."""

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from accelerate import Accelerator, dispatch_model  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from peft import PromptTuningConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from powerflow_fast.integrations import transformers as door  # noqa: E402
from powerflow_fast.integrations.transformers import (  # noqa: E402
    FusedHeadOutput,
    patch_head,
    unpatch_head,
)
from tests.helpers import tiny  # noqa: E402
from tests.helpers.numerics import logps_error_bound  # noqa: E402

IDS = torch.arange(2, 18).reshape(2, 8)
EVERY = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def scored(model, **options):
    return model(input_ids=IDS, labels=IDS, fused_lm_head=True, **options)


def hooked():
    """A model whose forward is an attribute of its own, as `device_map` leaves it."""
    model = tiny.model()
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    return dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)


def test_every_public_name_is_there_and_in_the_docstring():
    for name in door.__all__:
        assert getattr(door, name).__name__ == name and f"`{name}`" in door.__doc__


@pytest.mark.parametrize("build", [tiny.model, hooked])
@pytest.mark.parametrize("patches", [1, 2])
def test_unpatching_leaves_the_model_as_it_was(build, patches):
    model = build()
    before, logits = dict(vars(model)), model(IDS).logits
    forward = vars(model).get("forward")
    for _ in range(patches):
        patch_head(model, with_labels=True)
    assert isinstance(model(IDS, labels=IDS), FusedHeadOutput)
    for _ in range(2):  # twice is once
        unpatch_head(model)
        assert dict(vars(model)) == before and vars(model).get("forward") is forward
    assert torch.equal(model(IDS, labels=IDS).logits, logits)
    patch_head(model)
    assert torch.equal(scored(model).loss, scored(model).loss)


@pytest.mark.parametrize("adapter", ["lora", "prompt"])
def test_a_patch_comes_off_through_an_adapter(adapter):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny.model(), tiny.lora() if adapter == "lora" else config)
    for _ in range(2):
        patch_head(model)
    assert isinstance(scored(model), FusedHeadOutput)
    unpatch_head(model)
    assert "forward" not in vars(model.get_base_model())


def test_a_patched_forward_keeps_its_signature():
    model = tiny.model()
    before = inspect.signature(model.forward)
    patch_head(model)
    assert inspect.signature(model.forward) == before and "labels" in before.parameters


def test_what_cannot_be_unpatched_is_refused():
    with pytest.raises(ValueError, match="^model: expected one of transformers, unwrapped"):
        unpatch_head(torch.nn.DataParallel(tiny.model()))
    unpatch_head(tiny.model())  # never patched: nothing to do
    model = tiny.model()
    patch_head(model)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        wrapped = accelerator.prepare_model(model)
        with pytest.raises(ValueError, match="was wrapped after patch_head"):
            unpatch_head(model)
        assert isinstance(scored(wrapped), FusedHeadOutput)  # a refusal takes nothing off
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        assert isinstance(scored(model), FusedHeadOutput)
        unpatch_head(model)
        assert "forward" not in vars(model)
    finally:
        AcceleratorState._reset_state(True)


def test_a_copy_has_a_forward_of_its_own():
    model = tiny.model()
    patch_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0 + torch.rand_like(other.lm_head.weight))
        hidden = other.model(IDS).last_hidden_state
        assert torch.equal(other(IDS).logits, other.lm_head(hidden))
    assert not torch.allclose(scored(other).log_probs, scored(model).log_probs)
    unpatch_head(other)
    assert isinstance(scored(model), FusedHeadOutput) and "forward" not in vars(other)


def test_logits_are_told_to_be_missing():
    model = tiny.model()
    patch_head(model)
    out = scored(model)
    with pytest.raises(AttributeError, match="^logits: a fused head never forms them; read log_pr"):
        _ = out.logits
    with pytest.raises(KeyError, match="never forms them"):
        _ = out["logits"]
    assert not hasattr(out, "logits") and out["loss"] is out.loss and out[0] is out.loss
    assert list(out) == ["loss", "log_probs", "label_mask"]
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        _ = out.colour


def test_a_tuple_instead_of_fields():
    model = tiny.model()
    patch_head(model)
    expected, found = scored(model).to_tuple(), scored(model, return_dict=False)
    assert type(found) is tuple and len(found) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert isinstance(scored(model, return_dict=True), FusedHeadOutput)


def test_a_compiled_patched_model_has_no_graph_break():
    torch._dynamo.reset()
    model = tiny.model()
    patch_head(model)

    def plain(ids):
        return model(ids).logits

    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), plain(IDS))
    compiled = torch.compile(model, backend="aot_eager")
    ours = compiled(IDS, labels=IDS, fused_lm_head=True)
    torch.testing.assert_close(ours.log_probs, scored(model).log_probs)


def evaluate(model, rows, folder, **functions):
    options = dict(use_cpu=True, report_to=[], disable_tqdm=True, per_device_eval_batch_size=1)
    args = TrainingArguments(str(folder), **options)
    return Trainer(model, args, eval_dataset=rows, **functions).evaluate()


def test_metrics_of_trainer_are_those_of_the_docstring(tmp_path):
    """Rows of different lengths, which Trainer fills up with -100, or True."""
    rows = [{"input_ids": IDS[i, :n], "labels": IDS[i, :n].clone()} for i, n in ((0, 4), (1, 8))]
    rows[1]["labels"][:3] = -100
    seen = []

    def own_accuracy(prediction):
        counted = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": right[counted].mean()}

    def accuracy(prediction):
        log_probs, is_top1, label_mask = prediction.predictions
        counted = prediction.label_ids[:, 1:] != -100
        seen.append((label_mask, counted))
        loss = -log_probs[counted].mean()
        return {"accuracy": is_top1[counted].mean(), "mean_loss": loss}

    def kept(logits, labels):
        log_probs, is_top1, _ = logits
        assert labels.shape[1] == log_probs.shape[1] + 1
        return log_probs, is_top1, is_top1

    model = tiny.model()
    with torch.no_grad():  # right now and then: the last token of a row is the most likely one
        last = model.model(IDS).last_hidden_state[1, -2]
        model.lm_head.weight[IDS[1, -1]] = last
    expected = evaluate(model, rows, tmp_path, compute_metrics=own_accuracy)
    patch_head(model, outputs=("is_top1",), with_labels=True)
    found = evaluate(model, rows, tmp_path, compute_metrics=accuracy)
    assert 0 < expected["eval_accuracy"] < 1
    assert found["eval_accuracy"] == pytest.approx(expected["eval_accuracy"])
    [(mask, counted)] = seen
    assert mask.sum() > counted.sum() == 3 + 5  # as the docstring warns
    options = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": kept}
    again = evaluate(model, rows, tmp_path, **options)
    assert again["eval_accuracy"] == pytest.approx(expected["eval_accuracy"])


def test_every_field_comes_in_the_order_of_the_class():
    model = tiny.model()
    patch_head(model, outputs=tuple(reversed(EVERY)))
    assert list(scored(model)) == ["loss", *EVERY, "label_mask"]


def test_the_balance_of_experts_is_over_every_row():
    """Its loss counts a prompt for each completion, so that is what is computed."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=20)
    experts = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **experts)).eval()
    patch_head(model)
    ids = torch.tensor([[2, 3, 4, 5, 6], [2, 3, 4, 7, 8]])
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    plain, shared = model(**batch), model(**batch, prompt_lengths=torch.tensor([3, 3]))
    assert torch.equal(plain.log_probs, shared.log_probs) and plain.aux_loss > 0
    assert plain.aux_loss == shared.aux_loss


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_prompt_lengths_of_a_patched_model(name):
    model = tiny.model().eval()
    patch_head(model, outputs=("log_probs", "entropy"))
    ids = torch.tensor(
        [[2, 3, 4, 5, 6, 0], [2, 3, 4, 7, 0, 0], [2, 3, 4, 8, 9, 10], [5, 6, 7, 8, 0, 0]]
    )
    mask = (ids != 0).long()
    labels = ids.where(mask.bool() & (torch.arange(6) > 0), -100)  # of prompts, too
    if name == "shift_labels":
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    batch = {"input_ids": ids, "attention_mask": mask, name: labels, "fused_lm_head": True}
    plain, shared = model(**batch), model(**batch, prompt_lengths=torch.tensor([3, 3, 3, 2]))
    assert torch.equal(plain.label_mask, shared.label_mask)
    for field in ("log_probs", "entropy", "loss"):
        torch.testing.assert_close(plain[field], shared[field], rtol=1e-5, atol=1e-5)
    for given, said in (
        ({"prompt_lengths": torch.tensor([3, 3, 3])}, "prompt_lengths: expected a number for each"),
        ({"prompt_lengths": torch.tensor([3, 5, 3, 2])}, "1 to its real tokens"),
        (
            {"prompt_lengths": torch.tensor([3, 3, 3, 2]), "position_ids": mask},
            "expected no position_ids beside it",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            model(**batch | given)


def test_shifted_labels_are_scored_where_they_stand():
    model = tiny.model()
    patch_head(model)
    ids = torch.randint(2, 20, (2, 6))
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    own = model(ids, labels=ids, fused_lm_head=True).log_probs
    given = model(ids, shift_labels=shifted, fused_lm_head=True).log_probs
    bound = logps_error_bound(torch.ones(1, 16), model.lm_head.weight)
    torch.testing.assert_close(given[:, :-1], own, rtol=0, atol=bound)
    assert not given[:, -1].any()


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_shape_are_named(name):
    model, ids = tiny.model(), torch.randint(2, 20, (2, 6))
    patch_head(model)
    with pytest.raises(ValueError, match=rf"^{name}: expected \[B, T\] = \(2, 6\), got \(2, 5\)"):
        model(ids, fused_lm_head=True, **{name: ids[:, 1:]})
