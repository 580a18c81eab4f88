"""linear_logprobs and paired_linear_logprobs on the torch back end, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powerflow_fast import linear_logprobs, paired_linear_logprobs, reference
from powerflow_fast.logprobs import torch_backend, torch_tiles
from tests.helpers.numerics import gradient_tolerance, logps_error_bound, relative_error

TRANSFORMS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"softcap": 3.0},
    {"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.6},
]


def draw(n=13, h=24, v=101, dtype=torch.float32, device="cpu", bias=False):
    """hidden, weight, targets (two ignored) and bias, with logits of a few units."""
    hidden = torch.randn(n, h, device=device).to(dtype)
    weight = (torch.randn(v, h, device=device) * 0.4).to(dtype)
    targets = torch.randint(0, v, (n,), device=device)
    targets[[1, n - 2]] = -100
    return hidden, weight, targets, (torch.randn(v, device=device).to(dtype) if bias else None)


def reference_gradients(inputs, targets, grad_logps, grad_entropy=None, **transform):
    """Float64 gradients of (logps, entropy) contracted with the given upstream gradients."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    logps, entropy = reference.linear_logprobs(
        leaves[0], leaves[1], targets, leaves[2], **transform
    )
    total = (logps * grad_logps.double()).sum()
    if grad_entropy is not None:
        total = total + (entropy * grad_entropy.double()).sum()
    total.backward()
    return [None if x is None else x.grad for x in leaves]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles small enough that a test's shapes span several of them, ragged at both ends."""
    monkeypatch.setattr(torch_tiles, "_CPU_TILE", (4, 7))
    monkeypatch.setattr(torch_tiles, "_GPU_TILE", (4, 7))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_logps_and_entropy_match_float64(small_tiles, dtype, transform, bias):
    hidden, weight, targets, bias = draw(dtype=dtype, bias=bias)
    logps, entropy = linear_logprobs(
        hidden, weight, targets, bias=bias, return_entropy=True, backend="torch", **transform
    )
    expected, expected_entropy = reference.linear_logprobs(
        hidden, weight, targets, bias, **transform
    )
    bound = logps_error_bound(hidden, weight, scale=2.5) + 1e-6
    assert logps.dtype == entropy.dtype == torch.float32
    assert (logps - expected).abs().max() <= bound
    assert (entropy - expected_entropy).abs().max() <= 8 * bound  # sums |log p| p over the row


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("trained", ["hidden", "weight", "all", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_float64(small_tiles, dtype, transform, trained):
    (*inputs,) = draw(dtype=dtype, bias=True)
    hidden, weight, targets, bias = inputs
    hidden.requires_grad_(trained != "weight")
    weight.requires_grad_(trained in ("weight", "all"))
    bias.requires_grad_(trained == "all")
    with_entropy = trained in ("entropy", "all")
    out = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        return_entropy=with_entropy,
        backend="torch",
        **transform,
    )
    outputs = out if with_entropy else (out,)
    upstream = [torch.randn_like(x) for x in outputs]
    torch.autograd.backward(outputs, upstream)
    expected = reference_gradients((hidden, weight, bias), targets, *upstream, **transform)
    for leaf, grad in zip((hidden, weight, bias), expected, strict=True):
        if leaf.requires_grad:
            assert leaf.grad.dtype == dtype
            assert relative_error(leaf.grad, grad) <= gradient_tolerance(dtype)
        else:
            assert leaf.grad is None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_dtype_stride_and_upstream_gradient(data):
    n = data.draw(st.integers(1, 9), "n")
    h, v = data.draw(st.integers(1, 17), "h"), data.draw(st.integers(1, 40), "v")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    transform = data.draw(st.sampled_from(TRANSFORMS), "transform")
    offset = data.draw(st.sampled_from([0.0, -50.0, 200.0]), "offset")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    # Non-contiguous in both axes: every other row and column of a larger tensor, weight transposed.
    hidden = torch.randn(2 * n, 2 * h).to(dtype)[::2, ::2].requires_grad_()
    weight = (torch.randn(h, v) * 0.5).to(dtype).T
    bias = torch.full((v,), offset, dtype=dtype)
    targets = torch.randint(0, v, (n,))
    ignored = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n), "ignored"))
    targets[ignored] = -100
    logps = linear_logprobs(hidden, weight, targets, bias=bias, backend="torch", **transform)
    expected, _ = reference.linear_logprobs(hidden, weight, targets, bias, **transform)
    bound = logps_error_bound(hidden, weight, scale=2.9) + 64 * 1.2e-7 * abs(offset)
    assert (logps - expected).abs().max() <= bound

    kind = data.draw(st.sampled_from(["random", "expanded", "zero"]), "upstream")
    grad = {"random": torch.randn(n), "expanded": torch.ones(()).expand(n), "zero": torch.zeros(n)}
    logps.backward(grad[kind])
    [exact, _, _] = reference_gradients((hidden, weight, bias), targets, grad[kind], **transform)
    scale = exact.norm().clamp(min=1.0)
    tolerance = gradient_tolerance(dtype) + 64 * 1.2e-7 * abs(offset)
    assert (hidden.grad.double() - exact).norm() <= tolerance * scale


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradcheck(small_tiles, transform):
    hidden, weight, targets, bias = draw(n=5, h=3, v=11, dtype=torch.float64, bias=True)
    hidden.requires_grad_()

    def exact(x):
        return linear_logprobs(x, weight, targets, bias=bias, **transform)

    def recompute(x, w, b):
        return linear_logprobs(x, w, targets, bias=b, return_entropy=True, **transform)

    assert torch.autograd.gradcheck(exact, (hidden,))
    leaves = (hidden, weight.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(recompute, leaves)


def test_pair_equals_two_single_calls(small_tiles):
    hidden, weight, targets, bias = draw(bias=True)
    ref_hidden, ref_weight, _, ref_bias = draw(bias=True)
    hidden.requires_grad_(), ref_hidden.requires_grad_(), ref_weight.requires_grad_()
    alone = linear_logprobs(hidden, weight, targets, bias=bias)
    for args, keywords in [
        ((ref_hidden,), {}),
        ((ref_hidden, ref_weight), {"ref_bias": ref_bias}),
        ((ref_hidden, ref_weight), {}),
    ]:
        logps, ref_logps = paired_linear_logprobs(
            hidden, weight, targets, *args, bias=bias, **keywords
        )
        head = (weight, bias) if len(args) == 1 else (ref_weight, keywords.get("ref_bias"))
        expected = linear_logprobs(ref_hidden, head[0], targets, bias=head[1])
        # Other tiles, other order of sums: a CPU's back end may put both models in one product.
        torch.testing.assert_close(logps, alone, rtol=0, atol=2e-6)
        torch.testing.assert_close(ref_logps, expected, rtol=0, atol=2e-6)
        assert not ref_logps.requires_grad
    logps.sum().backward()
    assert ref_hidden.grad is None and ref_weight.grad is None


def test_leading_axes_and_scalar_shape():
    hidden, weight, targets, _ = draw(n=12)
    flat = linear_logprobs(hidden, weight, targets)
    cube = linear_logprobs(hidden.view(2, 3, 2, -1), weight, targets.view(2, 3, 2))
    torch.testing.assert_close(cube, flat.view(2, 3, 2), rtol=0, atol=1e-6)
    one = linear_logprobs(hidden[0], weight, targets[0])
    torch.testing.assert_close(one, flat[0], rtol=0, atol=1e-6)


def test_inputs_and_upstream_are_never_modified():
    hidden, weight, targets, bias = draw(bias=True)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets]
    before = [x.detach().clone() for x in leaves]
    logps = linear_logprobs(hidden, weight, targets, bias=bias)
    upstream = torch.ones(())
    logps.backward(upstream.expand_as(logps))
    assert upstream == 1
    for x, y in zip(leaves, before, strict=True):
        assert torch.equal(x.detach(), y)


