"""The certified route on the Triton kernels: within its tolerance, proven, or exact."""

from dataclasses import replace

import pytest
import torch

from powerflow_fast import linear_logprobs, reference
from powerflow_fast.kernels import config
from powerflow_fast.logprobs import triton_backend, triton_sparse
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import gradient_tolerance, relative_error
from tests.helpers.truth import DTYPES, Head, close, logps_bound, poison, statistics, unit_gradient

pytestmark = pytest.mark.usefixtures("tiles")

TRANSFORMS = [{}, {"softcap": 90.0, "temperature": 0.7, "logit_scale": 1.3}]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def sharp_head(n, h, v, dtype, device, *, sharpness=14.0, bias=False):
    """Rows with most of their mass on a few columns, and targets drawn from them."""
    hidden = torch.randn(n, h, device=device).to(dtype)
    weight = (torch.randn(v, h, device=device) * (sharpness / h**0.5)).to(dtype)
    head = Head(hidden, weight, torch.randn(v, device=device).to(dtype) if bias else None)
    targets = torch.distributions.Categorical(logits=head.logits(HeadOptions())).sample()
    return head, targets


def run(head, targets, options):
    options = replace(options, route="unit_gradient")
    return triton_backend.forward(head.operands(), None, targets, options)


def check_rows(out, head, targets, options):
    """Each row within tolerance * max |W_v| of float64, and rounding of the kept columns."""
    expected = unit_gradient(head, targets.clamp(min=0), options)
    counted = targets != options.ignore_index
    norms = head.weight.double().norm(dim=1)
    scale = options.logit_scale / options.temperature
    p = head.logits(options).softmax(-1)
    rounding = 4 * gradient_tolerance(head.hidden.dtype) * (p @ norms) + 1e-5
    bound = scale * (options.grad_tolerance * norms.max() + rounding)
    errors = (out.unit_gradient.double() - expected).norm(dim=1)
    assert (errors <= bound)[counted].all(), (errors / bound).max()
    assert (out.unit_gradient[~counted] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "softcap and bias"])
def test_within_the_tolerance_and_sparse(dtype, transform, device):
    bias = bool(transform)
    head, targets = sharp_head(24, 16, 200, dtype, device, sharpness=40.0, bias=bias)
    targets[[0, 17, 23]] = -100
    options = HeadOptions(grad_tolerance=1e-2, **transform)
    out = run(head, targets, options)
    check_rows(out, head, targets, options)
    columns, skipped, _ = out.sparsity.tolist()
    assert 0 < columns < 0.9 and 0 < skipped <= 1e-2
    exact = run(head, targets, HeadOptions(**transform))
    expected, _, _ = statistics(head, targets.clamp(min=0), options)
    close(out.logps, expected.where(targets != -100, 0.0), logps_bound(head, options))
    # Half the memory where the range allows it; without a tolerance the gradient is cast once.
    kept_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert out.unit_gradient.dtype == kept_dtype and exact.unit_gradient.dtype == torch.float32


def test_blocks_that_fail_are_done_exactly(device):
    """A few flat rows among sharp ones: their blocks alone take the exact route."""
    block = rows_of_a_block(device)
    head, targets = sharp_head(3 * block, 16, 1000, torch.float32, device, sharpness=60.0)
    head.hidden[block + 4 : block + 6] *= 0.01
    options = HeadOptions(grad_tolerance=1e-3)
    out = run(head, targets, options)
    check_rows(out, head, targets, options)
    columns, skipped, dense = out.sparsity.tolist()
    assert skipped <= 1e-3 and dense == 1 and columns < 0.6
    expected = unit_gradient(head, targets, options)[block : 2 * block]
    error = relative_error(out.unit_gradient[block : 2 * block], expected)
    assert error <= gradient_tolerance(torch.float32)


def rows_of_a_block(device):
    return config.config_for(device, torch.float32).statistics.rows


def test_a_flat_policy_takes_the_exact_route(device, monkeypatch):
    block = rows_of_a_block(device)
    head, targets = sharp_head(4 * block, 16, 130, torch.float32, device, sharpness=0.3)
    monkeypatch.setattr(triton_sparse, "sparse_unit_gradient", None)  # would fail if called
    out = run(head, targets, HeadOptions(grad_tolerance=1e-3))
    assert out.sparsity.tolist() == [1.0, 0.0, 4.0]
    exact = run(head, targets, HeadOptions())
    assert torch.equal(out.unit_gradient, exact.unit_gradient)


def test_hidden_states_in_columns(device):
    """Their strides are not the unit gradient's."""
    head, targets = sharp_head(24, 16, 200, torch.bfloat16, device, sharpness=40.0)
    options = HeadOptions(grad_tolerance=1e-2)
    expected = run(head, targets, options)
    head.hidden = head.hidden.T.contiguous().T
    out = run(head, targets, options)
    assert out.unit_gradient.is_contiguous() and torch.equal(
        out.unit_gradient, expected.unit_gradient
    )


@pytest.mark.parametrize("kept", [0.05, 0.2], ids=["pays", "does not"])
def test_the_route_is_taken_where_it_pays(kept, device, monkeypatch):
    """Between PAYS and LARGEST_SHARE it would be right, and slower than the exact route."""
    assert triton_sparse.PAYS < 0.2 < triton_sparse.LARGEST_SHARE
    head, targets = sharp_head(4 * rows_of_a_block(device), 16, 1000, torch.float32, device)
    head.hidden[:, 1:], head.weight[:, 1:] = 0, 0
    likely = torch.arange(1000, device=device) < kept * 1000
    head.hidden[:, 0], head.weight[:, 0] = 1, torch.where(likely, 0.0, -30.0)
    sparsity = run(head, targets.clamp(max=9), HeadOptions(grad_tolerance=1e-3)).sparsity
    assert sparsity[0].item() == pytest.approx(kept if kept < triton_sparse.PAYS else 1.0, rel=0.05)


