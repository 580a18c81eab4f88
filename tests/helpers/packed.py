"""Toy models of many families, rows of prompts and completions, and what a layout makes of them."""

import torch

from powerflow_fast.models.packing import lay_out

WORDS = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZE = WORDS | dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.3,
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SLIDES = dict(
    sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
)
MODELS = {
    "Llama": SIZE,
    "Qwen3": SIZE,
    "Mistral": SIZE | dict(sliding_window=4),
    "Gemma2": SIZE | SLIDES,  # soft caps
    "Gemma3Text": SIZE | SLIDES,
    "GPT2": WORDS | dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    "GptOss": SIZE | SLIDES | EXPERTS,  # sinks
    "Mixtral": SIZE | EXPERTS | dict(sliding_window=None),
    "DeepseekV3": SIZE  # values narrower than keys
    | dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8)
    | dict(qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2)
    | dict(n_group=1, topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16)
    | dict(n_shared_experts=1),
}


def build(name, dtype=torch.float32, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(**(MODELS.get(name, {}) | options))
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} if name in ("Gemma2", "GptOss") else {}
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **eager).eval()


def batch(*rows):
    """Ids, mask and prompt lengths of (prompt, completion); prompts are padded on the left."""
    start, width = (max(len(row[i]) for row in rows) for i in (0, 1))
    ids = torch.zeros(len(rows), start + width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        place = slice(start - len(prompt), start + len(completion))
        ids[i, place], mask[i, place] = torch.tensor([*prompt, *completion]), 1
    return ids, mask, torch.tensor([len(prompt) for prompt, _ in rows])


LONG, SHORT = [5, 6, 7, 8, 9, 10, 11], [12, 13]
ROWS = [
    (LONG, [20, 21, 22]),
    (LONG, [23]),
    (SHORT, [24, 25, 26, 27, 28, 29]),
    (LONG, []),  # an empty completion
    (SHORT, [30, 31, 32]),
    ([14], [33, 34]),  # a group of one, whose prompt has one token
    (LONG, [35, 36, 37, 38]),
]


def states_and_gradients(model, layout, ids, mask, prompts, scored):
    """The states that predict `scored` tokens, of the last columns, a gradient of all parameters
    towards random ones, both [...] float64 on the CPU, and the rows."""
    device = next(model.parameters()).device
    rows = lay_out(*(x.to(device) for x in (ids, mask, prompts)), layout)
    found = rows.predicting(rows.hidden_states(model), scored.to(device))
    toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    model.zero_grad()
    (found * toward).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found.detach().cpu().double(), torch.cat(grads).cpu().double(), rows


def states(model, rows, layout, hole=None):
    """Of completions alone; those in column `hole` do not count."""
    ids, mask, prompts = batch(*rows)
    scored = mask[:, int(prompts.max()) :].bool()
    if hole is not None:
        scored[:, hole] = False
    return states_and_gradients(model, layout, ids, mask, prompts, scored)


def assert_same(got, expected, dtype=torch.float32):
    limit = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.04)}[dtype]
    for one, other, bound in zip(got[:2], expected[:2], limit, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() / other.norm() < bound
