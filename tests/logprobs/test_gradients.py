"""Tiles of d loss / d logits summed to gradients: all columns or some, several blocks of rows."""

import pytest
import torch

from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.gradients import GradientSums, dlogits_scale
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import gradient_tolerance, relative_error

N, H, V = 12, 8, 20
TILES = ((0, 8), (8, 16), (16, V))
ROWS = (slice(0, 5), slice(5, N))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def draw(dtype):
    head = Head(torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype), torch.randn(V).to(dtype))
    sums = torch.promote_types(dtype, torch.float32)
    return head, torch.randn(N, V).to(dtype).to(sums)  # no digits that a cast would take


def summed(head, dlogits, needs=(True, True, True), out_scale=None):
    sums = GradientSums(head, needs, out_scale)
    for start, stop in TILES:
        sums.start(start, stop)
        for r in ROWS:
            sums.add(dlogits[r, start:stop], r, None, head.weight[start:stop])
        sums.store()
    return sums.results()


def expected(head, dlogits):
    d, (hidden, weight, _) = dlogits.double(), (x.double() for x in head)
    return d @ weight, d.T @ hidden, d.sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype):
    head, dlogits = draw(dtype)
    grads = summed(head, dlogits)
    wide = torch.promote_types(dtype, torch.float32)
    assert [grad.dtype for grad in grads] == [wide, dtype, dtype]
    for got, wanted in zip(grads, expected(head, dlogits), strict=True):
        assert relative_error(got, wanted) <= gradient_tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_is_taken_out_again(dtype):
    head, dlogits = draw(dtype)
    for got, wanted in zip(
        summed(head, 2.0**9 * dlogits, out_scale=torch.tensor([2.0**9])),
        summed(head, dlogits),
        strict=True,
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_that_are_not_added_are_0(dtype):
    """Each block of rows has columns of its own; a tile may get none at all."""
    head, dlogits = draw(dtype)
    kept = torch.zeros(2, V, dtype=torch.bool)
    kept[0, [1, 3, 9]] = kept[1, [3, 15]] = True
    sums = GradientSums(head, (True, True, True))
    for start, stop in TILES:
        sums.start(start, stop)
        for block, r in zip(kept, ROWS, strict=True):
            columns = block[start:stop].nonzero()[:, 0]
            if len(columns):
                tile = head.weight[start:stop][columns]
                sums.add(dlogits[r, start:stop][:, columns], r, columns, tile)
        sums.store()
    masked = torch.cat([dlogits[r] * block for block, r in zip(kept, ROWS, strict=True)])
    grads = sums.results()
    for got, wanted in zip(grads, expected(head, masked), strict=True):
        assert relative_error(got, wanted) <= gradient_tolerance(dtype)
    assert (grads.weight[~kept.any(0)] == 0).all() and (grads.bias[~kept.any(0)] == 0).all()


def test_only_what_is_needed():
    head, dlogits = draw(torch.float32)
    everything = summed(head, dlogits)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for got, whole, need in zip(summed(head, dlogits, needs), everything, needs, strict=True):
            assert torch.equal(got, whole) if need else got is None
    assert summed(head._replace(bias=None), dlogits).bias is None


@pytest.mark.parametrize("size", [1e-25, 1e-6, 1.0, 1e4])
def test_float16_holds_what_is_scaled(size):
    grads, options = size * torch.rand(2, N), HeadOptions(temperature=0.5)
    for grad_entropy in (None, grads[1]):
        scale = dlogits_scale(grads[0], grad_entropy, V, options)
        largest = grads[0].max() / 0.5 * scale
        assert scale.shape == (1,) and scale.log2() == scale.log2().round()
        assert 2**8 <= largest <= 2**13
    for bad in (0.0, float("nan"), float("inf")):
        assert dlogits_scale(torch.full((N,), bad), None, V, options).item() == 1.0
