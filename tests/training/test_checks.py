"""Models and adapters that would train something else are refused, and given back as they came."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import (  # noqa: E402
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.models.parameters import disable_dropout  # noqa: E402
from powerflow_fast.training import checks  # noqa: E402
from powerflow_fast.training.trials import check_pair, hidden_trial  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_transformers import offline  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

VIRTUAL = dict(task_type="CAUSAL_LM", num_virtual_tokens=2)
REFUSED_ADAPTERS = {
    "prompt": (PromptTuningConfig(**VIRTUAL), "PromptTuningConfig adds tokens before the prompt"),
    "prefix": (PrefixTuningConfig(**VIRTUAL), "PrefixTuningConfig adds tokens before the prompt"),
    "p-tuning": (
        PromptEncoderConfig(**VIRTUAL, encoder_hidden_size=8),
        "PromptEncoderConfig adds tokens before the prompt",
    ),
    "aLoRA": (
        tiny.lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "activated LoRA .* use plain LoRA",
    ),
    "bias": (tiny.lora(bias="all"), "bias='all' trains biases of the base"),
    "LoRA's bias": (tiny.lora(bias="lora_only"), "bias='lora_only' trains biases of the base"),
}


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 10)[None]).logits


@pytest.mark.parametrize("kind", REFUSED_ADAPTERS)
def test_adapters_that_would_not_act_or_move_the_reference(kind, tmp_path):
    config, said = REFUSED_ADAPTERS[kind]
    model = tiny.model()
    with pytest.raises(ValueError, match=f"peft_config: .*{said}"):
        PowerFlowTrainer(
            model,
            tiny.config(tmp_path),
            tiny.dataset(),
            processing_class=tiny.tokenizer(),
            peft_config=config,
        )
    wrapped = get_peft_model(model, config)
    with pytest.raises(ValueError, match=f"peft_config: .*{said}"):
        make(tmp_path, model=wrapped, peft=False)


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


def beside(model):
    """An adapter, and a norm of the base made trainable by hand."""
    wrapped = get_peft_model(model, tiny.lora())
    wrapped.get_base_model().model.norm.weight.requires_grad_(True)
    return wrapped


def test_a_parameter_of_the_base_beside_the_adapter_is_named(tmp_path):
    said = r"model: base_model\.model\.model\.norm\.weight is trained but is no part"
    with pytest.raises(ValueError, match=said):
        make(tmp_path, model=beside(tiny.model()), peft=False)
    with pytest.raises(ValueError, match=said):
        offline(tmp_path, model=beside(tiny.model()))


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


def test_a_head_that_is_trained_beside_the_adapter_is_named(tmp_path):
    """What moves all of its rows alike moves no log-prob, and no hidden state sees it at all."""

    def beside_head():
        wrapped = get_peft_model(tiny.model(), tiny.lora(target_modules=["q_proj"]))
        wrapped.get_base_model().lm_head.weight.requires_grad_(True)
        return wrapped

    said = r"model: base_model\.model\.lm_head\.weight is trained but is no part"
    with pytest.raises(ValueError, match=said):
        make(tmp_path, model=beside_head(), peft=False)
    with pytest.raises(ValueError, match=said):
        offline(tmp_path, model=beside_head())


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


def test_the_adapter_must_be_the_one_that_the_reference_is_copied_from(tmp_path):
    named = get_peft_model(tiny.model(), tiny.lora(), adapter_name="mine")
    with pytest.raises(ValueError, match=r"'default'.*active are \['mine'\], of \['mine'\]"):
        make(tmp_path, model=named, peft=False)
    two = get_peft_model(tiny.model(), tiny.lora(target_modules=["q_proj"]))
    two.add_adapter("other", tiny.lora(target_modules=["v_proj"]))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"active are \['default', 'other'\]"):
        make(tmp_path, model=two, peft=False)


def test_a_path_that_holds_an_adapter_alone_is_named(tmp_path):
    get_peft_model(tiny.model(), tiny.lora()).save_pretrained(tmp_path)
    for peft in (False, True):
        with pytest.raises(ValueError, match=f"model: {tmp_path} holds an adapter alone; pass the"):
            make(tmp_path / "run", model=str(tmp_path), peft=peft)


def test_one_object_serves_one_trainer_after_the_other(tmp_path):
    """The reference is then what the first has made of the adapter."""
    model = get_peft_model(tiny.model(), tiny.lora())
    for name in ("first", "second"):
        trainer, seen = make(tmp_path / name, model=model, peft=False, max_steps=2)
        start = outputs(model)
        with trainer.as_reference(model):
            assert torch.equal(outputs(model), start)
        trainer.train()
        assert seen.logs[0]["kl"] == pytest.approx(0, abs=1e-9) and seen.logs[1]["kl"] > 0
    assert not torch.equal(outputs(model), start)


@pytest.mark.parametrize("kind", REFUSED_ADAPTERS)
def test_offline_data_refuse_the_same_adapters(kind, tmp_path):
    config, said = REFUSED_ADAPTERS[kind]
    with pytest.raises(ValueError, match=f"peft_config: .*{said}"):
        offline(tmp_path, model=get_peft_model(tiny.model(), config))


def test_an_adapter_that_keeps_the_forward_it_found(tmp_path):
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    with pytest.raises(ValueError, match="model: AdaptionPromptModel has kept the forward"):
        offline(tmp_path, model=get_peft_model(tiny.model(), config))


def test_parameters_that_do_not_act():
    model = get_peft_model(tiny.model(), tiny.lora(target_modules=["q_proj"]))
    model.requires_grad_(False)
    model.get_base_model().register_parameter("unused", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="none of its trainable parameters acts"):
        check_pair(model)


def test_the_second_copy_must_be_the_model_that_was_given(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    model = type(tiny.model()).from_pretrained(tmp_path / "base")
    make(tmp_path / "fine", model=model, peft=False)
    merged = get_peft_model(model, tiny.lora(init_lora_weights=False)).merge_and_unload()
    merged.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: its .*q_proj.weight is not that of '.*base'"):
        make(tmp_path / "run", model=merged, peft=False)


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


def test_what_is_tried_is_the_hidden_states():
    model = tiny.model()
    assert hidden_trial(model).shape == (1, 8, 16)


def test_a_stream_of_prompts_trains(tmp_path):
    rows = tiny.dataset(8).to_iterable_dataset()
    trainer, seen = make(tmp_path, data=rows, max_steps=2)
    trainer.train()
    assert len(seen.steps) == 2


def test_prompts_that_cannot_make_a_rollout_are_named(tmp_path):
    def refused(rows, match, **options):
        with pytest.raises(ValueError, match=match):
            make(tmp_path, data=rows, **options)

    refused([{"prompt": "rain"}], "train_dataset: expected a datasets.Dataset, got a list")
    one = tiny.dataset(1).select(range(1))
    refused(
        one, r"expected at least 2 prompts, .*generation_batch_size 8 / num_generations 4.*got 1"
    )
    for prompt in (None, ""):
        rows = Dataset.from_dict({"prompt": [*tiny.PROMPTS, prompt]})
        refused(rows, f"train_dataset: prompt 4: expected text or messages, got {prompt!r}")


def test_reentrant_checkpointing_of_shared_keys_and_values(tmp_path):
    model = tiny.model()
    model.config.num_kv_shared_layers = 1
    options = dict(gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs: .*shares keys"):
        kwargs = dict(gradient_checkpointing_kwargs={"use_reentrant": True})
        make(tmp_path, model=model, **options, **kwargs)
    kwargs = dict(gradient_checkpointing_kwargs={"use_reentrant": False})
    make(tmp_path, model=model, **options, **kwargs)


def test_rounded_logits_reach_the_loss(tmp_path):
    logs = []
    for rounded in (False, True):
        model = tiny.model().bfloat16()
        trainer, seen = make(tmp_path, model=model, round_logits=rounded)
        trainer.train()
        logs.append(seen.logs[0]["logps/policy"])
    assert 0 < abs(logs[0] - logs[1]) < 0.1


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


def test_fsdp1_with_a_quantised_base_is_refused_at_construction(tmp_path):
    trainer, _ = make(tmp_path)
    model = trainer.model.get_base_model()
    plugin = SimpleNamespace(fsdp_version=1)
    state = SimpleNamespace(fsdp_plugin=plugin)
    stub = SimpleNamespace(accelerator=SimpleNamespace(state=state), args=trainer.args)
    checks._check_engine(stub, model)
    model.is_quantized = True
    with pytest.raises(ValueError, match="model: FSDP1 does not shard quantised layers"):
        checks._check_engine(stub, model)
    plugin.fsdp_version = 2
    checks._check_engine(stub, model)
