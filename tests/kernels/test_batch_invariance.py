"""A row has the same bits whatever else is in the batch, and whatever else is asked for."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from powerflow_fast.kernels import config, statistics
from powerflow_fast.kernels.config import config_for
from powerflow_fast.kernels.statistics import padded_columns
from powerflow_fast.kernels.tiles import sum_rows
from powerflow_fast.logprobs import triton_backend, triton_tuning
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.truth import DTYPES, make_head, poison, tile_sizes

pytestmark = pytest.mark.usefixtures("tiles")

H = 24
NAMES = ("logps", "lse", "entropy")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def case(dtype, device):
    """A head of several tiles and ragged ends, and targets for its rows."""
    rows, columns = tile_sizes(device, dtype)
    head = make_head(2 * rows + 5, H, 2 * columns + 8, dtype, device, bias=True, spread=4.0)
    return head, torch.randint(len(head.weight), (len(head.hidden),), device=device)


def run(head, targets, options, *, pair=False, unit_gradient=False, rows=slice(None)):
    policy = head.operands()._replace(hidden=head.hidden[rows])
    options = replace(options, route="unit_gradient" if unit_gradient else "none")
    return triton_backend.forward(policy, policy if pair else None, targets[rows], options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_and_entropy(dtype, device):
    """Of some rows, some of them ignored, with and without gradients, as policy or as reference."""
    head, targets = case(dtype, device)
    options = HeadOptions(entropy=True, softcap=20.0)
    whole = run(head, targets, options)
    ignored = targets.clone()
    ignored[: len(targets) // 2] = -100
    last = slice(len(targets) // 2 + 1, None)
    for given, rows, asked in (
        (targets, slice(3, 4), {}),
        (targets, last, {"pair": True}),
        (ignored, slice(None), {"unit_gradient": True}),
        # A multiple of 16 alone is known to the compiler, which may lay out threads by it.
        (targets, slice(2, 18), {"pair": True, "unit_gradient": True}),
    ):
        out = run(head, given, options, rows=rows, **asked)
        counted = given[rows] != -100
        for name in NAMES:
            expected = getattr(whole, name)[rows][counted]
            assert torch.equal(getattr(out, name)[counted], expected), name
        if "pair" in asked:
            assert torch.equal(out.ref_logps[counted], whole.logps[rows][counted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_directions_where_asked_for(dtype, device, monkeypatch):
    """Every product has as many rows as a chunk, of which a batch fills some."""
    monkeypatch.setenv("POWERFLOW_BATCH_INVARIANT", "1")
    head, targets = case(dtype, device)
    tile = config_for(device, dtype).statistics
    block, columns = tile.rows, padded_columns(len(head.weight), tile)
    chunk = 3 * block * columns * head.hidden.element_size()
    monkeypatch.setattr(config, "EXP_LOGITS_BYTES", chunk)
    for module in (config, statistics):
        monkeypatch.setattr(module, "GROUP", 4)  # row blocks of both models: two of each
    sizes = []
    matmul = triton_backend.matmul

    def watch(left, right, out=None):
        sizes.append(len(left))
        return matmul(left, right, out=out)

    monkeypatch.setattr(triton_backend, "matmul", watch)
    whole = run(head, targets, HeadOptions(), unit_gradient=True).unit_gradient
    for rows, pair in ((slice(0, 3), True), (slice(block, None), False), (slice(7, 30), False)):
        out = run(
            head, targets, HeadOptions(), unit_gradient=True, rows=rows, pair=pair
        ).unit_gradient
        assert torch.equal(out, whole[rows])
    # float16's product is a kernel, which sums in one order.
    assert set(sizes) == (set() if dtype == torch.float16 else {2 * block})


def test_tiles_are_not_tuned_for_the_batch(device, monkeypatch):
    monkeypatch.setenv("POWERFLOW_TUNE", "1")
    monkeypatch.setenv("POWERFLOW_BATCH_INVARIANT", "1")
    monkeypatch.setattr(triton_tuning, "_tune_and_store", None)
    head, targets = case(torch.bfloat16, device)
    call = head.operands(), targets, HeadOptions(), triton_backend.tuned_calls
    assert triton_tuning.tile_config(*call) == config_for(device, torch.bfloat16)


@triton.jit
def sum_rows_kernel(tile_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offs = tl.arange(0, COLUMNS)
    tile = tl.load(tile_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + offs[None, :])
    tl.store(out_ptr + offs, sum_rows(tile))


@pytest.mark.parametrize("rows", [1, 2, 16, 32])
def test_rows_are_summed_by_halves(rows, device):
    """In an order of their own, which no layout of a GPU's threads changes."""
    tile = torch.randn(rows, 8, device=device)
    out = torch.empty(8, device=device)
    sum_rows_kernel[(1,)](tile, out, rows, 8)
    while len(tile) > 1:
        upper, lower = tile.chunk(2)
        tile = upper + lower
    assert torch.equal(out, tile[0])
