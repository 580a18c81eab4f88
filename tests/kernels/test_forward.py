"""Log-probs, log-sum-exp and entropy of the Triton back end against float64."""

from dataclasses import replace

import pytest
import torch

from powerflow_fast.logprobs import triton_backend
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import EPS32, gradient_tolerance, relative_error
from tests.helpers.truth import (
    DTYPES,
    Head,
    close,
    logps_bound,
    make_head,
    poison,
    statistics,
    tile_sizes,
    unit_gradient,
)

pytestmark = pytest.mark.usefixtures("tiles")

PLAIN = HeadOptions()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def run(head: Head, targets, ref: Head | None = None, options=PLAIN, want_unit_gradient=False):
    reference = None if ref is None else ref.operands()
    options = replace(options, route="unit_gradient" if want_unit_gradient else "none")
    return triton_backend.forward(head.operands(), reference, targets, options)


def bound(head: Head, options: HeadOptions = PLAIN) -> float:
    return logps_bound(head, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        lambda rows, columns: (1, 8, 1),
        # odd everywhere: pointer loads, one column in the last tile
        lambda rows, columns: (3, 33, columns + 1),
        # one row in the second block; 16-byte rows: descriptor loads
        lambda rows, columns: (rows + 1, 40, 2 * columns + 2),
        lambda rows, columns: (5, 16, columns),
    ],
    ids=["one", "odd", "descriptors", "whole tile"],
)
def test_two_models(dtype, shape, device):
    n, h, v = shape(*tile_sizes(device, dtype))
    policy, reference = (make_head(n, h, v, dtype, device) for _ in range(2))
    targets = torch.randint(v, (n,), device=device)
    options = HeadOptions(entropy=True)
    out = run(policy, targets, reference, options)
    logps, lse, entropy = statistics(policy, targets, options)
    close(out.logps, logps, bound(policy))
    close(out.lse, lse, bound(policy))
    close(out.entropy, entropy, 4 * bound(policy))  # a sum of p * (log p), |log p| up to 4 here
    close(out.ref_logps, statistics(reference, targets, options)[0], bound(reference))
    assert out.logps.dtype == out.ref_logps.dtype == torch.float32
    assert out.unit_gradient is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        HeadOptions(temperature=0.3, logit_scale=0.7),
        HeadOptions(softcap=1.5, temperature=0.5, logit_scale=2.0, entropy=True),
        HeadOptions(logit_scale=-1.0),  # the maximum is the smallest product
    ],
    ids=["scale", "softcap", "negative"],
)
def test_logit_transforms(dtype, options, device):
    policy, reference = (make_head(4, 24, 70, dtype, device, bias=True) for _ in range(2))
    targets = torch.randint(70, (4,), device=device)
    out = run(policy, targets, reference, options)
    logps, lse, entropy = statistics(policy, targets, options)
    close(out.logps, logps, bound(policy, options))
    close(out.lse, lse, bound(policy, options))
    close(out.ref_logps, statistics(reference, targets, options)[0], bound(reference, options))
    if options.entropy:
        close(out.entropy, entropy, 8 * bound(policy, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_logits(dtype, device):
    # Small integers: every float32 sum is exact, so both sides round the same numbers.
    hidden = torch.randint(-3, 4, (4, 64), device=device).to(dtype)
    weight = (torch.randint(-99, 100, (70, 64), device=device) / 64).to(dtype)
    head = Head(hidden, weight, torch.randint(-3, 4, (70,), device=device).to(dtype) / 8)
    targets = torch.randint(70, (4,), device=device)
    options = HeadOptions(round_logits=True)
    out = run(head, targets, options=options)
    close(out.logps, statistics(head, targets, options)[0], bound(head))
    if dtype == torch.bfloat16:
        unrounded = statistics(head, targets, PLAIN)[0]
        assert (out.logps.double() - unrounded).abs().max() > 1e-3


@pytest.mark.parametrize("v", [65, 70])
def test_all_negative_logits_and_padding(v, device):
    # A running maximum from 0, or padding counted as logit 0, would give log-probs near -80.
    head = make_head(3, 16, v, torch.float32, device)
    head.bias = torch.full((v,), -80.0, device=device)
    targets = torch.randint(v, (3,), device=device)
    out = run(head, targets)
    close(out.logps, statistics(head, targets, PLAIN)[0], bound(head))


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_large_common_offset(offset, device):
    # Integer logits and offset are exact in float32, so log-probs must not feel the offset: an
    # error of one rounding of the offset would be 2e-3.
    head = Head(
        torch.eye(4, device=device), torch.randint(-6, 7, (200, 4), device=device) + 0.0, None
    )
    targets = torch.randint(200, (4,), device=device)
    expected = statistics(head, targets, PLAIN)[0]
    head.bias = torch.full((200,), offset, device=device)
    close(run(head, targets).logps, expected, 128 * EPS32)


def test_masked_vocabulary(device):
    # Whole tiles of -inf: their maximum is -inf, and exp(-inf - -inf) must not become NaN.
    head = make_head(3, 16, 200, torch.float32, device)
    head.bias = torch.zeros(200, device=device)
    head.bias[:130] = float("-inf")
    options = HeadOptions(entropy=True)
    targets = torch.tensor([130, 150, 199], device=device)
    out = run(head, targets, options=options, want_unit_gradient=True)
    kept = Head(head.hidden, head.weight[130:], None)
    logps, lse, entropy = statistics(kept, targets - 130, options)
    close(out.logps, logps, bound(kept))
    close(out.lse, lse, bound(kept))
    close(out.entropy, entropy, 8 * bound(kept))
    assert out.unit_gradient.isfinite().all()


def test_ignored_rows(device):
    block, _ = tile_sizes(device, torch.float32)
    n = 2 * block + 8
    head = make_head(n, 16, 70, torch.float32, device)
    targets = torch.randint(70, (n,), device=device)
    targets[3] = -100
    targets[block : 2 * block] = -100  # a whole block of rows
    head.hidden[targets == -100] = float("nan")
    options = HeadOptions(entropy=True)
    out = run(head, targets, head, options, want_unit_gradient=True)
    counted = targets != -100
    kept = Head(head.hidden[counted], head.weight, None)
    expected = statistics(kept, targets[counted], options)[0]
    close(out.logps[counted], expected, bound(kept))
    close(out.ref_logps[counted], expected, bound(kept))
    assert (out.unit_gradient[~counted] == 0).all()
    assert out.unit_gradient.isfinite().all()
    for values in (out.logps, out.ref_logps, out.entropy):
        assert (values[~counted] == 0).all()


def test_another_ignore_index(device):
    head = make_head(4, 16, 70, torch.float32, device)
    targets = torch.tensor([0, 5, 0, 69], device=device)
    out = run(head, targets, options=HeadOptions(ignore_index=0))
    expected = statistics(head, targets, PLAIN)[0]
    close(out.logps, expected * (targets != 0), bound(head))


def test_all_rows_ignored(device):
    head = make_head(3, 16, 70, torch.float16, device)
    out = run(head, torch.full((3,), -100, device=device), head, want_unit_gradient=True)
    assert (out.logps == 0).all() and (out.ref_logps == 0).all() and (out.unit_gradient == 0).all()


def test_no_rows(device):
    head = make_head(0, 16, 70, torch.float32, device)
    targets = torch.empty(0, dtype=torch.int64, device=device)
    out = run(head, targets, head, HeadOptions(entropy=True), want_unit_gradient=True)
    assert out.logps.shape == out.lse.shape == out.entropy.shape == out.ref_logps.shape == (0,)
    assert out.unit_gradient.shape == (0, 16)


@pytest.mark.parametrize("target", [-1, 70, 100, 2**40])  # 100 lies in the last tile's padding
def test_target_outside_the_vocabulary_gives_nan(target, device):
    head = make_head(3, 16, 70, torch.float32, device)
    targets = torch.tensor([1, target, 2], device=device)
    out = run(head, targets, head, want_unit_gradient=True)
    assert out.logps.isnan().tolist() == out.ref_logps.isnan().tolist() == [False, True, False]
    assert out.unit_gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype, device):
    head = make_head(6, 24, 70, dtype, device)
    targets = torch.randint(70, (6,), device=device)
    expected = statistics(head, targets, PLAIN)[0]
    expected_direction = unit_gradient(head, targets, PLAIN)
    unaligned = torch.empty(70 * 24 + 1, dtype=dtype, device=device)[1:].view(70, 24)
    for weight in (
        unaligned.copy_(head.weight),  # base not on 16 bytes: no descriptor
        head.weight.T.contiguous().T,
        head.weight.repeat_interleave(2, 0)[::2],
    ):
        wide = torch.cat([head.hidden, head.hidden], 1)
        twice = targets.repeat_interleave(2)[::2]
        for hidden in (wide[:, :24], head.hidden.T.contiguous().T):
            out = run(Head(hidden, weight, None), twice, want_unit_gradient=True)
            close(out.logps, expected, bound(head))
            assert (
                relative_error(out.unit_gradient, expected_direction) < torch.finfo(dtype).eps * 4
            )
    one = Head(head.hidden[:1].expand(6, 24), head.weight, None)  # stride 0
    close(run(one, targets).logps, statistics(one, targets, PLAIN)[0], bound(head))


def test_reference_of_another_dtype_size_or_bias(device):
    policy = make_head(4, 16, 70, torch.float32, device)
    targets = torch.randint(70, (4,), device=device)
    for reference in (
        make_head(4, 24, 70, torch.float32, device),
        make_head(4, 16, 70, torch.bfloat16, device),
        make_head(4, 16, 70, torch.float32, device, bias=True),
    ):
        out = run(policy, targets, reference)
        close(out.logps, statistics(policy, targets, PLAIN)[0], bound(policy))
        close(out.ref_logps, statistics(reference, targets, PLAIN)[0], bound(reference))


def test_row_chunks_do_not_change_results(device, monkeypatch):
    from powerflow_fast.kernels import config

    block, _ = tile_sizes(device, torch.float16)
    n = 2 * block + 22
    head, reference = (make_head(n, 16, 40, torch.float16, device) for _ in range(2))
    targets = torch.randint(40, (n,), device=device)
    whole = run(head, targets, reference, want_unit_gradient=True)
    monkeypatch.setattr(config, "EXP_LOGITS_BYTES", 1)
    monkeypatch.setattr(config, "STATISTICS_BYTES", 1)
    chunked = run(head, targets, reference, want_unit_gradient=True)
    for name in ("logps", "lse", "unit_gradient", "ref_logps"):
        assert torch.equal(getattr(whole, name), getattr(chunked, name))


def test_two_runs_are_equal_bit_by_bit(device):
    head, reference = (make_head(20, 24, 130, torch.bfloat16, device) for _ in range(2))
    targets = torch.randint(130, (20,), device=device)
    options = HeadOptions(entropy=True)
    first, second = (run(head, targets, reference, options, True) for _ in range(2))
    assert first.sparsity is None and first.kept_columns is None  # of the certified route alone
    assert all(torch.equal(a, b) for a, b in zip(first[:-2], second[:-2], strict=True))


@pytest.mark.parametrize("shift", [0, 1], ids=["descriptors", "pointers"])
def test_offsets_past_two_to_the_31(shift, device):
    stride = 2**30  # 3 * stride overflows 32 bits
    head = make_head(4, 16, 4, torch.float16, device)
    try:
        # Virtual until it is written; `torch.empty` would fill it here.
        bytes_ = torch.UntypedStorage(2 * (3 * stride + 64), device=device)
    except RuntimeError as error:
        pytest.skip(f"no 6 GiB of address space: {error}")
    storage = torch.tensor([], dtype=torch.float16, device=device).set_(bytes_)
    hidden = storage.as_strided((4, 16), (stride, 1), shift).copy_(head.hidden)
    weight = storage.as_strided((4, 16), (stride, 1), 32 + shift).copy_(head.weight)
    targets = torch.arange(4, device=device)
    out = run(Head(hidden, weight, None), targets, want_unit_gradient=True)
    close(out.logps, statistics(head, targets, PLAIN)[0], bound(head))
    expected = unit_gradient(head, targets, PLAIN)
    assert relative_error(out.unit_gradient, expected) < gradient_tolerance(torch.float16)


def test_float64_is_refused_by_name(device):
    head = make_head(2, 8, 4, torch.float64, device)
    with pytest.raises(ValueError, match="backend.*float64"):
        run(head, torch.zeros(2, dtype=torch.int64, device=device))
