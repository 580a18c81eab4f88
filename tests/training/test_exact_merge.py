"""An adapter that is merged for the sampler leaves the base as it was, bit by bit."""

import pytest
import torch

pytest.importorskip("peft")

import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

from powerflow_fast.training.exact_merge import keep_base_exact  # noqa: E402
from tests.helpers import tiny  # noqa: E402


def adapted():
    model = get_peft_model(tiny.model().to(torch.bfloat16), tiny.lora())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def merged_and_back(model):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        model.merge_adapter()
        name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
        assert not torch.equal(dict(model.named_parameters())[name], before[name])
        model.unmerge_adapter()
    return [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]


def test_bfloat16_drifts_without_and_not_with():
    assert merged_and_back(adapted())
    model = adapted()
    keep_base_exact(model)
    assert merged_and_back(model) == []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.arange(2, 8)[None]).logits.sum().backward()
    optimizer.step()  # the parameters are still those of the model
    assert merged_and_back(model) == []


def test_experts_come_back_too(tmp_path):
    """One parameter for all experts, with an adapter around it instead of a layer."""
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config).bfloat16()
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False
    )
    model = get_peft_model(model, lora)
    base = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    keep_base_exact(model)
    model.merge_adapter()
    model.unmerge_adapter()
    now = {n: p for n, p in model.named_parameters() if "lora" not in n}
    assert now.keys() == base.keys() and all(torch.equal(now[n], base[n]) for n in base)
