"""Every causal language model of transformers at toy size: our log-probs against its own logits.

`python -m tests.integrations.architectures` walks them all and writes architectures.json beside
this file: per model type "passes", "refused: ...", or why no toy model of it was built; and whether
it computes a prompt once for several completions, or why not.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from powerflow_fast.integrations.transformers import patch_head
from powerflow_fast.models.packing_check import choose_layout
from tests.helpers.numerics import EPS32
from tests.helpers.packed import states_and_gradients

RESULTS = Path(__file__).with_name("architectures.json")
VOCAB = 67  # odd, so that a padded or sliced vocabulary shows
MOST_PARAMETERS = 30e6
SIZES = {  # toy value: the names that configurations give to it
    VOCAB: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions max_seq_len n_ctx intermediate_size ffn_dim d_ff "
    "n_inner dff decoder_ffn_dim encoder_ffn_dim intermediate_size_mlp dim_ff block_ff_dim",
    32: "hidden_size n_embd d_model dim embed_dim emb_dim n_embed dim_model embedding_size "
    "word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size "
    "attention_hidden_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    16: "q_lora_rank kv_lora_rank o_lora_rank",
    5: "sliding_window",
    8: "head_dim global_head_dim dim_head attention_head_dim kv_channels qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim rotary_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads num_experts "
    "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
    "num_local_experts n_routed_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers "
    "num_encoder_layers num_decoder_layers num_key_value_heads num_global_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_top_k moe_k top_k_experts",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    # Logit transforms, unlike their defaults.
    3.0: "final_logit_softcapping logits_soft_cap output_logit_soft_cap logits_scaling",
    0.5: "logit_scale lm_head_multiplier output_multiplier",
}
TOY = {name: value for value, names in SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPECIAL = {  # what else a family insists on
    "bamba": {"mamba_n_heads": 8},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8},
    "gemma3.text_config": {"final_logit_softcapping": None},  # which this class never reads
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mpt": {"logit_scale": None},  # likewise
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def toy_config(config_class, name: str):
    """The default configuration with small sizes; `name` is its path in SPECIAL."""
    default = config_class()
    known = default.to_dict()
    toy = {key: value for key, value in (TOY | TOKENS).items() if key in known}
    if known.get("kv_lora_rank") is not None and "num_key_value_heads" in known:
        toy["num_key_value_heads"] = toy["num_attention_heads"]  # latent attention has no groups
    for part in config_class.sub_configs:
        if (sub := getattr(default, part, None)) is not None:
            toy[part] = toy_config(type(sub), f"{name}.{part}")
    return config_class(**toy | SPECIAL.get(name, {}))


def build(model_type: str):
    """A random toy model whose logits spread over a few nats."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    config = toy_config(config_class, model_type)
    if model_class.config_class is not config_class:
        config = config.get_text_config(decoder=True)
    config.is_decoder = True
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check(model_type: str) -> str:
    """One line on `model_type`; raises AssertionError where log-probs differ."""
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    try:
        model = build(model_type)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits.double()
        if not (logits.isfinite().all() and logits.shape == (2, 9, VOCAB)):
            raise ValueError(f"its logits are not finite, or {tuple(logits.shape)}")
    except Exception as error:  # whatever a configuration that we made up leads to
        return f"no toy model: {type(error).__name__}: {' '.join(str(error).split())[:150]}"
    try:
        patch_head(model)
    except ValueError as error:
        return f"refused: {error}"
    with torch.no_grad():
        ours = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    expected = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    # The model's own float32 logits are off by their rounding: 32 terms, then a scale or a cap.
    tolerance = 64 * EPS32 * (1 + logits.abs().max().item())
    error = (ours - expected).abs().max().item()
    assert error <= tolerance, f"{model_type}: log-probs differ by {error:.2g} > {tolerance:.2g}"
    return "passes"


def check_sharing(model_type: str) -> str:
    """One line on shared prompts; raises AssertionError where states or gradients differ."""
    model = build(model_type)
    choice = choose_layout(model, "auto")
    if choice.best != "shared":
        return choice.reason.removeprefix("shared_prompt: ")
    ids = torch.randint(3, VOCAB, (5, 17), generator=torch.Generator().manual_seed(0))
    ids[1:3, :9], ids[4, :9] = ids[0, :9], ids[3, :9]
    mask = torch.ones_like(ids)
    mask[1, 12:], mask[2, 9:], mask[4, 15:] = 0, 0, 0
    batch = ids, mask, torch.full((5,), 9), mask[:, 1:].bool()
    found = [states_and_gradients(model, way, *batch)[:2] for way in ("padded", "shared")]
    for apart, together, limit in zip(*found, (1e-4, 1e-3), strict=True):
        error = float((together - apart).norm() / apart.norm())
        assert error < limit, f"{model_type}: a shared prompt differs by {error:.2g} > {limit:.2g}"
    return "computed once"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results, sharing = {}, {}
    for model_type in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        results[model_type] = check(model_type)
        if not results[model_type].startswith("no toy model"):
            sharing[model_type] = check_sharing(model_type)
        print(f"{model_type}: {results[model_type]}; {sharing.get(model_type)}", flush=True)
    print(Counter(line.split(":")[0] for line in results.values()))
    once = sum(line == "computed once" for line in sharing.values())
    print(f"a prompt is computed once by {once} of {len(sharing)}")
    if not sys.argv[1:]:
        result = {"transformers": transformers.__version__, "architectures": results}
        result["shared_prompt"] = sharing
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
