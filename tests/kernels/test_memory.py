"""Memory of a step on a large GPU, counted: allocations of fake tensors, the kernels left out."""

import weakref

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powerflow_fast import backend_triton, certified_triton
from powerflow_fast.kernels import columns, combine, config, direction, kept, statistics
from powerflow_fast.options import HeadOptions

N, H, V = 16384, 4096, 131072
KEPT = V // 8  # more columns than a block keeps of a policy that was sharpened twofold
PROCESSORS = 132


class Allocations(TorchDispatchMode):
    """Bytes of storage that operators allocate: in use now, and at most."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in inputs}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


class NoKernel:
    """Launched like a kernel; writes nothing."""

    def __getitem__(self, grid):
        return lambda **arguments: None


@pytest.fixture
def no_kernels(monkeypatch):
    for module in (columns, combine, direction, kept, statistics):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoKernel())
    for module in (direction, statistics):
        monkeypatch.setattr(module, "can_describe", lambda matrix: False)
    for module in (config, statistics):
        monkeypatch.setattr(module, "num_processors", lambda device: PROCESSORS)
    # What the host reads: every block keeps KEPT columns, and none fails.
    monkeypatch.setattr(certified_triton, "_looks_sharp", lambda *arguments: True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda counts: [KEPT] * len(counts))
    monkeypatch.setattr(
        certified_triton,
        "_failed",
        lambda skipped, tolerance, block_of_row, blocks: (
            torch.zeros(blocks, dtype=torch.bool),
            torch.empty(0, dtype=torch.int64),
        ),
    )


@pytest.mark.parametrize(("grad_tolerance", "most"), [(0.0, 600e6), (1e-3, 150e6)])
def test_a_frozen_head_at_a_large_shape(grad_tolerance, most, no_kernels):
    """Beside inputs and gradient, of a forward and backward pass for policy and reference."""
    options = HeadOptions(grad_tolerance=grad_tolerance)
    with FakeTensorMode():
        hidden, ref_hidden = (torch.empty(N, H, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.empty(V, H, dtype=torch.bfloat16)
        targets = torch.empty(N, dtype=torch.int64)
        with Allocations(hidden, ref_hidden, weight, targets) as memory:
            reference = (ref_hidden, weight, None)
            arguments = (hidden, weight, None, targets, reference, options, True)
            out = backend_triton.forward(*arguments, config=config.TABLE["sm_90"])
            forward = memory.peak - hidden.nbytes  # the gradient is not there yet
            assert out.direction.nbytes < memory.now < out.direction.nbytes + 1e6
    assert N * H < forward <= most
    assert out.direction.nbytes <= most  # backward needs it beside the gradient