def test_every_row_ignored(device):
    head, targets = sharp_head(20, 16, 100, torch.float32, device)
    out = run(head, torch.full_like(targets, -100), HeadOptions(grad_tolerance=1e-3))
    assert (out.unit_gradient == 0).all() and out.sparsity[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("dtype", "transform"),
    [(dtype, TRANSFORMS[dtype == torch.bfloat16]) for dtype in DTYPES],
    ids=["float32", "float16", "bfloat16, softcap"],
)
def test_a_trained_head_takes_the_kept_columns_alone(dtype, transform, device, monkeypatch):
    """|dW_v - exact| <= sum over rows of |g_n| skipped_n |h_n|; likewise for the bias."""
    formed = []
    write = triton_sparse.write_dlogits_chunk

    def counting(chunk, *rest):
        formed.append(len(chunk.policy.hidden) * len(chunk.policy.weight))
        write(chunk, *rest)

    for module in (triton_backend, triton_sparse):
        monkeypatch.setattr(module, "write_dlogits_chunk", counting)
    monkeypatch.setattr(triton_sparse, "CHUNK", 64)  # three chunks of rows
    monkeypatch.setattr(config, "DLOGITS_BYTES", 4 * 16 * 150)  # two slices of the vocabulary
    head, _ = sharp_head(140, 16, 200, dtype, device, sharpness=60.0, bias=True)
    head.hidden = head.hidden[:1] + head.hidden / 4  # alike, as blocks of 64 rows are to share
    targets = torch.distributions.Categorical(logits=head.logits(HeadOptions())).sample()
    targets[[0, 70]] = -100
    upstream = torch.randn(140, device=device)
    tolerance = 1e-2
    truth = head.double()
    leaves = [x.requires_grad_() for x in (head.hidden, head.weight, head.bias)]
    options = dict(bias=head.bias, backend="triton", grad_tolerance=tolerance, **transform)
    linear_logprobs(head.hidden, head.weight, targets, **options).backward(upstream)
    assert 0 < sum(formed) < 0.7 * 140 * 200
    exact, _ = reference.linear_logprobs(
        truth.hidden, truth.weight, targets, truth.bias, **transform
    )
    exact.backward(upstream.double())
    counted = (targets != -100) * upstream.abs().double()
    scale = tolerance * transform.get("logit_scale", 1.0) / transform.get("temperature", 1.0)
    sizes = head.hidden.detach().double().norm(dim=1)
    bounds = scale * (counted * sizes).sum(), scale * counted.sum()
    for leaf, wanted, bound in zip(leaves[1:], (truth.weight, truth.bias), bounds, strict=True):
        rounding = gradient_tolerance(dtype) * wanted.grad.abs().max()
        assert (leaf.grad.double() - wanted.grad).abs().max() <= bound + rounding
        assert relative_error(leaf.grad, wanted.grad) <= 10 * tolerance


@pytest.mark.parametrize("rest", [1, triton_sparse.BLOCK + 1])
def test_a_trained_head_whose_last_tile_of_rows_is_not_full(rest, device):
    """A tile of 128 rows makes two blocks of kept columns, of which the last may have no row."""
    n = config.config_for(device, torch.bfloat16).statistics.rows + rest
    head, targets = sharp_head(n, 16, 200, torch.bfloat16, device, sharpness=60.0)
    truth, weight = head.double(), head.weight.requires_grad_()
    head.hidden.requires_grad_()  # or the pass forward would look for no columns
    logps = linear_logprobs(head.hidden, weight, targets, backend="triton", grad_tolerance=1e-2)
    logps.sum().backward()
    reference.linear_logprobs(truth.hidden, truth.weight, targets)[0].sum().backward()
    skipped = 1e-2 * head.hidden.detach().double().norm(dim=1).sum()
    rounding = gradient_tolerance(torch.bfloat16) * truth.weight.grad.abs().max()
    assert (weight.grad.double() - truth.weight.grad).abs().max() <= skipped + rounding


def test_too_many_kept_columns_are_not_gathered(device, monkeypatch):
    monkeypatch.setattr(triton_sparse, "kept_gradients", None)  # would fail if called
    head, targets = sharp_head(20, 16, 130, torch.float32, device, sharpness=0.3)
    weight = head.weight.requires_grad_()
    for tolerance in (0.0, 1e-3):
        logps = linear_logprobs(
            head.hidden, weight, targets, backend="triton", grad_tolerance=tolerance
        )
        (gradient,) = torch.autograd.grad(logps.sum(), weight)
        if tolerance == 0:
            exact = gradient
    assert relative_error(gradient, exact) <= 2 * gradient_tolerance(torch.float32)


def test_opcheck(device):
    from powerflow_fast.logprobs.ops import head_forward

    head, targets = sharp_head(40, 16, 200, torch.bfloat16, device, sharpness=40.0)
    head.hidden.requires_grad_()
    options = HeadOptions(backend="triton", grad_tolerance=1e-2, route="unit_gradient").encode()
    absent = (None, None, None)
    torch.library.opcheck(head_forward, (head.hidden, head.weight, None, targets, *absent, options))
