"""Memory of a step on a large GPU, counted: allocations of fake tensors, the kernels left out."""

import weakref

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powerflow_fast.kernels import (
    active_blocks,
    cached_dlogits,
    choose_columns,
    combine,
    config,
    dlogits,
    kept_probabilities,
    mean_unit_gradient,
    row_shift,
    statistics,
    unit_gradient,
)
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import gradients, triton_backend, triton_sparse
from powerflow_fast.logprobs.backend import Upstream
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import new_softmax_cache
from powerflow_fast.models.shapes import ModelShape
from powerflow_fast.planning.memory import Run, head_bytes
from tests.conftest import DEVICE

N, H, V = 16384, 4096, 131072
KEPT = V // 8  # more columns than a block keeps of a policy that was sharpened twofold
PROCESSORS = 132
TILES = config.TABLE["sm_90"]


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


def float32_product(left, right, out=None):
    size = (left.shape[0], right.shape[1])
    return left.new_empty(size, dtype=torch.float32) if out is None else out


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """No kernel is launched, and products make what they make on a GPU."""
    for module in (gradients, triton_backend):
        monkeypatch.setattr(module, "matmul", float32_product)
    monkeypatch.setattr(gradients, "add_product_", lambda sums, left, right: None)
    modules = (active_blocks, cached_dlogits, choose_columns, combine, dlogits, kept_probabilities)
    for module in (*modules, mean_unit_gradient, row_shift, statistics, unit_gradient):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoKernel())
    for module in (unit_gradient, dlogits, statistics):
        monkeypatch.setattr(module, "can_describe", lambda matrix: False)
    for module in (config, statistics):
        monkeypatch.setattr(module, "num_processors", lambda device: PROCESSORS)
    # What the host reads: every block keeps KEPT columns, and none fails.
    monkeypatch.setattr(triton_sparse, "_looks_sharp", lambda *arguments: True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda counts: [KEPT] * len(counts))
    monkeypatch.setattr(
        triton_sparse,
        "_failed",
        lambda skipped, tolerance, block_of_row, blocks: (
            torch.zeros(blocks, dtype=torch.bool, device=DEVICE),
            torch.empty(0, dtype=torch.int64, device=DEVICE),
        ),
    )


def inputs(n):
    """hidden, weight, targets and the reference's hidden, of which only shapes exist."""
    rows = (n, V, n)
    hidden, weight, ref_hidden = (
        torch.empty(r, H, dtype=torch.bfloat16, device=DEVICE) for r in rows
    )
    return hidden, weight, torch.empty(n, dtype=torch.int64, device=DEVICE), ref_hidden


def forward(hidden, weight, targets, ref_hidden, options, cache=None):
    policy, reference = (Head(x, weight, None) for x in (hidden, ref_hidden))
    return triton_backend.forward(policy, reference, targets, options, cache, config=TILES)


def backward(hidden, weight, targets, lse, cache=None):
    """Gradients of hidden and weight."""
    upstream = Upstream(torch.ones_like(lse), None, targets, lse, lse, None)
    arguments = (Head(hidden, weight, None), upstream, HeadOptions(), (True, True, False))
    return triton_backend.backward(*arguments, None, cache, config=TILES)[:2]


@pytest.mark.parametrize(("grad_tolerance", "most"), [(0.0, 450e6), (1e-3, 135e6)])
def test_a_frozen_head_at_a_large_shape(grad_tolerance, most):
    """Beside inputs and gradient, of a forward and backward pass for policy and reference."""
    options = HeadOptions(grad_tolerance=grad_tolerance, route="unit_gradient")
    with FakeTensorMode():
        arguments = inputs(N)
        hidden = arguments[0]
        with Allocations(*arguments) as memory:
            out = forward(*arguments, options)
            peak = memory.peak - hidden.nbytes  # the gradient is not there yet
            assert out.unit_gradient.nbytes < memory.now < out.unit_gradient.nbytes + 1e6
    assert N * H < peak <= most
    assert out.unit_gradient.nbytes <= most  # backward needs it beside the gradient


@pytest.mark.parametrize("n", [256, 1024])
def test_few_rows_of_a_trained_head_need_no_copy_of_the_weight(n):
    """A chunk's columns are bounded by the float32 product [columns, H], too."""
    with FakeTensorMode():
        hidden, weight, targets, _ = inputs(n)
        lse = torch.empty(n, device=DEVICE)
        with Allocations(hidden, weight, targets, lse) as memory:
            backward(hidden, weight, targets, lse)
    assert memory.peak - weight.nbytes <= config.DLOGITS_BYTES + 100e6  # one product and dlogits


def test_rows_that_are_scored_alone_go_by_whole_groups():
    with FakeTensorMode():
        hidden, weight, targets, ref_hidden = inputs(N)
        policy, reference = (Head(x, weight, None) for x in (hidden, ref_hidden))
        for models, second in ((1, None), (2, reference)):
            heads = statistics.Heads(policy, second, targets, HeadOptions(), TILES)
            rows = triton_backend.forward_rows(heads, store_exp_logits=False)
            units, rest = divmod(rows * models, TILES.statistics.rows)
            assert rest == 0 and units > 0 and units % statistics.GROUP == 0


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_plan_counts_the_head_at_a_large_shape(trained):
    """What `plan` counts is enough, and at most a quarter too much."""
    with FakeTensorMode():
        arguments = inputs(N)
        hidden, weight, targets, ref_hidden = arguments
        with Allocations(*arguments) as memory:
            tiling = triton_backend.vocab_tiling(hidden.device)
            cache = new_softmax_cache(hidden, weight, tiling) if trained else None
            options = HeadOptions(route="cache" if trained else "unit_gradient")
            out = forward(*arguments, options, cache)
            if trained:
                gradients = backward(hidden, weight, targets, out.lse, cache)
                gradients[0].to(hidden.dtype)
            else:
                out.unit_gradient.to(hidden.dtype)
    weights_gradient = weight.nbytes if trained else 0  # not the head's, in a plan
    counted = memory.peak - weights_gradient + hidden.nbytes + ref_hidden.nbytes
    shape = ModelShape("llama", H, V, 1, 32, 8, 128, 14336)
    run = Run(shape, lora_rank=0 if trained else 16, tokens=N)
    assert counted <= head_bytes(run, 1) <= 1.25 * counted
