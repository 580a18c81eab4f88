"""Products with float32 sums and results, whatever type the operands have."""

import pytest
import torch

from powerflow_fast.logprobs.products import add_product_, matmul
from tests.helpers.numerics import EPS32

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_against_float64(dtype, transposed, device):
    a, b = (
        torch.randn(70, 33, device=device).to(dtype),
        torch.randn(33, 50, device=device).to(dtype),
    )
    if transposed:
        a, b = a.T.contiguous().T, b.T.contiguous().T
    expected = a.double() @ b.double()
    eps = torch.finfo(torch.float64).eps if dtype == torch.float64 else EPS32
    bound = 33 * eps * (a.double().abs() @ b.double().abs())
    got = matmul(a, b)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert ((got.double() - expected).abs() <= bound).all()
    out = torch.empty_like(got)
    assert torch.equal(matmul(a, b, out=out), got)
    sums = torch.ones_like(got)
    add_product_(sums, a, b)
    assert ((sums.double() - expected - 1).abs() <= bound + 4 * eps * (1 + expected.abs())).all()
