"""The exact route's unit gradient d logps / d hidden against float64 autograd."""

from dataclasses import replace

import pytest
import torch

from powerflow_fast.kernels.config import config_for
from powerflow_fast.logprobs import triton_backend
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import gradient_tolerance, relative_error
from tests.helpers.truth import (
    DTYPES,
    Head,
    make_head,
    poison,
    tile_sizes,
    unit_gradient,
)

pytestmark = pytest.mark.usefixtures("tiles")

# Exp-logits are rounded once to the inputs' dtype; float32 has the sums' own error.
TOLERANCE = {d: max(torch.finfo(d).eps, gradient_tolerance(torch.float32)) for d in DTYPES}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def run(head: Head, targets, options=HeadOptions(), ref=None):  # noqa: B008 (frozen)
    reference, options = ref and ref.operands(), replace(options, route="unit_gradient")
    out = triton_backend.forward(head.operands(), reference, targets, options)
    assert out.unit_gradient.dtype == torch.float32
    return out.unit_gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        lambda rows, columns: (1, 8, 2),  # fewer columns than one step of the sum
        # odd everywhere: pointer loads, a ragged last step
        lambda rows, columns: (3, 33, columns + 1),
        # descriptor loads, ragged in all three axes
        lambda rows, columns: (rows + 1, 40, 2 * columns + 2),
    ],
    ids=["small", "odd", "descriptors"],
)
def test_against_float64(dtype, shape, device):
    n, h, v = shape(*tile_sizes(device, dtype))
    head = make_head(n, h, v, dtype, device, spread=2.0)
    targets = torch.randint(v, (n,), device=device)
    expected = unit_gradient(head, targets, HeadOptions())
    assert relative_error(run(head, targets), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_logit_transform(dtype, device):
    policy, reference = (make_head(5, 24, 70, dtype, device, bias=True) for _ in range(2))
    targets = torch.randint(70, (5,), device=device)
    options = HeadOptions(softcap=1.5, temperature=0.4, logit_scale=0.8)
    expected = unit_gradient(policy, targets, options)
    assert relative_error(run(policy, targets, options, reference), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_their_relative_accuracy(dtype, device):
    # p of the target is about 1 - 1e-4. Were the target's own numerator among the rounded ones,
    # the unit gradient would be off by bfloat16's 4e-3 of weight[y], 40 times itself.
    n, h, v = 4, 16, 70
    weight = torch.randn(v, h, device=device).to(dtype)
    weight[:n] = 0
    weight[:n, :n] = 4 * torch.eye(n, device=device)
    weight[n:, :n] = 0
    hidden = torch.zeros(n, h, device=device)
    hidden[:, :n] = 3.375 * torch.eye(n, device=device)
    head = Head(hidden.to(dtype), weight, None)
    targets = torch.arange(n, device=device)
    expected = unit_gradient(head, targets, HeadOptions())
    assert 1e-4 < expected.norm() < 1e-2
    # 1 - p is a sum of the others' exp-logits, so it has all its digits.
    assert relative_error(run(head, targets), expected) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_far_below_the_row_maximum(dtype, device):
    # One column 30 nats above the others in another tile: their exp-logits, about 1 in their own
    # tile, must arrive as e^-30. And a row whose mass is spread over tiles 10 nats apart.
    part = config_for(device, dtype).statistics.part
    head = make_head(2, 16, 3 * part + 8, dtype, device, bias=True)
    head.bias.zero_()
    head.bias[5] = 10
    head.bias[part : 2 * part] += 6
    targets = torch.tensor([2 * part + 22, part + 6], device=device)
    expected = unit_gradient(head, targets, HeadOptions())
    assert relative_error(run(head, targets), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(("v", "below"), [(32, -13.9), (1024, -13.9), (1024, -18.0)])
def test_flat_distribution_below_a_peak_in_float16(v, below, device):
    """Exp-logits of 2^-20, in the peak's own tile (v = 32) or after they were brought to the row's
    shift: subnormal in float16, and 3 % off, without the exponent that the kernel adds. At 2^-26
    the factor that brings them there is below float16's smallest number."""
    head = Head(
        torch.zeros(1, 8, device=device).half(),
        torch.randn(v, 8, device=device).half() + 1,
        torch.full((v,), below, device=device).half(),
    )
    head.bias[0] = 0
    targets = torch.tensor([0], device=device)
    expected = unit_gradient(head, targets, HeadOptions())
    assert relative_error(run(head, targets), expected) < 1.5 * TOLERANCE[torch.float16]


def test_rounded_logits_pass_gradients_straight_through(device):
    hidden = torch.randint(-3, 4, (4, 64), device=device).bfloat16()
    weight = (torch.randint(-9, 10, (70, 64), device=device) / 64).bfloat16()
    head = Head(hidden, weight, None)
    targets = torch.randint(70, (4,), device=device)
    options = HeadOptions(round_logits=True)
    leaf = hidden.double().requires_grad_()
    z = leaf @ weight.double().T
    z = z + (z.bfloat16().double() - z).detach()
    z.log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    assert relative_error(run(head, targets, options), leaf.grad) < TOLERANCE[torch.bfloat16]
