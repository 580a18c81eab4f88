"""Which models share a prompt, and what is said of those that cannot."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from powerflow_fast.models.packing_check import LayoutChoice, check_packing, choose_layout  # noqa: E402
from tests.helpers.packed import MODELS, SIZE, WORDS, build  # noqa: E402

HYBRID = SIZE | dict(layer_types=["conv", "full_attention", "conv"])
MAMBA = dict(hidden_size=16, num_hidden_layers=2, vocab_size=60, num_heads=4, head_dim=8)
REFUSED = {
    "recurrent": ("Mamba2", MAMBA | dict(state_size=4, n_groups=1, expand=2), "linear_attention"),
    "convolutions": ("Lfm2", HYBRID, "layers of type conv"),
    "chunks": (
        "Llama4Text",
        SIZE | dict(intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=4),
        "layers of type chunked_attention",
    ),
    "own attention": ("Falcon", WORDS | dict(hidden_size=32, num_hidden_layers=2), "0 attend"),
    "own eager attention": ("Bloom", WORDS | dict(hidden_size=32, n_layer=2), "does not attend"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_share_fall_back_or_say_so(kind):
    name, config, why = REFUSED[kind]
    model = build(name, **config | dict(num_attention_heads=4) if name == "Falcon" else config)
    before = model.config._attn_implementation
    choice = choose_layout(model, "auto")
    assert choice.best == "padded" and why in choice.reason and "\n" not in choice.reason
    assert choice.reason.startswith("shared_prompt: each completion computes its prompt")
    with pytest.raises(ValueError, match=f"shared_prompt: .*{why}.*leave it 'auto'"):
        choose_layout(model, "on")
    with pytest.raises(ValueError, match="padding_free: .*leave it off"):
        choose_layout(model, "off", True)
    assert choose_layout(model, "off") == LayoutChoice("padded")
    assert model.config._attn_implementation == before


def test_experts_with_a_capacity_fall_back():
    model = build("Mixtral")
    model.config.expert_capacity = 4
    choice = choose_layout(model, "auto", padding_free=True)
    assert choice.best == choice.plain == "packed"
    assert "drops tokens by how many there are (expert_capacity)" in choice.reason


def test_a_model_whose_segments_leak_is_found_out():
    class Mixing(nn.Module):
        """A layer that mixes tokens on a side of its own."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden, **options):
            return self.inner(hidden, **options) + 0.2 * hidden.cumsum(1)

    model = build("Llama")
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    choice = choose_layout(model, "auto")
    assert choice.best == "padded" and "packed sequences influence each other" in choice.reason


def test_a_window_that_is_not_told_is_found_out():
    model = build("Mistral")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**MODELS["Llama"], sliding_window=None)
        layer.self_attn.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="layer 0 does not say how far its window reaches"):
        check_packing(model, "shared")


def test_flex_attention_with_soft_caps_falls_back():
    model = build("Gemma2")
    model.set_attn_implementation("flex_attention")
    choice = choose_layout(model, "auto")
    assert (
        choice.best == "padded" and "with softcap, s_aux (sinks) or position_bias" in choice.reason
    )


def test_on_a_gpu_few_tokens_are_not_worth_it():
    """The host sets the time there; a prompt is shared all the same where that is asked for."""
    model = build("Llama")
    auto, on = (choose_layout(model, way, padding_free=True) for way in ("auto", "on"))
    assert auto.least_tokens == pytest.approx(
        6e11 / (sum(p.numel() for p in model.model.layers.parameters()) / 3),
        rel=0.2,  # the head counts, too
    )
    few, many = (SimpleNamespace(is_cuda=True, numel=lambda n=n: n) for n in (1e6, 1e9))
    assert [auto.of(few), auto.of(many)] == ["packed", "shared"]
    assert on.of(few) == "shared"
    assert auto.of(torch.zeros(2, 2)) == "shared"
