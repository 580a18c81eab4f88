"""The table of model shapes against transformers and against published parameter counts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, Gemma2Config, LlamaConfig

from powerflow_fast.models.shapes import FAMILIES, MODEL_SHAPES, ModelShape, model_shape

# Numbers of parameters that the models' pages on the Hugging Face Hub give. They hold even where
# the table and the configuration built from it are wrong together, e.g. about a tied head.
PUBLISHED = {
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "TinyLlama-1.1B": 1_100_048_384,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Phi-3-mini": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "SmolLM3-3B": 3_075_098_624,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-1B": 999_885_952,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_parameters_are_those_of_the_transformers_model(name):
    shape = model_shape(name)
    config = shape.to_config()
    assert ModelShape.from_config(config) == shape
    # Layers are alike: two models with one layer and two give every count, and build fast.
    counts = []
    for layers in (1, 2):
        config = shape.to_config(num_hidden_layers=layers, layer_types=["full_attention"] * layers)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        counts.append(model.num_parameters())
    assert counts[1] - counts[0] == shape.layer_parameters()
    assert counts[0] + (shape.num_layers - 1) * shape.layer_parameters() == shape.parameters()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    assert model_shape(name).parameters() == PUBLISHED[name]


def test_defaults_of_transformers():
    assert ModelShape.from_config(Gemma2Config()) == model_shape("Gemma-2-2B")
    llama = ModelShape.from_config(LlamaConfig())  # no head_dim, no num_key_value_heads
    assert (llama.num_kv_heads, llama.head_dim) == (32, 128)
    assert llama.parameters() == 6_738_415_616  # Llama 7B's published count


def test_bad_input():
    with pytest.raises(ValueError, match="name: expected one of Llama-2-7B, .*; got 'Llama-9-1B'"):
        model_shape("Llama-9-1B")
    with pytest.raises(ValueError, match="config: expected a model_type of llama, .*got 'bert'"):
        ModelShape.from_config(BertConfig())
    with pytest.raises(ValueError, match="config: expected a llama without biases"):
        ModelShape.from_config(LlamaConfig(attention_bias=True))
    assert {shape.model_type for shape in MODEL_SHAPES.values()} <= set(FAMILIES)
