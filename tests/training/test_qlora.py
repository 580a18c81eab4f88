"""QLoRA: adapters on a base that bitsandbytes holds in 4 bits."""

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("trl")

from peft import get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402

from powerflow_fast.models.parameters import keep_gradient  # noqa: E402
from powerflow_fast.training.exact_merge import keep_base_exact  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.training.test_trainer import assert_close, make, start_from_nonzero_adapter  # noqa: E402

ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


@pytest.fixture
def quantised(tmp_path):
    """Loads the tiny model with its linear layers in NF4 and a head that is not."""
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )

    def load():
        options = dict(quantization_config=how, dtype=torch.float32, device_map="cpu")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    return load


def quantised_layers(model):
    kind = bitsandbytes.nn.Linear4bit
    return {n: m for n, m in model.named_modules() if isinstance(m, kind)}


def dequantised(model):
    """The same network with float32 weights."""
    plain = tiny.model(hidden_size=64, intermediate_size=128)
    for name, layer in quantised_layers(model).items():
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def test_layers_keep_the_form_that_has_a_gradient(tmp_path, quantised):
    """On CPUs with bf16 units a forward pass in evaluation would repack them for good."""
    model = quantised()
    trainer, _ = make(tmp_path, model=model)
    with torch.no_grad():
        trainer.model.eval()(torch.tensor([[2, 3, 4]]))
    layers = quantised_layers(trainer.model)
    assert len(layers) == 14
    for layer in layers.values():
        x = torch.randn(2, layer.in_features, requires_grad=True)
        (gradient,) = torch.autograd.grad(layer(x).sum(), x)
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        torch.testing.assert_close(gradient[0], weight.sum(0), rtol=1e-4, atol=1e-5)
    layer.weight.quant_state.packing_format_for_cpu = True  # as an evaluation before would leave it
    with pytest.raises(ValueError, match="model: .* was repacked for inference"):
        keep_gradient(model)


def test_equals_the_same_weights_in_float32(tmp_path, quantised):
    """Adapters included: TRL makes them bf16, and the next resume would make them float32."""
    model = quantised()
    layers = quantised_layers(model)
    assert len(layers) == 14 and "lm_head" not in layers
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    plain = dequantised(model)
    nf4, seen = make(tmp_path / "nf4", model=model, max_steps=2)
    start_from_nonzero_adapter(nf4)
    plain, expected = make(tmp_path / "plain", model=plain, max_steps=2)
    adapter = {n: p for n, p in nf4.model.named_parameters() if p.requires_grad}
    plain.model.load_state_dict(adapter, strict=False)
    plain.start_kl = nf4.start_kl
    nf4.train()
    plain.train()
    for step in range(2):
        loss = expected.logs[step]["loss"]
        assert seen.logs[step]["loss"] == pytest.approx(loss, rel=1e-5)
        assert_close(seen.steps[step], expected.steps[step])
    for name, layer in layers.items():
        assert layer.weight.dtype == torch.uint8 and torch.equal(layer.weight, before[name])


def test_resuming_equals_not_stopping(tmp_path, quantised):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole, _ = make(tmp_path / "a", model=quantised(), **options)
    whole.train()
    resumed, seen = make(tmp_path / "b", model=quantised(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert len(seen.steps) == 2
    theirs = dict(resumed.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(theirs[name], parameter), name


def test_a_given_adapter_is_trained_as_it_is(tmp_path, quantised):
    model = get_peft_model(quantised(), tiny.lora())
    torch.nn.init.normal_(model.get_parameter(ADAPTER), generator=torch.Generator().manual_seed(1))
    before = model.get_parameter(ADAPTER).detach().clone()
    trainer, seen = make(tmp_path, model=model, peft=False)
    assert torch.equal(trainer.model.get_parameter(ADAPTER), before)
    trainer.train()
    assert seen.logs[0]["kl"] == pytest.approx(0.0, abs=1e-12)  # the reference is this adapter


def test_merging_for_a_sampler_leaves_the_base(tmp_path, quantised):
    trainer, _ = make(tmp_path, model=quantised())
    start_from_nonzero_adapter(trainer)
    layers = quantised_layers(trainer.model)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    keep_base_exact(trainer.model)
    trainer.model.merge_adapter()
    merged = quantised_layers(trainer.model)
    assert any(not torch.equal(merged[name].weight, before[name]) for name in before)
    trainer.model.unmerge_adapter()
    for name, layer in quantised_layers(trainer.model).items():
        assert torch.equal(layer.weight, before[name]), name
