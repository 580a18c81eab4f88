"""Sizes of published decoder models, for benchmarks and for planning memory without a download.

Sources: the `config.json` of each model's repository on the Hugging Face Hub, read through
litgpt's table of them (Lightning-AI/litgpt at 26857050, litgpt/config.py; `padded_vocab_size` is
the head's rows) and the defaults of transformers 5.23 (Gemma2Config is Gemma 2 2B, SmolLM3Config
SmolLM3 3B, the text model of Mistral3Config Mistral Small 3.1 24B). Elsewhere: Mistral Nemo's
config.json as kevinstephano/thunder_model_blocks quotes it, DeepSeek-R1-Distill-Qwen-1.5B's in
Captainphiora/qwen-ascend-llm. A test compares parameter counts with transformers models on the meta
device and with the published counts. `names.py` finds an entry by the names people write.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Family(NamedTuple):
    """What differs between architectures that are equal otherwise."""

    norms: int = 2  # RMS norms of the hidden size in each layer
    qkv_bias: bool = False
    qk_norm: bool = False  # RMS norms of queries and keys, of the head's size
    fused: bool = False  # one linear layer for queries, keys and values, one for gate and up
    wide_scale: bool = False  # norms multiply by their weights in float32


FAMILIES = {  # transformers' model_type
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "phi3": Family(fused=True),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "gemma2": Family(norms=4, wide_scale=True),
    "gemma3_text": Family(norms=4, qk_norm=True, wide_scale=True),
}


# Tried with transformers 5.23, PEFT 0.21 and bitsandbytes on a small Mixtral.
NO_EXPERTS = (
    "is a mixture of experts, which is not counted: NF4 leaves experts unquantised, and LoRA on "
    "them builds whole weight updates in each pass; expected a dense decoder"
)


# Keys of a config.json. The derived ones may be null or absent.
SIZES = "hidden_size vocab_size num_hidden_layers num_attention_heads intermediate_size".split()
DERIVED = ("num_key_value_heads", "head_dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
LARGEST_SIZE = 10**9


def check_sizes(values: Mapping[str, Any], may_lack: Collection[str] = ()) -> None:
    """ValueError for the first key of a config.json whose value is no size of a model.

    Args:
        values: keys and values as they were read; other keys than sizes are left alone.
        may_lack: keys that may be absent or null, beside those that are derived from others.
    """
    for name in (*SIZES, *DERIVED, *EXPERTS):
        value, least = values.get(name), 0 if name in EXPERTS else 1
        if value is None and name in (*DERIVED, *EXPERTS, *may_lack):
            continue
        if type(value) is not int or not least <= value <= LARGEST_SIZE:
            got = reprlib.repr(value) if name in values else "no such key"
            raise ValueError(
                f"{name}: expected a whole number from {least} to {LARGEST_SIZE:.0e}, got {got}"
            )
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        wanted = f"a divisor of num_attention_heads={heads}"
        raise ValueError(f"num_key_value_heads: expected {wanted}, got {kv_heads}")


@dataclass(frozen=True)
class ModelShape:
    """What memory and time of a dense decoder depend on."""

    model_type: str
    hidden_size: int
    vocab_size: int  # rows of the head
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool = False  # the head is the embedding
    softcap: float | None = None  # of the logits

    def linear_layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each linear layer of one decoder layer."""
        h, i = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if FAMILIES[self.model_type].fused:
            return [(h, q + 2 * kv), (q, h), (h, 2 * i), (i, h)]
        return [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]

    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        family = FAMILIES[self.model_type]
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        small = family.norms * self.hidden_size
        small += (q + 2 * kv) * family.qkv_bias + 2 * self.head_dim * family.qk_norm
        return sum(inputs * outputs for inputs, outputs in self.linear_layers()) + small

    def parameters(self) -> int:
        """All parameters, a tied head counted once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.num_layers * self.layer_parameters() + self.hidden_size

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> ModelShape:
        """The shape of a transformers configuration, or of its text model where it has several.

        Raises:
            ValueError: for an architecture whose parameters are not known here, and for sizes that
                no model has.
        """
        config = config.get_text_config()
        sizes = {name: getattr(config, name, None) for name in (*SIZES, *DERIVED, *EXPERTS)}
        experts = (sizes[name] for name in EXPERTS)
        if any(isinstance(count, int) and count > 1 for count in experts):
            raise ValueError(f"config: {config.model_type} {NO_EXPERTS}")
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"config: expected a model_type of {', '.join(FAMILIES)}, "
                f"got {config.model_type!r}; its parameters would be miscounted"
            )
        if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
            raise ValueError(
                f"config: expected a {config.model_type} without biases, got attention_bias or "
                "mlp_bias set; its parameters would be miscounted"
            )
        check_sizes(sizes)
        hidden, heads = config.hidden_size, config.num_attention_heads
        if not sizes["head_dim"] and hidden % heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size={hidden}, got {heads}"
            )
        return cls(
            model_type=config.model_type,
            hidden_size=hidden,
            vocab_size=config.vocab_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=sizes["num_key_value_heads"] or heads,
            head_dim=sizes["head_dim"] or hidden // heads,
            intermediate_size=config.intermediate_size,
            tied=bool(config.tie_word_embeddings),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def to_config(self, **options) -> PretrainedConfig:
        """A transformers configuration of this shape; `options` replace any of its attributes."""
        from transformers import AutoConfig

        sizes: dict[str, Any] = dict(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            tie_word_embeddings=self.tied,
        )
        if self.softcap is not None:
            sizes["final_logit_softcapping"] = self.softcap
        return AutoConfig.for_model(self.model_type, **sizes | options)


def model_shape(name: str) -> ModelShape:
    """The shape of a published model by its name here; ValueError lists the names there are."""
    if name not in MODEL_SHAPES:
        raise ValueError(f"name: expected one of {', '.join(MODEL_SHAPES)}; got {name!r}")
    return MODEL_SHAPES[name]


def _shapes(model_type: str, rows: dict[str, tuple], **common) -> dict[str, ModelShape]:
    return {name: ModelShape(model_type, *sizes, **common) for name, sizes in rows.items()}


# name: hidden, vocabulary, layers, heads, key-value heads, head size, intermediate[, tied]
MODEL_SHAPES: dict[str, ModelShape] = {
    **_shapes(
        "llama",
        {
            "Llama-2-7B": (4096, 32000, 32, 32, 32, 128, 11008),
            "Llama-2-13B": (5120, 32000, 40, 40, 40, 128, 13824),
            "Llama-2-70B": (8192, 32000, 80, 64, 8, 128, 28672),
            "Llama-3-8B": (4096, 128256, 32, 32, 8, 128, 14336),
            "Llama-3-70B": (8192, 128256, 80, 64, 8, 128, 28672),
            "Llama-3.1-405B": (16384, 128256, 126, 128, 8, 128, 53248),
            "Llama-3.2-1B": (2048, 128256, 16, 32, 8, 64, 8192, True),
            "Llama-3.2-3B": (3072, 128256, 28, 24, 8, 128, 8192, True),
            "SmolLM2-135M": (576, 49152, 30, 9, 3, 64, 1536, True),
            "SmolLM2-360M": (960, 49152, 32, 15, 5, 64, 2560, True),
            "SmolLM2-1.7B": (2048, 49152, 24, 32, 32, 64, 8192, True),
            "TinyLlama-1.1B": (2048, 32000, 22, 32, 4, 64, 5632),
        },
    ),
    **_shapes("smollm3", {"SmolLM3-3B": (2048, 128256, 36, 16, 4, 128, 11008, True)}),
    **_shapes(
        "mistral",
        {
            "Mistral-7B-v0.1": (4096, 32000, 32, 32, 8, 128, 14336),
            "Mistral-7B-v0.3": (4096, 32768, 32, 32, 8, 128, 14336),
            "Mistral-Nemo-12B": (5120, 131072, 40, 32, 8, 128, 14336),
            "Mistral-Small-24B": (5120, 131072, 40, 32, 8, 128, 32768),
            "Mistral-Large-123B": (12288, 32768, 88, 96, 8, 128, 28672),
        },
    ),
    **_shapes(
        "phi3",
        {
            "Phi-3-mini": (3072, 32064, 32, 32, 32, 96, 8192),
            "Phi-4-mini": (3072, 200064, 32, 24, 8, 128, 8192, True),
            "Phi-4": (5120, 100352, 40, 40, 10, 128, 17920),
        },
    ),
    **_shapes(
        "qwen2",
        {
            "Qwen2.5-0.5B": (896, 151936, 24, 14, 2, 64, 4864, True),
            "Qwen2.5-1.5B": (1536, 151936, 28, 12, 2, 128, 8960, True),
            "Qwen2.5-3B": (2048, 151936, 36, 16, 2, 128, 11008, True),
            "Qwen2.5-7B": (3584, 152064, 28, 28, 4, 128, 18944),
            "Qwen2.5-14B": (5120, 152064, 48, 40, 8, 128, 13824),
            "Qwen2.5-32B": (5120, 152064, 64, 40, 8, 128, 27648),
            "Qwen2.5-72B": (8192, 152064, 80, 64, 8, 128, 29568),
            "DeepSeek-R1-Distill-Qwen-1.5B": (1536, 151936, 28, 12, 2, 128, 8960),
        },
    ),
    **_shapes(
        "qwen3",
        {
            "Qwen3-0.6B": (1024, 151936, 28, 16, 8, 128, 3072, True),
            "Qwen3-1.7B": (2048, 151936, 28, 16, 8, 128, 6144, True),
            "Qwen3-4B": (2560, 151936, 36, 32, 8, 128, 9728, True),
            "Qwen3-8B": (4096, 151936, 36, 32, 8, 128, 12288),
            "Qwen3-14B": (5120, 151936, 40, 40, 8, 128, 17408),
            "Qwen3-32B": (5120, 151936, 64, 64, 8, 128, 25600),
        },
    ),
    **_shapes(
        "gemma2",
        {
            "Gemma-2-2B": (2304, 256000, 26, 8, 4, 256, 9216),
            "Gemma-2-9B": (3584, 256000, 42, 16, 8, 256, 14336),
            "Gemma-2-27B": (4608, 256000, 46, 32, 16, 128, 36864),
        },
        tied=True,
        softcap=30.0,
    ),
    # Gemma 3 dropped the softcap. The head of 4B and larger has 64 rows more than the tokenizer.
    **_shapes(
        "gemma3_text",
        {
            "Gemma-3-1B": (1152, 262144, 26, 4, 1, 256, 6912),
            "Gemma-3-4B": (2560, 262208, 34, 8, 4, 256, 10240),
            "Gemma-3-12B": (3840, 262208, 48, 16, 8, 256, 15360),
            "Gemma-3-27B": (5376, 262208, 62, 32, 16, 128, 21504),
        },
        tied=True,
    ),
}
