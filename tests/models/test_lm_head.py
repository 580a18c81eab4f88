"""Heads as read from models equal the models' own logits; unknown and adapted heads are refused."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers  # noqa: E402
from peft import get_peft_model  # noqa: E402

from powerflow_fast import linear_logprobs  # noqa: E402
from powerflow_fast.models.lm_head import (  # noqa: E402
    base_model,
    check_head,
    last_hidden_state,
    logit_transform,
    read_head,
)
from tests.helpers import tiny  # noqa: E402

SMALL = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
FAMILIES = {  # one per logit transform, with a value unlike its default
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},  # a bias
}


def build(family, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # larger than the default start, so that scale and cap show
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_those_of_the_models_logits(family):
    model = build(family, FAMILIES[family])
    check_head(model)
    head = read_head(model)
    ids = torch.randint(3, 50, (2, 7))
    targets = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        hidden = last_hidden_state(model, ids, torch.ones_like(ids))
        logits = model(ids).logits.double()
        ours = linear_logprobs(hidden, head.weight, targets, bias=head.bias, **head.transform)
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)
    plain = {"logit_scale": 1.0, "softcap": None}
    assert (head.transform == plain and head.bias is None) == (family == "Llama")


def test_a_transform_that_the_config_does_not_name_is_refused():
    model = build("Llama", {})
    head = model.lm_head
    model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden.tanh(), head.weight)
    with pytest.raises(ValueError, match="not the softcap"):
        check_head(model)


def test_known_refusals():
    llama = transformers.LlamaConfig(**SMALL)
    llama.unpadded_vocab_size = 48
    with pytest.raises(ValueError, match="unpadded_vocab_size"):
        logit_transform(llama)
    with pytest.raises(ValueError, match="bert"):
        logit_transform(transformers.BertConfig())
    with pytest.raises(ValueError, match="expected a linear output layer"):
        read_head(build("Llama", {}).model)


def test_hyperclovax_multiplies_where_granite_divides():
    config = transformers.GraniteConfig(**SMALL, logits_scaling=4.0)
    assert logit_transform(config)["logit_scale"] == 0.25
    config.model_type = "hyperclovax"
    assert logit_transform(config)["logit_scale"] == 4.0


def test_adapted_head_is_refused_and_a_trained_one_is_read():
    adapted = get_peft_model(tiny.model(), tiny.lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="carries an adapter"):
        read_head(base_model(adapted))
    trained = get_peft_model(tiny.model(), tiny.lora(modules_to_save=["lm_head"]))
    own = read_head(base_model(trained)).weight
    assert own.requires_grad
    with trained.disable_adapter():
        frozen = read_head(base_model(trained)).weight
    assert frozen is not own and not frozen.requires_grad
