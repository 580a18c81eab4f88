"""An adapter that is merged for the sampler leaves the base as it was, bit by bit."""

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402

from powerflow_fast.exact_merge import keep_base_exact  # noqa: E402
from tests import tiny  # noqa: E402


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
