"""What a few tokens tell of a model: whether it can be the policy, and its own reference."""

import pytest
import torch

pytest.importorskip("trl")

import transformers  # noqa: E402
from peft import IA3Config, LNTuningConfig, get_peft_model  # noqa: E402

from powerflow_fast.models.parameters import disable_dropout  # noqa: E402
from powerflow_fast.training.trials import check_copy, check_pair, hidden_trial  # noqa: E402
from tests.helpers import tiny  # noqa: E402

ACTING = {
    "LoRA": tiny.lora(),
    "DoRA": tiny.lora(use_dora=True),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms": LNTuningConfig(target_modules=["norm"]),
    "whole head": tiny.lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": tiny.lora(target_modules=["q_proj"], trainable_token_indices=[2, 3]),
}


@pytest.mark.parametrize("kind", ACTING)
def test_adapters_that_act_pass_and_are_as_they_were(kind):
    model = get_peft_model(tiny.model(), ACTING[kind])
    disable_dropout(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.random.get_rng_state()
    check_pair(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_a_layer_norm_hides_from_an_even_step_is_seen():
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=20)
    wrapped = get_peft_model(
        transformers.GPT2LMHeadModel(config), tiny.lora(target_modules=["c_attn"])
    )
    disable_dropout(wrapped)
    check_pair(wrapped)
    wrapped.get_base_model().transformer.h[1].mlp.c_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: .*h\.1\.mlp\.c_proj\.bias is trained but is no"):
        check_pair(wrapped)


def test_parameters_that_do_not_act():
    model = get_peft_model(tiny.model(), tiny.lora(target_modules=["q_proj"]))
    model.requires_grad_(False)
    model.get_base_model().register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="none of its trainable parameters acts"):
        check_pair(model)


SIZE = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_size=16)
SIZE |= dict(num_hidden_layers=2, num_attention_heads=2)


def test_layers_that_are_random_in_training_are_refused():
    """Falcon reads one dropout from its configuration; Phi-MoE jitters its routing."""
    experts = dict(num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=1)
    for model in (
        transformers.FalconForCausalLM(transformers.FalconConfig(**SIZE, hidden_dropout=0.3)),
        transformers.PhimoeForCausalLM(
            transformers.PhimoeConfig(
                **SIZE, **experts, intermediate_size=32, router_jitter_noise=0.5
            )
        ),
    ):
        disable_dropout(model)
        with pytest.raises(ValueError, match=f"model: .* differ by .*{type(model).__name__}"):
            check_pair(model)


def test_a_layer_that_is_left_out_in_training_is_kept():
    config = transformers.OPTConfig(**SIZE, ffn_dim=32, word_embed_proj_dim=16, layerdrop=0.9)
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(ValueError, match="differ"):
        check_pair(model)
    disable_dropout(model)
    check_pair(model)


def test_what_is_tried_is_the_hidden_states():
    model = tiny.model()
    assert hidden_trial(model).shape == (1, 8, 16)


def test_sums_in_no_fixed_order_are_not_taken_for_a_reference_that_moves():
    """As of experts on a GPU: two passes over the same tokens differ by roundings."""
    model = get_peft_model(tiny.model(), tiny.lora())
    generator = torch.Generator().manual_seed(0)

    def trial():
        hidden = hidden_trial(model.get_base_model())
        return hidden * (1 + 1e-6 * torch.rand(hidden.shape, generator=generator))

    check_pair(model, trial=trial)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="norm.weight is trained but is no part"):
        check_pair(model, trial=trial)


def test_a_copy_that_is_sharded_is_left_to_the_first_step():
    """ZeRO leaves empty tensors; a DeepSpeed engine around the copy is taken off before."""
    policy, copy = tiny.model(), tiny.model()
    for parameter in copy.parameters():
        parameter.data = parameter.data.new_empty(0)
    check_copy(policy, copy)
