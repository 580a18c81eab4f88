"""A model that a trainer refuses is given back as it came."""

import pytest
import torch

pytest.importorskip("trl")

from peft import get_peft_model  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import offline  # noqa: E402
from tests.training.test_checks import beside, outputs  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402


def test_a_refusal_of_an_adapter_is_no_obstacle_afterwards(tmp_path):
    model = beside(tiny.model())
    for _ in range(2):
        with pytest.raises(ValueError, match="is trained but is no part"):
            make(tmp_path, model=model, peft=False)
        assert list(model.peft_config) == ["default"]
    model.get_base_model().model.norm.weight.requires_grad_(False)
    trainer, seen = make(tmp_path, model=model, peft=False)
    trainer.train()
    assert seen.steps


@pytest.mark.parametrize("adapted", [False, True])
def test_a_refusal_gives_the_model_back(adapted, tmp_path):
    """The same object trains afterwards, as if nothing had been tried."""
    model = tiny.model(attention_dropout=0.1).eval()
    if adapted:
        model = get_peft_model(model, tiny.lora(target_modules=["lm_head", "q_proj"]))
        peft = None
    else:
        peft = tiny.lora(target_modules=["lm_head", "q_proj"])
    names = [name for name, _ in model.named_parameters()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modules = [(type(module), module.training) for module in model.modules()]
    before = outputs(model)
    for checkpointing in (False, True):
        with pytest.raises(ValueError, match="lm_head"):
            PowerFlowTrainer(
                model,
                tiny.config(tmp_path, gradient_checkpointing=checkpointing),
                tiny.dataset(),
                processing_class=tiny.tokenizer(),
                peft_config=peft,
            )
        assert [name for name, _ in model.named_parameters()] == names
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert [(type(module), module.training) for module in model.modules()] == modules
        attention = (model.get_base_model() if adapted else model).model.layers[0].self_attn
        assert attention.attention_dropout == 0.1
        assert torch.equal(outputs(model), before)
    if not adapted:
        trainer, seen = make(tmp_path, model=model)
        trainer.train()
        assert seen.steps


def test_an_offline_trainer_gives_the_model_back_too(tmp_path):
    model = beside(tiny.model())
    before = outputs(model)
    with pytest.raises(ValueError, match="norm"):
        offline(tmp_path, model=model)
    assert "forward" not in vars(model.get_base_model())
    assert torch.equal(outputs(model), before)
