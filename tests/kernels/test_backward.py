"""The recompute route: gradients of hidden, weight and bias against float64 autograd."""

import itertools

import pytest
import torch

from powerflow_fast.logprobs import triton_backend
from powerflow_fast.logprobs.backend import Upstream
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import gradient_tolerance, relative_error
from tests.helpers.truth import DTYPES, Head, make_head, poison, statistics, tile_sizes

pytestmark = pytest.mark.usefixtures("tiles")

ALL = (True, True, True)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def expected_gradients(head: Head, targets, grad_logps, grad_entropy, options):
    leaves = head.double()
    logps, _, entropy = statistics(leaves, targets, options)
    loss = (logps * grad_logps.double()).sum()
    if grad_entropy is not None:
        loss = loss + (entropy * grad_entropy.double()).sum()
    inputs = [x for x in (leaves.hidden, leaves.weight, leaves.bias) if x is not None]
    grads = torch.autograd.grad(loss, inputs)
    return grads if leaves.bias is not None else (*grads, None)


def run(head: Head, targets, grad_logps, grad_entropy=None, options=HeadOptions(), needs=ALL):  # noqa: B008
    logps, lse, entropy = statistics(head, targets.clamp(0, len(head.weight) - 1), options)
    entropy = None if grad_entropy is None else entropy.float()
    upstream = Upstream(grad_logps, grad_entropy, targets, logps.float(), lse.float(), entropy)
    return triton_backend.backward(head.operands(), upstream, options, needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        lambda rows, columns: (1, 8, 2),
        # odd H: pointer loads; one row in the second block
        lambda rows, columns: (rows + 1, 33, 2 * columns + 2),
        lambda rows, columns: (5, 40, columns + 1),  # descriptor loads, one column in the last tile
    ],
    ids=["small", "odd", "descriptors"],
)
@pytest.mark.parametrize("with_entropy", [False, True])
def test_against_float64(dtype, shape, with_entropy, device):
    n, h, v = shape(*tile_sizes(device, dtype))
    head = make_head(n, h, v, dtype, device, bias=True)
    targets = torch.randint(v, (n,), device=device)
    grad_logps = torch.randn(n, device=device)
    grad_entropy = torch.randn(n, device=device) if with_entropy else None
    actual = run(head, targets, grad_logps, grad_entropy)
    expected = expected_gradients(head, targets, grad_logps, grad_entropy, HeadOptions())
    # That of hidden is summed over ranks, where there are several, before its one cast.
    assert [got.dtype for got in actual] == [torch.float32, dtype, dtype]
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < gradient_tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_logit_transform(dtype, device):
    head = make_head(5, 24, 70, dtype, device, bias=True)
    targets = torch.randint(70, (5,), device=device)
    options = HeadOptions(softcap=1.5, temperature=0.4, logit_scale=0.8)
    grads = torch.randn(2, 5, device=device)
    actual = run(head, targets, *grads, options)
    expected = expected_gradients(head, targets, *grads, options)
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < gradient_tolerance(dtype)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_is_needed(needs, device):
    head = make_head(3, 16, 70, torch.float32, device, bias=True)
    targets = torch.randint(70, (3,), device=device)
    grad_logps = torch.randn(3, device=device)
    actual = run(head, targets, grad_logps, needs=needs)
    everything = run(head, targets, grad_logps)
    for got, full, need in zip(actual, everything, needs, strict=True):
        assert torch.equal(got, full) if need else got is None


def test_frozen_weight_allocates_no_buffer_of_its_size(device, monkeypatch):
    from powerflow_fast.kernels import config

    monkeypatch.setattr(config, "DLOGITS_BYTES", 1)  # one tile of columns at a time
    head = make_head(3, 16, 300, torch.float32, device)
    targets = torch.randint(300, (3,), device=device)
    sizes = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)

        def record(*args, make=make, **kwargs):
            tensor = make(*args, **kwargs)
            sizes.append(tensor.numel())
            return tensor

        monkeypatch.setattr(torch, name, record)
    run(head, targets, torch.ones(3, device=device), needs=(True, False, False))
    assert sizes and max(sizes) < 300 * 16


