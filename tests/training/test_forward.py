"""What a micro-batch gives the head: the states that predict counted completion tokens."""

import pytest
import torch

pytest.importorskip("trl")

from powerflow_fast.training.forward import counted_mask, rows_of  # noqa: E402


def test_states_are_those_before_counted_tokens():
    """Two prompt tokens and three of completion: the state at 1 predicts the first of them."""
    ones = {name: torch.ones(2, 2) for name in ("prompt_ids", "prompt_mask")}
    ones |= {name: torch.ones(2, 3) for name in ("completion_ids", "completion_mask")}
    hidden = torch.arange(10.0).view(10, 1)
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]]).bool()
    assert rows_of(ones).predicting(hidden, mask).flatten().tolist() == [1, 2, 8]


def test_a_tools_tokens_do_not_count():
    batch = {"completion_mask": torch.tensor([[1, 1, 0]])}
    assert counted_mask(batch).tolist() == [[True, True, False]]
    batch["tool_mask"] = torch.tensor([[0, 1, 1]])
    assert counted_mask(batch).tolist() == [[False, True, False]]
