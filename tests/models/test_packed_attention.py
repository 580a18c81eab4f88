"""Attention over packed rows: each kind of kernel, layers computed again, and plain passes."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402

from powerflow_fast.models import packed_attention  # noqa: E402
from powerflow_fast.models.packed_attention import EAGER, accept_packed_rows  # noqa: E402
from powerflow_fast.models.packing import lay_out  # noqa: E402
from powerflow_fast.models.packing_check import check_packing  # noqa: E402
from tests.helpers.packed import LONG, ROWS, assert_same, batch, build, states  # noqa: E402


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


def test_an_attention_that_takes_no_segments():
    model = build("Llama")
    AttentionInterface.register("of_somebody", lambda *_, **__: None)
    model.set_attn_implementation("of_somebody")
    with pytest.raises(ValueError, match="attn_implementation='of_somebody' takes no packed rows"):
        check_packing(model, "shared")
