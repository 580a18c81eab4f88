"""The residual of every sequence and its gradient against a loop in float64."""

import pytest
import torch

from powerflow_fast.kernels import residual
from powerflow_fast.kernels.operands import BALANCES
from tests.helpers.numerics import EPS32
from tests.helpers.truth import poison


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def eager(logps, ref_logps, starts, ends, mask, alpha, psi, balance):
    """-> residual, policy and reference energies [S], lengths [S], d residual / d logps [S, N]."""
    rows, jacobian = [], torch.zeros(len(starts), len(logps), dtype=torch.float64)
    for s, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        chosen = torch.arange(start, end)
        if mask is not None:
            chosen = chosen[mask.cpu()[start:end]]
        count = len(chosen)
        if count == 0:
            rows.append((0.0, 0.0, 0.0, 0))
            continue
        l_pi, l_ref = logps.cpu().double()[chosen].sum(), ref_logps.cpu().double()[chosen].sum()
        by = {"length": (count, count), "trajectory": (1, 1), "token": (1, count)}[balance]
        l_pi, l_ref = (l_pi / by[0]).item(), (l_ref / by[1]).item()
        delta = l_pi - alpha[s].item() * (l_ref + psi[s].item())
        rows.append((delta, l_pi, l_ref, count))
        jacobian[s, chosen] = 1 / by[0]
    return (*torch.tensor(rows, dtype=torch.float64).T, jacobian)


def check(starts, ends, n, mask, balance, device):
    logps, ref_logps = -3 * torch.rand(2, n, device=device)
    s = len(starts)
    alpha, psi, grad = torch.rand(3, s, device=device)
    if mask is not None:
        logps[~mask] = float("nan")  # whatever uncounted tokens hold
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, ends))
    arguments = (logps, ref_logps, starts, ends, mask, alpha, psi, balance)
    delta, l_pi, l_ref, lengths = residual.residual_forward(*arguments)
    *expected, counts, jacobian = eager(*arguments)
    assert lengths.dtype == torch.int32 and lengths.tolist() == counts.tolist()
    # A lane's sum of every BLOCK-th token, a tree over the lanes, a division and the residual.
    steps = -(-int((ends - starts).max()) // residual.BLOCK) + 16
    largest = 1 + max(x.abs().max().item() for x in expected)
    for got, want in zip((delta, l_pi, l_ref), expected, strict=True):
        assert (got.cpu().double() - want).abs().max() < steps * EPS32 * largest
    back = (grad, lengths, starts, ends, mask, n, balance)
    got = residual.residual_backward(*back)
    want = grad.cpu().double() @ jacobian
    # A GPU's quick division is off by up to two units in the last place.
    assert ((got.cpu().double() - want).abs() <= 4 * EPS32 * want.abs()).all()
    assert (got.cpu()[jacobian.sum(0) == 0] == 0).all()
    assert torch.equal(delta, residual.residual_forward(*arguments)[0])
    assert torch.equal(got, residual.residual_backward(*back))


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("masked", [False, True])
def test_packed(balance, masked, device):
    bounds = [0, 0, 5, 6, 6, 6, 1500, 3700, 3700]  # empty first, last and in a row; two tiles
    mask = torch.rand(3700, device=device) < 0.7 if masked else None
    if masked:
        mask[0:5] = False  # a sequence without a counted token
    check(bounds[:-1], bounds[1:], 3700, mask, balance, device)


@pytest.mark.parametrize("balance", BALANCES)
def test_padded_with_mask(balance, device):
    rows, width = 3, 70
    mask = torch.arange(width, device=device)[None] < torch.tensor([[70], [1], [33]], device=device)
    starts = [b * width for b in range(rows)]
    ends = [start + width for start in starts]
    check(starts, ends, rows * width, mask.flatten(), balance, device)


def test_tokens_of_no_sequence(device):
    check([2, 10], [5, 12], 20, None, "length", device)


def test_one_long_sequence(device):
    check([0, 131072], [131072, 131073], 131073, None, "length", device)


def test_no_sequences(device):
    none = torch.zeros(0, device=device)
    bounds = torch.zeros(0, dtype=torch.int32, device=device)
    delta, _, _, lengths = residual.residual_forward(
        none, none, bounds, bounds, None, none, none, "length"
    )
    assert delta.shape == lengths.shape == (0,)
    grad = residual.residual_backward(none, lengths, bounds, bounds, None, 4, "length")
    assert grad.tolist() == [0.0] * 4
