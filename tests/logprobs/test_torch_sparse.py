"""The certified sparse route: within its tolerance, proven, or dense."""

import pytest
import torch

from powerflow_fast import fused_linear_tb_loss, linear_logprobs, reference
from powerflow_fast.logprobs import torch_backend, torch_sparse
from tests.helpers.numerics import relative_error


def sharp_inputs(n=300, h=32, v=2000, sharpness=12.0):
    """Rows whose distribution is concentrated on a few columns; targets drawn from it."""
    hidden, weight = torch.randn(n, h), torch.randn(v, h) / h**0.5 * sharpness
    logits = hidden @ weight.T
    targets = torch.distributions.Categorical(logits=logits).sample()
    targets[[0, 5, n // 2]] = -100
    return hidden, weight, targets


def skipped_gradient_bound(weight, tolerance):
    """|sum over skipped v of p_v (W_v)| <= tolerance * max |W_v|."""
    return tolerance * weight.double().norm(dim=1).max().item()


def exact_direction(hidden, weight, targets, **transform):
    leaf = hidden.detach().double().requires_grad_()
    reference.linear_logprobs(leaf, weight, targets, **transform)[0].sum().backward()
    return leaf.grad


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("transform", [{}, {"softcap": 20.0, "temperature": 0.7}], ids=str)
def test_gradient_is_within_the_tolerance_for_every_row(tolerance, transform):
    hidden, weight, targets = sharp_inputs()
    hidden.requires_grad_()
    logps = linear_logprobs(hidden, weight, targets, grad_tolerance=tolerance, **transform)
    exact = linear_logprobs(hidden.detach(), weight, targets, **transform)
    # The tolerance is about the gradient alone; the exact route may sum in another order.
    torch.testing.assert_close(logps, exact, rtol=0, atol=2e-6)
    logps.sum().backward()
    expected = exact_direction(hidden, weight, targets, **transform)
    row_errors = (hidden.grad.double() - expected).norm(dim=1)
    scale = 1 / transform.get("temperature", 1.0)
    rounding = 1e-4 * scale
    assert row_errors.max() <= scale * skipped_gradient_bound(weight, tolerance) + rounding
    assert (hidden.grad[targets == -100] == 0).all()


def sparsity(hidden, weight, targets, tolerance):
    out = fused_linear_tb_loss(
        hidden[None],
        weight,
        targets[None],
        ref_logps=torch.zeros(1, len(targets)),
        log_z=0.0,
        alpha=2.0,
        grad_tolerance=tolerance,
    )
    out.loss.backward()
    return {name: out.metrics[name].item() for name in ("columns_kept", "skipped_mass",
                                                        "dense_blocks")}  # fmt: skip


def test_certificate_says_what_happened():
    hidden, weight, targets = sharp_inputs()
    hidden.requires_grad_()
    loose = sparsity(hidden, weight, targets, 1e-2)
    tight = sparsity(hidden, weight, targets, 1e-5)
    assert 0 < loose["columns_kept"] < tight["columns_kept"] <= 1
    assert 0 < loose["skipped_mass"] <= 1e-2 and tight["skipped_mass"] <= 1e-5
    assert loose["dense_blocks"] == 0
    assert sparsity(hidden, weight, targets, 1e-9)["dense_blocks"] > 0


def test_skipped_mass_is_the_true_one(monkeypatch):
    """The mass that is checked is that of the columns really left out, in float64."""
    hidden, weight, targets = sharp_inputs(n=60)
    chosen = []
    sparse = torch_sparse.sparse_unit_gradient

    def remember(head):
        chosen.append(sparse(head))
        return chosen[-1]

    monkeypatch.setattr(torch_backend, "sparse_unit_gradient", remember)
    hidden.requires_grad_()
    reported = sparsity(hidden, weight, targets, 3e-2)
    p = reference.logits(hidden.detach(), weight).softmax(-1)[targets != -100]
    p.scatter_(1, targets[targets != -100][:, None], 0.0)
    left_out = ~chosen[-1].kept_columns[0]
    assert reported["skipped_mass"] == pytest.approx(p[:, left_out].sum(1).max().item(), rel=1e-3)
    assert reported["columns_kept"] <= (~left_out).double().mean().item()


def test_more_columns_are_added_until_the_check_passes(monkeypatch):
    """A first choice that leaves out too much is enlarged, and only by what it lacks."""
    hidden, weight, targets = sharp_inputs(n=60)
    multiplied = []
    multiply = torch_sparse._multiply

    def remember(head, r, columns, *rest):
        multiplied.append(columns)
        return multiply(head, r, columns, *rest)

    monkeypatch.setattr(torch_sparse, "_multiply", remember)
    monkeypatch.setattr(torch_sparse, "OVERSHOOTS", (50.0, 1.0))
    monkeypatch.setattr(torch_sparse, "LARGEST_SHARE", 1.0)
    hidden.requires_grad_()
    linear_logprobs(hidden, weight, targets, grad_tolerance=1e-2).sum().backward()
    assert len(multiplied) == 2 and min(map(len, multiplied)) > 0
    both = torch.cat(multiplied)
    assert len(both.unique()) == len(both) < len(weight)
    expected = exact_direction(hidden, weight, targets)
    assert (hidden.grad - expected).norm(dim=1).max() <= skipped_gradient_bound(weight, 1e-2) + 1e-4


def test_a_flat_policy_falls_back_and_is_exact():
    hidden, weight, targets = sharp_inputs(sharpness=0.3)
    hidden.requires_grad_()
    assert sparsity(hidden, weight, targets, 1e-3)["dense_blocks"] == 5
    hidden.grad = None
    linear_logprobs(hidden, weight, targets, grad_tolerance=1e-3).sum().backward()
    assert relative_error(hidden.grad, exact_direction(hidden, weight, targets)) <= 2e-5


def test_a_flat_policy_is_recognised_before_it_costs_anything(monkeypatch):
    hidden, weight, targets = sharp_inputs(n=600, sharpness=0.3)
    hidden.requires_grad_()
    monkeypatch.setattr(torch_backend, "sparse_unit_gradient", None)  # would fail if it were called
    assert sparsity(hidden, weight, targets, 1e-3) == {
        "columns_kept": 1.0,
        "skipped_mass": 0.0,
        "dense_blocks": 10.0,  # of 597 counted rows
    }


def test_one_flat_row_in_every_block_is_seen_beforehand(monkeypatch):
    """As in text, where a few tokens are open and most are not: each block would end up dense."""
    hidden, weight, targets = sharp_inputs(n=1024, sharpness=25.0)
    hidden[torch_sparse.BLOCK // 2 :: torch_sparse.BLOCK] *= 0.01
    targets = targets.clamp(min=0)
    hidden.requires_grad_()
    monkeypatch.setattr(torch_backend, "sparse_unit_gradient", None)  # would fail if it were called
    linear_logprobs(hidden, weight, targets, grad_tolerance=1e-3).sum().backward()


@pytest.mark.parametrize("transform", [{}, {"softcap": 20.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("sharpness", [12.0, 0.3], ids=["sharp", "flat"])
def test_trained_head_is_within_the_tolerance(transform, sharpness):
    """|dW_v - exact| <= sum over rows of |g_n| skipped_n |h_n|, and likewise for the bias."""
    hidden, weight, targets = sharp_inputs(sharpness=sharpness)
    bias, upstream = torch.randn(len(weight)), torch.randn(len(targets))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    tolerance = 1e-3
    logps = linear_logprobs(
        hidden, weight, targets, bias=bias, grad_tolerance=tolerance, **transform
    )
    logps.backward(upstream)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth, _ = reference.linear_logprobs(exact[0], exact[1], targets, exact[2], **transform)
    truth.backward(upstream.double())
    scale = tolerance / transform.get("temperature", 1.0)
    total = scale * upstream.abs().sum().double()
    size = hidden.detach().double().norm(dim=1)
    bounds = (skipped_gradient_bound(weight.detach(), scale) * upstream.abs().max().double(),
              scale * (upstream.abs() * size).sum(), total)  # fmt: skip
    for leaf, wanted, bound in zip(leaves, exact, bounds, strict=True):
        error = (leaf.grad - wanted.grad).abs()
        rounding = 1e-5 * wanted.grad.abs().max()
        assert error.max() <= bound + rounding
        assert relative_error(leaf.grad, wanted.grad) <= 10 * tolerance


def test_trained_head_forms_kept_columns_alone(monkeypatch):
    hidden, weight, targets = sharp_inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    logps = linear_logprobs(hidden, weight, targets, grad_tolerance=1e-2)
    formed = []
    dlogits = torch_backend._dlogits
    monkeypatch.setattr(
        torch_backend, "_dlogits", lambda z, *rest: formed.append(z.numel()) or dlogits(z, *rest)
    )
    logps.sum().backward()
    assert 0 < sum(formed) < 0.5 * len(hidden) * len(weight)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_row(n):
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(40, 8)
    targets = torch.zeros(n, dtype=torch.int64)
    logps = linear_logprobs(hidden, weight, targets, grad_tolerance=1e-2)
    logps.sum().backward()
    assert hidden.grad.shape == (n, 8)
    if n:
        exact = exact_direction(hidden, weight, targets)
        assert (hidden.grad - exact).norm() <= skipped_gradient_bound(weight, 1e-2)


def test_compiles_without_graph_break():
    hidden, weight, targets = sharp_inputs(n=20)

    def loss(x):
        return linear_logprobs(2 * x, weight, targets, grad_tolerance=1e-3).square().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = hidden.detach().requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)