@pytest.mark.parametrize("v", [1, 2, 97, 1025])
def test_odd_vocabulary_and_all_negative_logits(v):
    """verl#2656, #2899, #7439: padding counted as logit 0 and a running maximum that began at 0."""
    hidden = -torch.rand(6, 8) - 1
    weight = torch.rand(v, 8) + 1
    targets = torch.randint(0, v, (6,))
    logps = linear_logprobs(hidden, weight, targets)
    expected, _ = reference.linear_logprobs(hidden, weight, targets)
    assert (logps <= 0).all()
    assert (logps - expected).abs().max() <= logps_error_bound(hidden, weight)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_common_offset(offset):
    """A common offset cancels; what is left is the float32 rounding of logits of that size."""
    hidden, weight, targets, _ = draw()
    bias = torch.full((len(weight),), offset)
    logps = linear_logprobs(hidden, weight, targets, bias=bias)
    expected, _ = reference.linear_logprobs(hidden, weight, targets)
    assert (logps - expected).abs().max() <= 4 * abs(offset) * 1.2e-7


def test_logits_are_not_rounded_to_bf16():
    """TRL#4303, NeMo-RL#3936: bf16 logits are off by up to 2^-9 of their size; ours are not."""
    hidden, weight, targets, _ = draw(n=64, h=64, v=500, dtype=torch.bfloat16)
    expected, _ = reference.linear_logprobs(hidden, weight, targets)
    error = (linear_logprobs(hidden, weight, targets) - expected).abs().max()
    rounded = linear_logprobs(hidden, weight, targets, round_logits=True)
    z = (hidden.double() @ weight.double().T).to(torch.bfloat16).double()
    mimicked = z.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    mimicked = mimicked.where(targets != -100, 0.0)
    assert error < 1e-4 < (rounded - expected).abs().max()
    # A float32 sum may round to the other bf16 neighbour now and then: at most one step of one
    # logit.
    assert (rounded - mimicked).abs().max() <= z.abs().max() * 2**-8


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("upstream", ["random", "expanded", "zero"])
def test_non_uniform_and_zero_stride_upstream(trained_head, upstream):
    """Liger#968, #678, #1298: right only for a uniform, contiguous upstream gradient."""
    hidden, weight, targets, _ = draw()
    hidden.requires_grad_(), weight.requires_grad_(trained_head)
    n = len(targets)
    grad = {
        "random": torch.randn(2 * n)[::2],
        "expanded": torch.tensor(0.3).expand(n),
        "zero": torch.zeros(n),
    }[upstream]
    linear_logprobs(hidden, weight, targets).backward(grad)
    expected = reference_gradients((hidden, weight, None), targets, grad)
    assert relative_error(hidden.grad, expected[0]) <= 2e-5
    if trained_head:
        assert relative_error(weight.grad, expected[1]) <= 2e-5


