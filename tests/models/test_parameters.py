"""Which parameters are trained, whether a model is all there, and what drops out in it."""

import pytest
import torch

pytest.importorskip("trl")

from peft import get_peft_model  # noqa: E402

from powerflow_fast.models.parameters import (  # noqa: E402
    disable_dropout,
    dropouts,
    is_sharded,
    trained_parameters,
)
from tests.helpers import tiny  # noqa: E402


def test_an_adapter_alone_is_trained():
    model = get_peft_model(tiny.model(), tiny.lora(target_modules=["q_proj"]))
    trained = trained_parameters(model)
    assert trained and all("lora_" in name for name in trained)
    assert all(parameter.requires_grad for parameter in trained.values())


def test_a_model_without_its_values_is_no_whole_one():
    model = tiny.model()
    assert not is_sharded(model)
    assert is_sharded(model.to("meta"))
    model = tiny.model()
    model.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert is_sharded(model)


def test_dropouts_are_layers_and_numbers():
    model = tiny.model(attention_dropout=0.1)
    model.dropout = torch.nn.Dropout(0.2)
    values = {value for _, _, value in dropouts(model)}
    assert values == {0.1, 0.2}
    disable_dropout(model)
    assert model.dropout.p == 0 and {value for _, _, value in dropouts(model)} == {0.0}
