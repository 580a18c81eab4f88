"""Models, adapters and prompts that would train something else are refused."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from peft import (  # noqa: E402
    AdaptionPromptConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from powerflow_fast.training import checks  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import offline  # noqa: E402
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


def test_the_second_copy_must_be_the_model_that_was_given(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    model = type(tiny.model()).from_pretrained(tmp_path / "base")
    make(tmp_path / "fine", model=model, peft=False)
    merged = get_peft_model(model, tiny.lora(init_lora_weights=False)).merge_and_unload()
    merged.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: its .*q_proj.weight is not that of '.*base'"):
        make(tmp_path / "run", model=merged, peft=False)


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
