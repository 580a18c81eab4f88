"""Rows in which prompts lie once give what a row for each sequence gives: states and gradients."""

import pytest
import torch

pytest.importorskip("transformers")

from powerflow_fast.models.packed_attention import accept_packed_rows  # noqa: E402
from powerflow_fast.models.packing import lay_out  # noqa: E402
from powerflow_fast.models.packing_check import check_packing, choose_layout  # noqa: E402
from tests.helpers.packed import (  # noqa: E402
    LONG,
    MODELS,
    ROWS,
    SHORT,
    assert_same,
    batch,
    build,
    states,
)
from tests.models import test_sampling  # noqa: E402


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
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


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
