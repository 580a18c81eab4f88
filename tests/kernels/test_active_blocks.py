"""Blocks of rows that count come first, and the others cost and change nothing."""

from dataclasses import replace

import pytest
import torch

from powerflow_fast.kernels import active_blocks, dlogits
from powerflow_fast.kernels import statistics as statistics_kernel
from powerflow_fast.kernels.config import config_for
from powerflow_fast.kernels.statistics import Heads, logit_statistics
from powerflow_fast.logprobs import triton_backend, triton_sparse
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import EPS32
from tests.helpers.truth import (
    DTYPES,
    close,
    logps_bound,
    make_head,
    poison,
    statistics,
    tile_sizes,
)

pytestmark = pytest.mark.usefixtures("tiles")

OPTIONS = HeadOptions(entropy=True)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("n", [0, 1, 8, 9, 600, 8 * active_blocks.AT_ONCE + 3])
@pytest.mark.parametrize("share", [0.0, 0.04, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["targets", "mask"])
def test_the_list(n, share, kind, device):
    counted = torch.rand(n, device=device) < share
    rows, idle = counted, 0
    if kind == "targets":
        rows, idle = torch.randint(9, (n,), device=device).where(counted, -100), -100
    blocks, count = active_blocks.active_blocks(rows, idle, 8)
    padded = torch.nn.functional.pad(counted, (0, -n % 8)).view(-1, 8).any(1)
    assert blocks.dtype == count.dtype == torch.int32 and count.tolist() == [padded.sum()]
    assert blocks.tolist() == (~padded).int().sort(stable=True).indices.tolist()


@pytest.mark.parametrize("n", [1, 16, 17, 100])
def test_lists_of_several_chunks(n, device):
    """Each is as if the chunk were alone."""
    counted = torch.rand(n, device=device) < 0.1
    lists = active_blocks.active_blocks(counted, 0, 8, chunk_rows=16)
    for index, rows in enumerate(counted.split(16)):
        alone, own = active_blocks.active_blocks(rows, 0, 8), lists.of_chunk(index, 2)
        assert own.blocks.tolist() == alone.blocks.tolist()
        assert own.count.tolist() == alone.count.tolist()
    assert len(lists.count) == -(-n // 16)


def spread_out(values, block, filling):
    """Every block of rows followed by one of `filling`, the last one by none."""
    pieces = []
    for piece in values.split(block):
        pieces += [piece, torch.full_like(values[:1], filling).expand(block, *values.shape[1:])]
    return torch.cat(pieces[:-1])


def case(dtype, device):
    """Two models' heads and targets; the same with an ignored block within; the others' rows."""
    block = config_for(device, dtype).statistics.rows
    n = block + 3
    _, columns = tile_sizes(device, dtype)
    v = columns + 40
    policy, reference = (make_head(n, 24, v, dtype, device) for _ in range(2))
    targets = torch.randint(v, (n,), device=device)
    targets[1] = -100
    sparse = [
        replace(head, hidden=spread_out(head.hidden, block, float("nan")))
        for head in (policy, reference)
    ]
    rows = torch.arange(3 * block, device=device).view(-1, block)[::2].flatten()[:n]
    return (policy, reference, targets), (*sparse, spread_out(targets, block, -100)), rows


@pytest.mark.parametrize(
    ("dtype", "persistent"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "persistent"],
)
def test_ignored_blocks_change_no_bit_of_other_log_probs(dtype, persistent, device, monkeypatch):
    monkeypatch.setattr(statistics_kernel, "num_processors", lambda device: 2)
    dense, sparse, rows = case(dtype, device)
    config = config_for(device, dtype)
    config = replace(config, statistics=replace(config.statistics, persistent=persistent))
    results = []
    for policy, reference, targets in (dense, sparse):
        pair = (policy.operands(), reference.operands())
        options = replace(OPTIONS, route="unit_gradient")
        out = triton_backend.forward(*pair, targets, options, config=config)
        results.append(out)
    ignored = sparse[2] == -100
    for name in ("logps", "lse", "entropy", "unit_gradient", "ref_logps"):
        alone, among = (getattr(out, name) for out in results)
        # The vendor's library may sum in another order where the product has more rows.
        if name == "unit_gradient":
            close(alone, among[rows].double(), 64 * EPS32 * alone.abs().max().item())
        else:
            assert torch.equal(alone, among[rows]), name
        assert (among[ignored] == 0).all(), name
    policy, reference, targets = dense
    counted = targets != -100
    for head, logps in ((policy, results[0].logps), (reference, results[0].ref_logps)):
        expected = statistics(head, targets.clamp(min=0), OPTIONS)[0]
        close(logps[counted], expected[counted], logps_bound(head, OPTIONS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dlogits_of_idle_blocks_are_zeros_and_the_others_keep_their_bits(dtype, device):
    dense, sparse, rows = case(dtype, device)
    config, written = config_for(device, dtype), []
    for policy, _, targets in (dense, sparse):
        n, v = len(targets), len(policy.weight)
        ones = torch.ones(n, device=device)
        out = torch.full((n, v), float("nan"), dtype=dtype, device=device)
        dlogits.write_dlogits_chunk(
            Heads(policy.operands(), None, targets, HeadOptions(), config),
            dlogits.UpstreamRows(
                ones, None, -4 * ones, -torch.expm1(-4 * ones), 6 * ones, None, targets != -100
            ),
            active_blocks.active_blocks(targets, -100, config.dlogits.rows),
            ones[:1],
            out,
        )
        written.append(out)
    alone, among = written
    assert torch.equal(alone, among[rows]) and alone.isfinite().all()
    assert (among[sparse[2] == -100] == 0).all()


@pytest.mark.parametrize("persistent", [False, True], ids=["plain", "persistent"])
def test_no_product_is_formed_for_an_ignored_block(persistent, device):
    _, (policy, _, targets), rows = case(torch.float32, device)
    config = config_for(device, torch.float32)
    config = replace(config, statistics=replace(config.statistics, persistent=persistent))
    heads = Heads(policy.operands(), None, targets, OPTIONS, config)
    out = logit_statistics(heads, heads.active_blocks())
    written = torch.zeros_like(targets, dtype=torch.bool)
    written[rows] = True
    for values in (out.tile_shift, out.tile_total, out.tile_weighted_sum):
        assert torch.equal(~values.isnan(), written.expand_as(values))


def test_peaks_of_an_ignored_block_are_lower_than_any(device):
    """The certified route keeps none of its columns, and does not take it for a flat one."""
    _, (policy, _, targets), _ = case(torch.float32, device)
    config, plain = config_for(device, torch.float32), HeadOptions()
    heads = Heads(policy.operands(), None, targets, plain, config)
    search = triton_sparse._search(heads)
    logit_statistics(heads, heads.active_blocks(), search=search)
    assert (search.column_max[1::2] == float("-inf")).all()
    assert search.column_max[::2].isfinite().all()