def test_unused_output_gives_no_gradient():
    """The entropy's gradient is None when only logps are used, and the reverse."""
    hidden, weight, targets, _ = draw()
    for used in (0, 1):
        x = hidden.detach().requires_grad_()
        out = linear_logprobs(x, weight, targets, return_entropy=True)
        out[used].sum().backward()
        ones, zeros = torch.ones(len(targets)), torch.zeros(len(targets))
        grads = (ones, zeros) if used == 0 else (zeros, ones)
        [expected, _, _] = reference_gradients((hidden, weight, None), targets, *grads)
        assert relative_error(x.grad, expected) <= 2e-5


def test_temperature_applies_to_reference_and_entropy():
    """TRL#3029, #4159, OpenRLHF#1319: the temperature reached the policy's log-probs only."""
    hidden, weight, targets, _ = draw()
    ref_hidden = torch.randn_like(hidden)
    out = paired_linear_logprobs(
        hidden, weight, targets, ref_hidden, temperature=0.5, return_entropy=True
    )
    logps, entropy = reference.linear_logprobs(hidden, weight, targets, temperature=0.5)
    ref_logps, _ = reference.linear_logprobs(ref_hidden, weight, targets, temperature=0.5)
    for actual, expected in zip(out, (logps, ref_logps, entropy), strict=True):
        assert (actual - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("trained_head", [False, True])
def test_ignored_rows_contribute_exactly_nothing(trained_head):
    """Rows that are padding may hold anything, NaN included, on the way in and on the way back."""
    hidden, weight, targets, _ = draw()
    ignored = targets == -100
    hidden[ignored] = torch.nan
    hidden.requires_grad_(), weight.requires_grad_(trained_head)
    logps = linear_logprobs(hidden, weight, targets)
    assert (logps[ignored] == 0).all() and logps.isfinite().all()
    logps.backward(torch.ones(len(targets)).masked_fill(ignored, torch.nan))
    assert (hidden.grad[ignored] == 0).all() and hidden.grad.isfinite().all()
    kept = (~ignored).nonzero()[:, 0]
    x, w = hidden.detach()[kept].requires_grad_(), weight.detach().requires_grad_(trained_head)
    linear_logprobs(x, w, targets[kept]).sum().backward()
    assert torch.equal(hidden.grad[kept], x.grad)
    if trained_head:
        assert torch.equal(weight.grad, w.grad)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("trained_head", [False, True])
def test_everything_ignored_or_empty_is_a_connected_zero(n, trained_head):
    """Liger#177, #1289, torchtune#2341."""
    hidden = torch.randn(n, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=trained_head)
    logps = linear_logprobs(hidden, weight, torch.full((n,), -100))
    assert torch.equal(logps, torch.zeros(n))
    logps.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(n, 4))
    if trained_head:
        assert torch.equal(weight.grad, torch.zeros(9, 4))


