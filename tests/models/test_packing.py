"""Rows in which prompts lie once give what a row for each sequence gives: states and gradients."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import AttentionInterface, AutoModelForCausalLM  # noqa: E402

from powerflow_fast.models import packed_attention  # noqa: E402
from powerflow_fast.models.packed_attention import EAGER, accept_packed_rows  # noqa: E402
from powerflow_fast.models.packing import lay_out  # noqa: E402
from powerflow_fast.models.packing_check import LayoutChoice, check_packing, choose_layout  # noqa: E402
from tests.models import test_sampling  # noqa: E402

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
HYBRID = SIZE | dict(layer_types=["conv", "full_attention", "conv"])
MAMBA = dict(hidden_size=16, num_hidden_layers=2, vocab_size=60, num_heads=4, head_dim=8)


def build(name, dtype=torch.float32, **options):
    config = getattr(transformers, f"{name}Config")(**(MODELS.get(name, {}) | options))
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"} if name in ("Gemma2", "GptOss") else {}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **eager).eval()


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


def states(model, rows, layout, hole=None):
    """The states that predict completion tokens, and a gradient of the parameters."""
    ids, mask, prompts = batch(*rows)
    laid = lay_out(ids, mask, prompts, layout)
    counted = mask[:, int(prompts.max()) :].bool()
    if hole is not None:
        counted[:, hole] = False
    found = laid.predicting(laid.hidden_states(model), counted)
    model.zero_grad()
    toward = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    (found * toward).sum().backward()
    grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return found.detach().float(), torch.cat(grads), laid


def assert_same(got, expected, dtype=torch.float32):
    limit = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.04)}[dtype]
    for one, other, bound in zip(got[:2], expected[:2], limit, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() / other.norm() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_states_and_gradients_are_those_of_rows_apart(name, dtype):
    model = build(name, dtype)
    assert choose_layout(model, "auto").best == "shared"
    expected = states(model, ROWS, "padded")
    for layout, tokens in (("packed", 52), ("shared", 29)):
        got = states(model, ROWS, layout)
        assert got[2].input_ids.shape == (1, tokens)
        assert got[2].saved == 52 - tokens
        assert_same(got, expected, dtype)


def test_a_row_alone_is_what_the_padded_rows_are_compared_with():
    """The expectation above does not depend on padding itself."""
    model = build("Gemma3Text")
    check_packing(model, "shared")
    together, _, _ = states(model, ROWS, "shared")
    apart = [states(model, [row], "padded")[0] for row in ROWS if row[1]]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["OPT", "Phi3", "Llama, dynamic"])
def test_positions_of_every_kind(name):
    """Learned; rotated with factors that change with the length; rotated by the length so far."""
    model = test_sampling.build(name)
    assert choose_layout(model, "auto").best == "shared"
    for rows in (ROWS[2:], [(SHORT, [20, 21]), (SHORT, [22])]):
        assert_same(states(model, rows, "shared"), states(model, rows, "padded"))


@pytest.mark.parametrize(
    "rows",
    [
        [(LONG, [20]), (SHORT, [21, 22])],  # nothing is shared
        [(LONG, []), (LONG, []), (SHORT, [21])],  # a prompt without any completion
        [([5], [6, 7]), ([5], [8])],
        [(LONG, [20, 21]), (SHORT, [22]), (LONG, [20, 21]), (SHORT, [23])],  # groups that alternate
        [(LONG * 4, [20]), (SHORT, [21]), (SHORT, [22, 23]), (LONG * 4, [24])],
    ],
)
def test_rows_of_many_forms(rows):
    model = build("Llama")
    check_packing(model, "shared")
    assert_same(states(model, rows, "shared"), states(model, rows, "padded"))


def test_padding_anywhere():
    """Between prompt and completion, and within: what is real counts, wherever it stands."""
    model = build("Llama")
    check_packing(model, "shared")
    ids = torch.tensor(
        [[5, 6, 7, 0, 20, 21, 0, 22], [0, 5, 6, 7, 23, 0, 0, 24], [8, 0, 9, 0, 25, 26, 27, 0]]
    )
    mask, prompts = (ids != 0).long(), torch.tensor([3, 3, 2])
    scored = mask.bool()
    scored[:, :4] = False
    found = []
    for layout in ("padded", "packed", "shared"):
        rows = lay_out(ids, mask, prompts, layout)
        found.append(rows.predicting(rows.hidden_states(model), scored).detach())
    assert rows.saved == 3
    for states in found[1:]:
        torch.testing.assert_close(states, found[0], rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_count_are_seen_all_the_same():
    """A tool's tokens: within a completion, not scored."""
    model = build("Llama")
    check_packing(model, "shared")
    assert_same(states(model, ROWS, "shared", hole=1), states(model, ROWS, "padded", hole=1))