def test_rows_without_gradient_contribute_nothing(device):
    block, _ = tile_sizes(device, torch.float32)
    n = block + 4
    head = make_head(n, 16, 70, torch.float32, device, bias=True)
    targets = torch.randint(70, (n,), device=device)
    grad_logps, grad_entropy = torch.randn(2, n, device=device)
    idle = torch.zeros(n, dtype=torch.bool, device=device)
    idle[[0, 7]] = idle[block:] = True  # a whole block of rows among them
    grad_logps[idle] = 0
    grad_entropy[idle] = 0
    kept = Head(head.hidden[~idle], head.weight, head.bias)
    expected = expected_gradients(
        kept, targets[~idle], grad_logps[~idle], grad_entropy[~idle], HeadOptions()
    )
    targets[7] = -100
    grad_entropy[7] = 1.0  # ignored all the same
    for poisoned in (float("nan"), float("inf")):
        head.hidden[idle] = poisoned
        grads = run(head, targets, grad_logps, grad_entropy)
        assert (grads[0][idle] == 0).all()
        assert relative_error(grads[0][~idle], expected[0]) < gradient_tolerance(torch.float32)
        for got, want in zip(grads[1:], expected[1:], strict=True):
            assert relative_error(got, want) < gradient_tolerance(torch.float32)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_digits(dtype, with_entropy, device):
    """Targets 20 to 28 nats above the rest, row by row: 1 - p is down to 4e-10.

    A product in float16 holds what is left of gradients to 16 nats.
    """
    n, h, v = 5, 16, 70
    most = 16.0 if dtype == torch.float16 else 28.0
    weight = torch.randn(v, h, device=device) * 0.1
    weight[:n] = 0
    weight[:n, :n] = torch.linspace(most - 8, most, n, device=device).diag()
    head = Head(torch.eye(n, h, device=device).to(dtype), weight.to(dtype), None)
    targets = torch.arange(n, device=device)
    for row in range(n):
        grads = torch.zeros(2, n, device=device)
        grads[:, row] = 1.0
        upstream = (grads[0], grads[1] if with_entropy else None)
        got = run(head, targets, *upstream, needs=(True, False, False))[0]
        expected = expected_gradients(head, targets, *upstream, HeadOptions())[0]
        assert relative_error(got, expected) < gradient_tolerance(dtype) + 1e-4


@pytest.mark.parametrize("size", [1e-9, 1e4])
def test_float16_neither_underflows_nor_overflows_inside(size, device):
    # TB coefficients are 1 / (sequences * length): below float16's smallest number times p.
    head = make_head(4, 16, 70, torch.float16, device)
    targets = torch.randint(70, (4,), device=device)
    coefficients = torch.rand(4, device=device) + 0.5
    grad_logps = coefficients * size
    _, grad_weight, _ = run(head, targets, grad_logps)
    expected = expected_gradients(head, targets, grad_logps, None, HeadOptions())[1]
    # What float16 gradients can hold is the caller's matter; compare before that limit.
    expected = expected.half().double()
    error = (grad_weight.double() - expected).norm()
    smallest = 2**-24 * grad_weight.numel() ** 0.5
    assert error < gradient_tolerance(torch.float16) * expected.norm() + smallest


def test_float16_hidden_gradient_of_small_coefficients(device):
    head = make_head(4, 16, 70, torch.float16, device)
    targets = torch.randint(70, (4,), device=device)
    grad_logps = torch.full((4,), 2e-6, device=device)
    buffers = triton_backend.GradientSums
    seen = []

    class Spy(buffers):
        def results(self):
            seen.append(self.hidden / self.out_scale)
            return super().results()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "GradientSums", Spy)
        run(head, targets, grad_logps)
    expected = expected_gradients(head, targets, grad_logps, None, HeadOptions())[0]
    assert relative_error(seen[0], expected) < gradient_tolerance(torch.float16)


def test_zero_and_no_rows(device):
    head = make_head(3, 16, 70, torch.float16, device, bias=True)
    targets = torch.randint(70, (3,), device=device)
    for grad in run(head, targets, torch.zeros(3, device=device)):
        assert (grad == 0).all()
    empty = Head(head.hidden[:0], head.weight, head.bias)
    grads = run(empty, targets[:0], torch.zeros(0, device=device))
    assert grads[0].shape == (0, 16) and (grads[1] == 0).all() and (grads[2] == 0).all()


def test_chunks_strides_and_repetition(device, monkeypatch):
    from powerflow_fast.kernels import config

    head = make_head(5, 24, 200, torch.float32, device)
    targets = torch.randint(200, (5,), device=device)
    grad_logps = torch.ones((), device=device).expand(5)  # stride 0
    expected = expected_gradients(head, targets, grad_logps, None, HeadOptions())
    monkeypatch.setattr(config, "DLOGITS_BYTES", 1)
    strided = Head(head.hidden.T.contiguous().T, head.weight.repeat(1, 2)[:, :24], None)
    first, second = (run(strided, targets, grad_logps) for _ in range(2))
    assert first[2] is None
    for got, again, want in zip(first[:2], second[:2], expected[:2], strict=True):
        assert torch.equal(got, again)
        assert relative_error(got, want) < gradient_tolerance(torch.float32)


def test_target_of_another_slice_of_the_vocabulary(device):
    # Vocabulary-parallel ranks pass targets past their slice and the whole vocabulary's lse.
    whole = make_head(4, 16, 70, torch.float32, device)
    targets = torch.tensor([3, 40, 69, 0], device=device)
    grad_logps = torch.randn(4, device=device)
    expected = expected_gradients(whole, targets, grad_logps, None, HeadOptions())[1][:35]
    logps, lse, _ = (x.float() for x in statistics(whole, targets, HeadOptions()))
    local = Upstream(grad_logps, None, targets.where(targets < 35, 35), logps, lse, None)
    head = Head(whole.hidden, whole.weight[:35], None).operands()
    _, got, _ = triton_backend.backward(head, local, HeadOptions(), ALL)
    assert relative_error(got, expected) < gradient_tolerance(torch.float32)
