"""The list of row blocks with work in them."""

import pytest
import torch

from powerflow_fast.kernels.active_blocks import AT_ONCE, active_blocks
from tests.kernels.truth import poison


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("blocks", [1, 5, AT_ONCE, 2 * AT_ONCE + 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=lambda share: f"{share:.0%}")
def test_blocks_with_work_come_first(rows, blocks, share, device):
    n = blocks * rows - rows // 3  # the last block is cut
    works = torch.rand(blocks, device=device) < share
    targets = torch.full((blocks, rows), -100, device=device)
    targets[works, torch.randint(rows - rows // 3, (1,)).item()] = 0  # one row of each
    targets = targets.flatten()[:n]
    for values, idle in ((targets, -100), (targets != -100, 0)):
        found, count = active_blocks(values.contiguous(), idle, rows)
        assert found.dtype == count.dtype == torch.int32 and count.tolist() == [works.sum()]
        first, others = works.nonzero()[:, 0], (~works).nonzero()[:, 0].flip(0)
        assert found.tolist() == [*first.tolist(), *others.tolist()]
