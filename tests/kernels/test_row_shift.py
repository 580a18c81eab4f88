"""One shift a row: rows that the pilot columns mislead, and digits where it is far off."""

from dataclasses import replace

import pytest
import torch

from powerflow_fast.kernels import combine, row_shift
from powerflow_fast.kernels.config import config_for
from powerflow_fast.logprobs import triton_backend
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import EPS32, gradient_tolerance, relative_error
from tests.helpers.truth import (
    Head,
    close,
    logps_bound,
    make_head,
    poison,
    statistics,
    unit_gradient,
)

pytestmark = pytest.mark.usefixtures("tiles")

DTYPES = (torch.float32, torch.bfloat16)
V = 2 * row_shift.PILOT  # every other column is a pilot
NATS = 0.6931471805599453  # in a power of two


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def run(head: Head, targets, options=HeadOptions(), ref: Head | None = None):  # noqa: B008
    reference, options = ref and ref.operands(), replace(options, route="unit_gradient")
    return triton_backend.forward(head.operands(), reference, targets, options)


def above_pilot(dtype, device, bits: float, rows=(0,)) -> tuple[Head, torch.Tensor]:
    """Rows of which one column, no pilot, lies so many powers of two above all others."""
    n, h = config_for(device, dtype).statistics.rows + 3, 16
    head = make_head(n, h, V, dtype, device, bias=True)
    head.hidden[:, 0], head.weight[:, 0] = 0, 0
    head.hidden[list(rows), 0], head.weight[7, 0] = 1, bits * NATS
    return head, torch.randint(8, V, (n,), device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [-100, 40, 90, 200, 300])
def test_any_distance_from_the_pilot(dtype, bits, device):
    head, targets = above_pilot(dtype, device, bits)
    targets[0] = 7 if bits > 0 else 9
    options = HeadOptions(entropy=True)
    out = run(head, targets, options, head)
    logps, lse, entropy = statistics(head, targets, options)
    bound = logps_bound(head, options)
    close(out.logps, logps, bound)
    close(out.ref_logps, logps, bound)
    close(out.lse, lse, bound)
    close(out.entropy, entropy, 8 * bound)
    assert relative_error(out.unit_gradient, unit_gradient(head, targets, options)) < max(
        torch.finfo(dtype).eps, gradient_tolerance(torch.float32)
    )


@pytest.mark.parametrize("bits", [40, 200])
def test_a_row_below_such_a_column(bits, device):
    """Its log-prob is far below 0, and known to the same digits."""
    head, targets = above_pilot(torch.float32, device, bits)
    out = run(head, targets)
    expected, _, _ = statistics(head, targets, HeadOptions())
    assert expected[0] < -20
    close(out.logps, expected, logps_bound(head, HeadOptions()))


def test_only_rows_that_were_misled_are_done_again(device, monkeypatch):
    dtype = torch.float32
    row = config_for(device, dtype).statistics.rows + 1  # in the second block
    head, targets = above_pilot(dtype, device, 200, rows=(row,))
    seen, redo = [], row_shift.redo_misled

    def watch(heads, misled, *rest):
        seen.append((misled.rows.tolist(), misled.blocks.tolist(), misled.count.tolist()))
        return redo(heads, misled, *rest)

    monkeypatch.setattr(row_shift, "redo_misled", watch)
    run(head, targets)
    assert seen == [([int(n == row) for n in range(len(targets))], [-1, 1], [2])]
    head.hidden[row, 0] = 0
    run(head, targets)
    assert seen[1] == ([0] * len(targets), [-1, -1], [-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_does_not_change_a_rows_log_probs(dtype, device):
    """Bit for bit, also beside a row for which the block was done again."""
    head, targets = above_pilot(dtype, device, 200)
    with_misled = run(head, targets).logps[1:]
    head.hidden[0, 0] = 0
    alone = run(head, targets).logps[1:]
    assert torch.equal(alone, with_misled)
    few = Head(head.hidden[1:4], head.weight, head.bias)
    assert torch.equal(run(few, targets[1:4]).logps, alone[:3])


def test_pilot_columns_that_are_masked_out(device):
    head = make_head(3, 16, V, torch.float32, device, bias=True)
    head.bias[::2] = float("-inf")  # every pilot
    targets = torch.tensor([1, 3, V - 1], device=device)
    out = run(head, targets)
    kept = Head(head.hidden, head.weight[1::2], head.bias[1::2])
    logps, lse, _ = statistics(kept, targets // 2, HeadOptions())
    close(out.logps, logps, logps_bound(kept, HeadOptions()))
    close(out.lse, lse, logps_bound(kept, HeadOptions()))


def test_a_nan_row_stays_alone(device):
    head, targets = above_pilot(torch.float32, device, 0)
    clean = run(head, targets)
    head.hidden[1] = float("nan")
    out = run(head, targets)
    others = torch.arange(len(targets), device=device) != 1
    assert out.logps[1].isnan() and out.unit_gradient[1].isnan().all()
    close(out.logps[others], clean.logps[others].double(), 8 * EPS32)
    assert out.unit_gradient[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_rows_keep_the_digits_of_log_p_and_of_1_minus_p(dtype, device):
    """A target 12 to 28 nats above the rest: 1 - p down to 4e-10, where 1 - exp(log p) has none."""
    n, h = 5, 16
    weight = torch.randn(V, h, device=device) * 0.1
    weight[:n] = 0
    weight[:n, :n] = torch.diag(torch.tensor([12.0, 16.0, 20.0, 24.0, 28.0], device=device))
    head = Head(torch.eye(n, h, device=device).to(dtype), weight.to(dtype), None)
    targets = torch.arange(n, device=device)
    out = run(head, targets)
    logps, _, _ = statistics(head, targets, HeadOptions())
    assert ((out.logps.double() - logps) / logps).abs().max() < 1e-5
    for row in range(n):  # one norm of them all would show the largest alone
        expected = unit_gradient(head, targets, HeadOptions())[row]
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        assert relative_error(out.unit_gradient[row], expected) < tolerance


def test_bounds_leave_room_for_the_sum():
    """Of 2^8 tiles near the highest bound, and for a shift that is one too small."""
    assert 2.0 ** (combine.HIGHEST.value + 7) < torch.finfo(torch.float32).max


def test_the_exact_route_of_a_tolerance_writes_the_same_gradient_in_bfloat16(device):
    """Where a policy is too flat for few columns, its unit gradient is formed over all of them."""
    head = make_head(
        4 * config_for(device, torch.bfloat16).statistics.rows, 16, V, torch.bfloat16, device
    )
    targets = torch.randint(V, (len(head.hidden),), device=device)
    exact = run(head, targets).unit_gradient
    out = run(head, targets, HeadOptions(grad_tolerance=1e-3))
    assert out.sparsity[0] == 1.0 and out.unit_gradient.dtype == torch.bfloat16
    assert torch.equal(out.unit_gradient, exact.bfloat16())
