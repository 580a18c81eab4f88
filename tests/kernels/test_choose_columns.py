"""Columns that a block of rows keeps: those above a threshold, within a budget."""

import pytest
import torch

from powerflow_fast.kernels.choose_columns import LOWEST, STEPS, choose_columns
from tests.helpers.truth import poison


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def test_chosen_columns_are_those_above_a_threshold_within_the_budget(device):
    column_max = (torch.rand(3, 5000, device=device) * -30).half()
    column_max[1] = -50.0  # everything may go
    column_max[2, :10] = float("nan")
    columns, counts, threshold = choose_columns(column_max, budget=0.05, most=4000)
    assert torch.equal(counts.long(), (~(column_max < threshold[:, None])).sum(1))
    step = (1 - LOWEST) / 2**STEPS
    for block, count in enumerate(counts.tolist()):
        chosen = columns[block, : min(count, 4000)].long()
        assert (chosen.diff() > 0).all()
        left = torch.ones(5000, dtype=torch.bool, device=device)
        left[chosen] = False
        if count > 4000:
            continue
        # Sums of 5000 numbers in another order, of powers of two that a GPU knows to 2^-22.
        assert column_max[block, left].float().exp2().sum() <= 0.05 * (1 + 1e-4)
        # One step of the threshold further, it would have left out too much.
        more = column_max[block].float() < column_max[block, left].float().max() + 2 * step
        assert count == 0 or column_max[block, more].float().exp2().sum() > 0.05
    assert counts[1] == 0 and set(range(10)) <= set(columns[2, : counts[2]].tolist())


def test_the_count_of_a_cut_list_is_right(device):
    column_max = torch.zeros(2, 300, dtype=torch.float16, device=device)
    columns, counts, _ = choose_columns(column_max, budget=0.5, most=7)
    assert counts.tolist() == [300, 300] and columns.tolist() == [list(range(7))] * 2
