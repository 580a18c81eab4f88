"""The size of the cache: bounded by the weight's gradient, and by a constant."""

import pytest
import torch

from powerflow_fast.logprobs.softmax_cache import VocabTiling, new_softmax_cache


@pytest.mark.parametrize("tiling", [VocabTiling(1024, 1), VocabTiling(64, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "n,h,v",
    [
        (256, 576, 49152),  # all rows
        (8192, 896, 151936),  # as many as the weight's gradient allows
        (16384, 4096, 131072),  # as many as the constant allows
        (4, 8, 1),
        (0, 8, 50),
    ],
)
def test_budget_of_any_shape(tiling, dtype, n, h, v):
    hidden = torch.empty(n, h, dtype=dtype, device="meta")
    weight = torch.empty(v, h, dtype=dtype, device="meta")
    budget = min(4 * v * h, 2 << 30)
    out = new_softmax_cache(hidden, weight, tiling)
    row_bytes = out.exp_logits.shape[1] * dtype.itemsize
    assert out.exp_logits.nbytes <= budget
    assert out.rows == n or out.exp_logits.nbytes + row_bytes > budget
    assert out.exp_logits.shape[1] >= v and len(out.factors) * tiling.tile_columns >= v
    assert out.factors.nbytes <= out.exp_logits.nbytes // 16 + 8 * n
