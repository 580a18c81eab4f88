"""Padded and packed tokens: which count, sums of each sequence, and the shift."""

import pytest
import torch

from powerflow_fast.sequences import Sequences, to_predictors, to_tokens, without_first

OFFSETS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_are_those_of_the_counted_tokens(packed, masked):
    values = torch.randn(8) if packed else torch.randn(3, 4)
    mask = torch.rand(values.shape) < 0.6 if masked else None
    found = Sequences.of(values, OFFSETS if packed else None, mask, True)
    counted = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    bounds = OFFSETS.tolist()
    spans = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)] if packed else range(3)
    chosen = [values[span][counted[span]] for span in spans]
    assert found.count == 3 and found.lengths.tolist() == [len(x) for x in chosen]
    assert found.lengths.dtype == torch.int64
    values[~counted] = torch.nan  # whatever stood there
    torch.testing.assert_close(found.sum(values), torch.stack([x.sum() for x in chosen]))
    assert torch.equal(found.counted_only(values) != 0, counted)
    starts, ends = found.bounds()
    assert starts.dtype == ends.dtype == torch.int32
    places = torch.arange(values.numel()).view(values.shape)
    for start, end, span in zip(starts, ends, spans, strict=True):
        assert list(range(start, end)) == places[span].tolist()


def test_a_sum_passes_its_gradient_to_the_counted_tokens():
    values = torch.randn(8, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1, 1, 0, 0, 1])
    upstream = torch.tensor([2.0, 3.0, 5.0])
    Sequences.of(values, OFFSETS, mask, True).sum(values).backward(upstream)
    assert values.grad.tolist() == [2, 0, 2, 5, 5, 0, 0, 5]


def test_the_shift_and_back():
    targets = torch.arange(1, 9)
    assert without_first(targets, None, -100).tolist() == [-100, *range(2, 9)]
    marked = without_first(targets, torch.tensor([0, 3, 3, 8, 8]), -1)
    assert marked.tolist() == [-1, 2, 3, -1, 5, 6, 7, 8]
    assert to_predictors(targets).tolist() == [*range(2, 9), 1]
    assert torch.equal(to_tokens(to_predictors(targets)), targets)


def test_one_axis_needs_offsets():
    with pytest.raises(ValueError, match=r"logps: expected padded \[B, T\], or packed \[N\] with"):
        Sequences.of(torch.zeros(5), None, None, True)
    with pytest.raises(ValueError, match="old_logps: expected the shape of logps"):
        Sequences.of(torch.zeros(2, 3), None, None, True).check_tokens("old_logps", torch.zeros(3))
