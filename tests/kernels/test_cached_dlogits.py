"""Gradients of a trained head from its softmax cache, against float64 autograd."""

import pytest
import torch

from powerflow_fast.kernels import config
from powerflow_fast.logprobs import triton_backend
from powerflow_fast.logprobs.backend import Upstream
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import new_softmax_cache
from tests.helpers.numerics import gradient_tolerance, relative_error
from tests.helpers.truth import DTYPES, Head, make_head, poison, tile_sizes
from tests.kernels.test_backward import ALL, expected_gradients

pytestmark = pytest.mark.usefixtures("tiles")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


def run(head: Head, targets, grad_logps, rows: int, options=HeadOptions()):  # noqa: B008 (frozen)
    """Forward and backward with the softmax of the first rows cached."""
    tiling = triton_backend.vocab_tiling(head.hidden.device)
    wide = head.hidden.new_empty(rows, 10_000)  # a head for which the budget is no limit
    cache = new_softmax_cache(wide, head.weight, tiling)
    assert cache.rows == rows
    out = triton_backend.forward(head.operands(), None, targets, options, cache)
    upstream = Upstream(grad_logps, None, targets, out.logps, out.lse, None)
    return triton_backend.backward(head.operands(), upstream, options, ALL, cache=cache)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        lambda block, columns: (1, 1, 8, 2),
        # odd H: pointer loads; one row in the second block
        lambda block, columns: (block + 1, block + 1, 33, 2 * columns + 2),
        # cached rows end within a block; one column in the last tile
        lambda block, columns: (block + 5, block // 2 + 2, 40, columns + 1),
        lambda block, columns: (5, 0, 40, 70),
    ],
    ids=["small", "odd", "some", "none"],
)
def test_against_float64(dtype, shape, device):
    n, rows, h, v = shape(*tile_sizes(device, dtype))
    head = make_head(n, h, v, dtype, device, bias=True)
    targets = torch.randint(v, (n,), device=device)
    grad_logps = torch.randn(n, device=device)
    actual = run(head, targets, grad_logps, rows)
    expected = expected_gradients(head, targets, grad_logps, None, HeadOptions())
    for got, want in zip(actual, expected, strict=True):
        assert relative_error(got, want) < gradient_tolerance(dtype)


def test_chunks_of_rows_and_columns(device, monkeypatch):
    monkeypatch.setattr(config, "STATISTICS_BYTES", 1)  # one block of rows at a time
    monkeypatch.setattr(config, "DLOGITS_BYTES", 1)  # one tile of columns at a time
    block, columns = tile_sizes(device, torch.float32)
    n, v = 3 * block + 2, 3 * columns + 8
    head = make_head(n, 24, v, torch.float32, device)
    targets = torch.randint(v, (n,), device=device)
    grad_logps = torch.ones((), device=device).expand(n)  # stride 0
    expected = expected_gradients(head, targets, grad_logps, None, HeadOptions())
    first, second = (run(head, targets, grad_logps, block + 8) for _ in range(2))
    for got, again, want in zip(first[:2], second[:2], expected[:2], strict=True):
        assert torch.equal(got, again)
        assert relative_error(got, want) < gradient_tolerance(torch.float32)


def test_cached_rows_are_not_recomputed(device, monkeypatch):
    recomputed = set()
    write = triton_backend.write_dlogits_chunk

    def spy(chunk, *arguments):
        recomputed.add(len(chunk.policy.hidden))
        write(chunk, *arguments)

    monkeypatch.setattr(triton_backend, "write_dlogits_chunk", spy)
    head = make_head(20, 16, 70, torch.float32, device)
    targets = torch.randint(70, (20,), device=device)
    for rows, others in ((20, set()), (17, {3}), (0, {20})):
        recomputed.clear()
        run(head, targets, torch.ones(20, device=device), rows)
        assert recomputed == others


def test_rows_without_gradient_contribute_nothing(device):
    block, _ = tile_sizes(device, torch.float32)
    n = block + 4
    head = make_head(n, 16, 70, torch.float32, device, bias=True)
    targets = torch.randint(70, (n,), device=device)
    grad_logps = torch.randn(n, device=device)
    idle = torch.zeros(n, dtype=torch.bool, device=device)
    idle[[0, 7]] = idle[block:] = True  # a whole block of rows among them
    grad_logps[idle] = 0
    counted = Head(head.hidden[~idle], head.weight, head.bias)
    expected = expected_gradients(counted, targets[~idle], grad_logps[~idle], None, HeadOptions())
    targets[7] = -100
    for poisoned in (float("nan"), float("inf")):
        head.hidden[idle] = poisoned
        grads = run(head, targets, grad_logps, n)
        assert (grads[0][idle] == 0).all()
        assert relative_error(grads[0][~idle], expected[0]) < gradient_tolerance(torch.float32)
        for got, want in zip(grads[1:], expected[1:], strict=True):
            assert relative_error(got, want) < gradient_tolerance(torch.float32)


def test_float16_does_not_underflow_inside(device):
    # As in test_backward: coefficients of 1e-6 are below float16's smallest number times p.
    head = make_head(4, 16, 70, torch.float16, device, bias=True)
    targets = torch.randint(70, (4,), device=device)
    grad_logps = torch.full((4,), 2e-6, device=device)
    grad_hidden, _, _ = run(head, targets, grad_logps, 4)
    expected = expected_gradients(head, targets, grad_logps, None, HeadOptions())[0]
    assert relative_error(grad_hidden, expected) < gradient_tolerance(torch.float16)


def test_every_tile_fits_the_cache():
    """The sizes of the cache must not depend on the tiles that a device gets."""
    tile_columns, padded_to = config.CACHE_TILE, config.CACHE_MULTIPLE
    table = config.TABLE.values()
    for tile in (*config.CANDIDATES, *(row.statistics for row in table)):
        assert tile.part % tile_columns == 0 and padded_to % tile.columns == 0
    for tile in (*config.CANDIDATES, *(row.dlogits for row in table)):
        assert tile.columns % tile_columns == 0  # a chunk of the backward pass begins with a tile