def test_frozen_head_allocates_no_buffer_of_its_size():
    """Liger#1441, TRL#7076: dW computed, or its buffer allocated, for a frozen head."""
    hidden, weight, targets, _ = draw(n=8, h=16, v=5000)
    hidden.requires_grad_()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            results = out if isinstance(out, (tuple, list)) else [out]
            # Storages, so that views of the weight do not count.
            new = [x for x in results if isinstance(x, torch.Tensor)]
            same = weight.untyped_storage().data_ptr()
            sizes.extend(
                x.untyped_storage().nbytes() for x in new if x.untyped_storage().data_ptr() != same
            )
            return out

    with Watch():
        linear_logprobs(hidden, weight, targets, backend="torch").sum().backward()
    assert weight.grad is None
    assert max(sizes) < weight.untyped_storage().nbytes() / 4
    assert max(sizes) < 8 * 5000 * 4  # nor [N, V]


def test_autocast_computes_in_its_type_and_returns_gradients_in_theirs():
    hidden, weight, targets, _ = draw()
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = linear_logprobs(hidden, weight, targets)
    cast = [x.detach().to(torch.bfloat16) for x in (hidden, weight)]
    expected, _ = reference.linear_logprobs(*cast, targets)
    assert logps.dtype == torch.float32
    assert (logps - expected).abs().max() <= logps_error_bound(*cast)
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    grads = reference_gradients((*cast, None), targets, torch.ones(len(targets)))
    assert relative_error(hidden.grad, grads[0]) <= gradient_tolerance(torch.bfloat16)


def test_mixed_dtypes_are_promoted():
    hidden, weight, targets, _ = draw()
    hidden = hidden.to(torch.bfloat16)
    expected, _ = reference.linear_logprobs(hidden, weight, targets)
    logps = linear_logprobs(hidden, weight, targets)
    assert (logps - expected).abs().max() <= logps_error_bound(hidden, weight)


def test_runs_are_bitwise_equal():
    hidden, weight, targets, _ = draw(n=64, h=32, v=3000, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logps = linear_logprobs(x, w, targets)
        logps.square().sum().backward()
        results.append((logps, x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_unchecked_target_out_of_range_is_nan():
    """Where values are not checked (on a GPU), a bad target never gives a plausible number."""
    from powerflow_fast.kernels.operands import Head
    from powerflow_fast.logprobs.options import HeadOptions

    hidden, weight, targets, _ = draw()
    targets[3] = len(weight)
    out = torch_backend.forward(
        Head(hidden, weight, None), None, targets, HeadOptions(route="unit_gradient")
    )
    assert out.logps[3].isnan() and out.unit_gradient[3].isnan().all()
    others = torch.arange(len(targets)) != 3
    assert out.logps[others].isfinite().all() and out.unit_gradient[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unit_gradient_keeps_its_digits_where_the_policy_is_confident(dtype):
    """W[y] - sum_v p_v W_v cancels where p_y is near 1: 1 - p_y must not come from a rounded p."""
    hidden, weight, targets, _ = draw(n=8, dtype=dtype)
    targets = torch.arange(8)
    weight[:8] = (hidden * 0.8).to(dtype)  # every target far ahead of the rest
    hidden.requires_grad_()
    logps = linear_logprobs(hidden, weight, targets)
    exact, _ = reference.linear_logprobs(hidden, weight, targets)
    assert (exact > -0.1).all() and (exact > -1e-9).any()
    assert ((logps - exact) / exact).abs().max() <= 1e-4  # digits of 1 - p, not of p
    logps.sum().backward()
    [expected, _, _] = reference_gradients((hidden, weight, None), targets, torch.ones(8))
    for row, exact_row in zip(hidden.grad, expected, strict=True):
        assert relative_error(row, exact_row) <= 5 * gradient_tolerance(dtype)