def test_each_prompt_passes_once():
    model, seen = build("Llama"), []
    accept_packed_rows(model)
    model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    states(model, [(p, c) for p, c in ROWS if p != [14]], "shared")
    tokens = sorted(seen[0].flatten().tolist())
    assert tokens == sorted([*LONG, *SHORT, *range(20, 33), *range(35, 39)])


def test_prompt_states_are_those_of_the_prompt():
    model = build("Llama")
    check_packing(model, "shared")
    ids, mask, prompts = batch(*ROWS)
    real = mask[:, : len(LONG), None]
    with torch.no_grad():
        found = [
            laid.first_states(laid.hidden_states(model), len(LONG)) * real
            for laid in (lay_out(ids, mask, prompts, layout) for layout in ("padded", "shared"))
        ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GptOss"])
def test_layers_that_are_computed_again(name, reentrant):
    model = build(name)
    check_packing(model, "shared")
    expected = states(model, ROWS, "padded")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(states(model.train(), ROWS, "shared"), expected)


def test_layers_that_are_compiled():
    model = build("Llama")
    check_packing(model, "shared")
    expected = states(model, ROWS, "padded")
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    for rows in (ROWS, ROWS[1:], ROWS[2:]):
        assert_same(states(model, rows, "shared"), states(model, rows, "padded"))
    assert_same(states(model, ROWS, "shared"), expected)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_everything_else_is_what_it_was(name):
    model, ids = build(name), torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    inputs = dict(input_ids=ids, attention_mask=(ids != 0).long())
    logits = model(**inputs).logits
    drawn = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    check_packing(model, "shared")
    assert model.config._attn_implementation == (EAGER if name == "Gemma2" else "sdpa")
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), drawn)


def test_flex_attention_shares_by_sdpa():
    """Without gradients: FlexAttention has none on a CPU."""
    model = build("Llama")
    with torch.no_grad():
        ids, mask, prompts = batch(*ROWS)
        rows = [lay_out(ids, mask, prompts, layout) for layout in ("padded", "shared")]
        scored = mask[:, len(LONG) :].bool()
        expected = rows[0].predicting(rows[0].hidden_states(model), scored)
        model.set_attn_implementation("flex_attention")
        check_packing(model, "shared")
        got = rows[1].predicting(rows[1].hidden_states(model), scored)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_flex_attention_with_soft_caps_falls_back():
    model = build("Gemma2")
    model.set_attn_implementation("flex_attention")
    choice = choose_layout(model, "auto")
    assert (
        choice.best == "padded" and "with softcap, s_aux (sinks) or position_bias" in choice.reason
    )


def varlen(query, key, value, cu_q, cu_k, scale, window):
    """Attention of [tokens, heads, D] as kernels for segments have it: last query, last key."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    out = []
    for (a, b), (c, d) in zip(
        cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scale
        back = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (back >= 0) & ((back < window) if window else True)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, value[c:d]))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_flash_attention_gets_segments_and_gathered_keys(name):
    """A stand-in: real flash-attention needs a GPU."""
    longest = []

    def stand_in(module, query, key, value, mask, scaling, sliding_window=None, **options):
        assert mask is None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        offsets = options["cu_seq_lens_q"], options["cu_seq_lens_k"]
        longest.append((options["max_length_q"], options["max_length_k"]))
        return varlen(q, k, v, *offsets, scaling, sliding_window)[None], None

    model = build(name)
    expected = states(model, ROWS, "padded")
    AttentionInterface.register("flash_stand_in", stand_in)
    model.config._attn_implementation = "flash_stand_in"
    accept_packed_rows(model)
    assert_same(states(model, ROWS, "shared"), expected)
    assert set(longest) == {(7, 11)}


@pytest.mark.parametrize("native", [True, False], ids=["grouped heads", "equal heads"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_pytorchs_own_kernel_for_segments(name, native, monkeypatch):
    """The call, on a stand-in; tests/test_cuda.py has the kernel itself."""
    from torch.nn.attention import varlen as module

    def stand_in(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
    ):
        assert enable_gqa is native
        assert native or query.shape[1] == key.shape[1]
        left, right = window_size
        assert right == 0
        return varlen(query, key, value, cu_seq_q, cu_seq_k, scale, left + 1)

    model = build(name)
    check_packing(model, "shared")
    expected = states(model, ROWS, "padded")
    known = {"scale", "window_size", *(["enable_gqa"] if native else [])}
    monkeypatch.setattr(module, "varlen_attn", stand_in)
    monkeypatch.setattr(packed_attention, "_varlen_options", lambda: known)
    monkeypatch.setattr(packed_attention, "_takes_varlen", lambda *_: True)
    assert_same(states(model, ROWS, "shared"), expected)


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


def test_an_attention_that_takes_no_segments():
    model = build("Llama")
    AttentionInterface.register("of_somebody", lambda *_, **__: None)
    model.set_attn_implementation("of_somebody")
    with pytest.raises(ValueError, match="attn_implementation='of_somebody' takes no packed rows"):
        check_packing(model, "shared")


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
