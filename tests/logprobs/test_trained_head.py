"""A trained head: gradients from kept exp-logits, what is kept, and the products that it saves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from powerflow_fast import linear_logprobs, paired_linear_logprobs, reference
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import softmax_cache, torch_backend, torch_tiles
from powerflow_fast.logprobs.ops import head_forward
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import new_softmax_cache
from tests.conftest import TILES, use_tiles
from tests.helpers.numerics import EPS32, gradient_tolerance, logps_error_bound, relative_error
from tests.test_head import TRANSFORMS, draw, reference_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, V = 13, 101  # of `draw`, two of whose rows are ignored


@pytest.fixture(params=["torch", *(f"triton {tiles}" for tiles in TILES)])
def backend(request, monkeypatch):
    monkeypatch.setattr(torch_tiles, "_CPU_TILE", (4, 7))
    monkeypatch.setattr(torch_tiles, "_GPU_TILE", (4, 7))
    name, *tiles = request.param.split()
    for chip in tiles:
        use_tiles(chip, monkeypatch)
    return name


@pytest.fixture
def keep_rows(monkeypatch):
    """Sets the budget to the exp-logits of so many rows."""

    def set_budget(rows: int, itemsize: int, vocab: int = V, backend: str = "torch") -> None:
        columns = vocab if backend == "torch" else -(-vocab // 256) * 256
        monkeypatch.setattr(softmax_cache, "LARGEST_BYTES", rows * columns * itemsize)

    return set_budget


# Rows that are kept: none, some (one more than a tile of the torch back end), all that count.
@pytest.mark.parametrize("rows", [0, 5, N])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_float64(backend, keep_rows, device, dtype, transform, rows):
    inputs = draw(dtype=dtype, device=device, bias=True)
    hidden, weight, targets, bias = inputs
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    keep_rows(rows, dtype.itemsize, backend=backend)
    logps = linear_logprobs(*inputs[:3], bias=bias, backend=backend, **transform)
    upstream = torch.randn(N, device=device)
    logps.backward(upstream)
    expected = reference_gradients(leaves, targets, upstream, **transform)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, grad) <= gradient_tolerance(dtype)


@pytest.mark.parametrize("trained", ["weight", "bias", "hidden and bias"])
def test_any_part_of_the_head_may_be_trained(backend, keep_rows, device, trained):
    hidden, weight, targets, bias = draw(device=device, bias=True)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    keep_rows(5, 4, backend=backend)
    upstream = torch.randn(N, device=device)
    linear_logprobs(hidden, weight, targets, bias=bias, backend=backend).backward(upstream)
    expected = reference_gradients(leaves.values(), targets, upstream)
    for leaf, grad in zip(leaves.values(), expected, strict=True):
        if leaf.requires_grad:
            assert relative_error(leaf.grad, grad) <= gradient_tolerance(torch.float32)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("kind", ["random", "expanded", "zero"])
def test_any_upstream_gradient_as_often_as_asked(backend, keep_rows, device, kind):
    """Backward reads the exp-logits and leaves them as they are: a second one gives the same."""
    hidden, weight, targets, _ = draw(device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    keep_rows(7, 4, backend=backend)
    upstream = {
        "random": torch.randn(2 * N, device=device)[::2],
        "expanded": torch.tensor(0.3, device=device).expand(N),
        "zero": torch.zeros(N, device=device),
    }[kind]
    logps = linear_logprobs(hidden, weight, targets, backend=backend)
    first, second = (
        torch.autograd.grad(logps, (hidden, weight), upstream, retain_graph=True) for _ in range(2)
    )
    expected = reference_gradients((hidden, weight, None), targets, upstream)
    for got, again, grad in zip(first, second, expected, strict=False):
        assert torch.equal(got, again)
        assert relative_error(got, grad) <= gradient_tolerance(torch.float32)


@pytest.mark.parametrize("vocab", [1, 2, 97, 300])
def test_odd_vocabulary_and_all_negative_logits(backend, device, vocab):
    """verl#2656, #2899, #7439."""
    hidden = (-torch.rand(6, 8, device=device) - 1).requires_grad_()
    weight = (torch.rand(vocab, 8, device=device) + 1).requires_grad_()
    targets = torch.randint(0, vocab, (6,), device=device)
    logps = linear_logprobs(hidden, weight, targets, backend=backend)
    logps.sum().backward()
    expected, _ = reference.linear_logprobs(hidden, weight, targets)
    assert (logps - expected).abs().max() <= logps_error_bound(hidden, weight)
    ones = torch.ones(6, device=device)
    [_, grad, _] = reference_gradients((hidden, weight, None), targets, ones)
    # With one column every gradient is 0, and float32 leaves 1 - p at its rounding.
    assert (weight.grad - grad).norm() <= gradient_tolerance(torch.float32) * max(grad.norm(), 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_digits(backend, device, dtype):
    """Where p of the target is near 1, 1 - p must not come from a rounded p."""
    hidden, weight, targets, _ = draw(n=8, dtype=dtype, device=device)
    targets = torch.arange(8, device=device)
    weight[:8] = (hidden * 0.6).to(dtype)  # every target far ahead of the rest
    hidden.requires_grad_(), weight.requires_grad_()
    logps = linear_logprobs(hidden, weight, targets, backend=backend)
    assert logps.min() > -0.5 and logps.max() > -1e-4
    upstream = torch.full((8,), 2.0**12, device=device)  # or float16 gradients would be subnormal
    logps.backward(upstream)
    grads = reference_gradients((hidden, weight, None), targets, upstream)
    exact, _ = reference.linear_logprobs(hidden, weight, targets)
    # The kernels know 1 - p to two roundings of a number near 1, the sum and its logarithm, and a
    # power of two that a GPU knows to 2^-22, the torch back end to its own digits.
    rounding = 4 * EPS32 / -exact.expm1() * (backend == "triton")
    for row, exact_row, uncertain in zip(hidden.grad, grads[0], rounding, strict=True):
        assert relative_error(row, exact_row) <= 5 * gradient_tolerance(dtype) + uncertain


def test_flat_rows_below_a_peak_in_float16(backend, device):
    """Numerators of 2^-20 are subnormal in float16, and 3 % off if they are stored as such."""
    hidden = torch.ones(1, 8, device=device).half().requires_grad_()
    weight = torch.randn(V, 8, device=device).half().requires_grad_()
    # Logits of -13.9 and, at the target, 0: the bias takes what hidden and weight give.
    own = weight.detach().sum(1)
    bias = (-13.9 - own).half()
    bias[0] = -own[0]
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    logps = linear_logprobs(hidden, weight, targets, bias=bias, backend=backend)
    upstream = torch.full((1,), 1e3, device=device)  # float16 gradients would be subnormal, too
    logps.backward(upstream)
    [_, expected, _] = reference_gradients((hidden, weight, bias), targets, upstream)
    assert relative_error(weight.grad[1:], expected[1:]) <= gradient_tolerance(torch.float16)


def test_stored_numbers_are_large_enough_for_a_fast_product():
    """CPUs multiply subnormal numbers many times slower: none may come of a numerator."""
    hidden, weight, targets, _ = draw(n=32, h=24, v=2500)
    out = new_softmax_cache(hidden, weight, torch_backend.vocab_tiling(hidden.device))
    policy = Head(12 * hidden, weight, None)
    torch_backend.forward(policy, None, targets, HeadOptions(), out)
    logits = 12 * hidden @ weight.T
    assert (logits.amax(1) - logits.amin(1)).max() > 90  # e^-90 is subnormal
    counted = (targets != -100).sum()
    values = out.exp_logits[:counted]
    assert values[values != 0].min() >= torch_tiles._SMALLEST_EXP and (values == 0).any()
    factors = out.factors[:, :counted]
    assert factors[factors != 0].min() >= torch_tiles._SMALLEST_FACTOR


@pytest.fixture
def products(monkeypatch):
    """Returns a function: the products of a call on the torch back end, in units of 2 N H V."""
    total = []

    def counted(function):
        def count(*args, **kwargs):
            def in_place(self_shape, a_shape, b_shape, **_):
                return 2 * a_shape[0] * a_shape[1] * b_shape[1]

            def linear(a_shape, b_shape, *_, **__):
                return 2 * a_shape[0] * a_shape[1] * b_shape[0]

            def attention(query, key, *_, **__):
                size = query[3]  # 1: a log-sum-exp of logits, no product
                return 4 * query[0] * query[2] * key[2] * size if size > 1 else 0

            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            more = {torch.ops.aten.addmm_: in_place, kernel: attention}
            if torch.backends.mkldnn.is_available():
                more[torch.ops.mkldnn._linear_pointwise] = linear
            with FlopCounterMode(display=False, custom_mapping=more) as counter:
                result = function(*args, **kwargs)
            total.append(counter.get_total_flops())
            return result

        return count

    for name in ("forward", "backward"):
        monkeypatch.setattr(torch_backend, name, counted(getattr(torch_backend, name)))

    def of(call, hidden, weight) -> float:
        total.clear()
        call()
        return sum(total) / (2 * len(hidden) * weight.numel())

    return of


def pair_step(hidden, weight, targets, ref_hidden, **keywords):
    out = paired_linear_logprobs(hidden, weight, targets, ref_hidden, backend="torch", **keywords)
    out[0].sum().backward()


@pytest.mark.parametrize(
    "dtype,rows,expected",
    [
        (torch.float32, 8, 4.0),  # within the budget of H = 16 rows
        (torch.float32, 16, 4.0),  # at it
        (torch.float32, 64, 4.75),  # a quarter of the rows within
        (torch.bfloat16, 32, 4.0),  # 2 H rows of two bytes each
        (torch.bfloat16, 64, 4.5),
    ],
    ids=str,
)
def test_a_trained_head_takes_four_products_within_the_budget(products, dtype, rows, expected):
    hidden, weight, ref_hidden = (torch.randn(n, 16).to(dtype) for n in (rows, 2500, rows))
    targets = torch.randint(0, 2500, (rows,))
    hidden.requires_grad_(), weight.requires_grad_()
    call = lambda: pair_step(hidden, weight, targets, ref_hidden)  # noqa: E731
    # The attention kernel multiplies twice, if only its log-sum-exp is wanted.
    wasted = float(dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())
    assert products(call, hidden, weight) == expected + wasted
    weight.requires_grad_(False)
    assert products(call, hidden, weight) == 3.0 + wasted


def test_products_beyond_the_budget_and_of_a_detached_entropy(products, keep_rows):
    hidden, weight, ref_hidden = torch.randn(8, 16), torch.randn(2500, 16), torch.randn(8, 16)
    targets = torch.randint(0, 2500, (8,))
    hidden.requires_grad_(), weight.requires_grad_()

    def of(**keywords):
        call = lambda: pair_step(hidden, weight, targets, ref_hidden, **keywords)  # noqa: E731
        return products(call, hidden, weight)

    assert of(return_entropy="detached") == 4.0
    assert of(return_entropy=True) == 5.0  # its gradient needs the logits
    keep_rows(2, 4, vocab=2500)
    assert of() == 4.75
    keep_rows(0, 4, vocab=2500)
    assert of() == 5.0
    with torch.no_grad():
        call = lambda: linear_logprobs(hidden, weight, targets, backend="torch")  # noqa: E731
        assert products(call, hidden, weight) == 1.0


def saved_bytes(hidden, weight, targets, backend, **keywords) -> int:
    """What autograd saves beside the inputs."""
    inputs = {x.untyped_storage().data_ptr() for x in (hidden, weight, targets)}
    sizes = []

    def pack(x):
        if x.untyped_storage().data_ptr() not in inputs:
            sizes.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_logprobs(hidden, weight, targets, backend=backend, **keywords)
    return sum(sizes)


@pytest.mark.parametrize("backend,n,h,v", [("torch", 200, 16, 1000), ("triton", 10, 4, 256)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_kept_stays_within_the_weights_gradient(device, dtype, backend, n, h, v):
    hidden = torch.randn(n, h, device=device).to(dtype).requires_grad_()
    weight = torch.randn(v, h, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,), device=device)
    gradient = 4 * v * h
    small = gradient // 4  # unit gradient, statistics and the exp-logits' factors together
    trained = saved_bytes(hidden, weight, targets, backend)
    assert gradient / 2 < trained <= gradient + small
    assert saved_bytes(hidden, weight, targets, backend, return_entropy=True) <= small
    weight.requires_grad_(False)
    assert saved_bytes(hidden, weight, targets, backend) <= small


def test_opcheck(backend, keep_rows, device):
    # Outputs are compared whole: no column is padding, and no more rows are kept than count.
    hidden, weight, targets, bias = draw(v=256, device=device, bias=True)
    hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    keep_rows(5, 4, vocab=256)
    options = HeadOptions(backend=backend, route="cache").encode()
    absent = (None, None, None)
    torch.library.opcheck(head_forward, (hidden, weight, bias, targets, *absent, options))


def test_compiles_without_graph_break_for_any_number_of_rows(keep_rows):
    hidden, weight, targets, _ = draw()
    keep_rows(5, 4)

    def loss(x, w, t):
        return linear_logprobs(2 * x, w, t).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for n in (N, 4):  # beyond the budget and within it; the second time for any n
        grads = []
        for function in (loss, compiled):
            x, w = (y.detach().requires_grad_() for y in (hidden[:n], weight))
            function(x, w, targets[:n]).backward()
            grads.append((x.grad, w.grad))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
