"""Memory of a step on a large GPU, counted: allocations of fake tensors, the kernels left out."""

import weakref
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powerflow_fast import backend_triton, certified_triton, gradient_sums, plan
from powerflow_fast.kernels import (
    active_blocks,
    columns,
    combine,
    config,
    direction,
    dlogits,
    kept,
    kept_dlogits,
    statistics,
    tiles,
)
from powerflow_fast.model_shapes import ModelShape
from powerflow_fast.numerators import new_numerators
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


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.new_empty((left.shape[0], right.shape[1]), dtype=torch.float32)


@pytest.fixture
def no_kernels(monkeypatch):
    for module in (
        active_blocks,
        columns,
        combine,
        direction,
        dlogits,
        kept,
        kept_dlogits,
        statistics,
    ):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, NoKernel())
    for module in (direction, dlogits, statistics):
        monkeypatch.setattr(module, "can_describe", lambda matrix: False)
    for module in (config, statistics):
        monkeypatch.setattr(module, "num_processors", lambda device: PROCESSORS)
    # As on a GPU, which has a product of 16-bit operands with a float32 result.
    for module in (gradient_sums, certified_triton):
        monkeypatch.setattr(module, "product", wide_product)
    monkeypatch.setattr(backend_triton, "_check_inputs", lambda *inputs: None)
    # What the host reads: every block keeps KEPT columns, and none fails.
    monkeypatch.setattr(certified_triton, "_looks_sharp", lambda *arguments: True)
    monkeypatch.setattr(FakeTensor, "tolist", lambda counts: [KEPT] * len(counts))
    monkeypatch.setattr(
        certified_triton,
        "_failed",
        lambda skipped, tolerance, block_of_row, blocks: (
            torch.zeros(blocks, dtype=torch.bool, device=skipped.device),
            torch.empty(0, dtype=torch.int64, device=skipped.device),
        ),
    )


def counted_step(device, n: int, trained: bool, grad_tolerance: float = 0.0) -> dict[str, int]:
    """Bytes beside the inputs: at the forward pass's peak, after it, and at the step's peak.

    The gradient of hidden is of the inputs' type when the step ends, as autograd makes it.
    """
    options = HeadOptions(grad_tolerance=grad_tolerance)
    table = config.TABLE["sm_90"]
    with FakeTensorMode():
        make = partial(torch.empty, device=device)
        hidden, ref_hidden = (make(n, H, dtype=torch.bfloat16) for _ in range(2))
        weight = make(V, H, dtype=torch.bfloat16)
        targets, upstream = make(n, dtype=torch.int64), make(n)
        with Allocations(hidden, ref_hidden, weight, targets, upstream) as memory:
            numerators = None
            if trained:
                layout = backend_triton.numerators_layout(device)
                numerators = new_numerators(hidden, weight, layout, True)
            arguments = (hidden, weight, None, targets, (ref_hidden, weight, None), options)
            out = backend_triton.forward(
                *arguments, not trained, numerators, want_kept=False, config=table
            )
            found = {"forward": memory.peak, "between": memory.now}
            if trained:
                needs = (True, True, False)
                head = (hidden, weight, None, targets)
                grads = backend_triton.backward(
                    upstream, None, *head, out.lse, None, options, needs, None, numerators, table
                )
                del numerators
                gradient = grads[0].to(hidden.dtype)
            else:
                gradient = (upstream[:, None] * out.direction).to(hidden.dtype)
            found |= {"step": memory.peak, "direction": getattr(out.direction, "nbytes", 0)}
            found["gradient"] = gradient.nbytes
    return found


@pytest.mark.parametrize(("grad_tolerance", "most"), [(0.0, 600e6), (1e-3, 150e6)])
def test_a_frozen_head_at_a_large_shape(grad_tolerance, most, no_kernels, device):
    """Beside inputs and gradient, of a forward and backward pass for policy and reference."""
    found = counted_step(device, N, False, grad_tolerance)
    forward = found["forward"] - found["gradient"]  # which is not there yet
    assert found["direction"] < found["between"] < found["direction"] + 1e6
    assert N * H < forward <= most
    assert found["direction"] <= most  # backward needs it beside the gradient


@pytest.mark.parametrize("n", [256, 1024, N])
def test_a_trained_head_has_no_second_gradient_of_the_weight(n, no_kernels, device):
    """Not even with few tokens, of which a chunk of the logits could cover the vocabulary."""
    found = counted_step(device, n, True)
    gradient, hidden = 2 * V * H, 4 * n * H  # of the weight; of hidden, in float32
    beside = found["step"] - gradient
    kept = min(1 << 30, 2 * n * V) * 33 / 32  # with factors
    columns = min(config.DLOGITS_BYTES // max(2 * n, 4 * H), V)
    assert beside < 1.01 * (kept + 2.5 * hidden + columns * (2 * n + 4 * H))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_what_plan_counts(trained, no_kernels, device):
    """At most a quarter more than a step takes, and no less."""
    shape = ModelShape("llama", H, V, 1, 1, 1, H, H)
    run = plan.Run(shape, lora_rank=0 if trained else 16, tokens=N)
    states = 2 * (2 * N * H)  # packed, of both models
    found = counted_step(device, N, trained)
    counted = states + found["step"] - (2 * V * H if trained else 0)
    # Vectors of one number a token are left out.
    assert 0.999 * counted <= plan.head_bytes(run, 1) <= 1.25 * counted


@pytest.mark.parametrize("models", [1, 2])
def test_chunks_of_log_probs_alone_are_whole_groups(models, no_kernels, device):
    """Of row blocks that read the weight together: a part of a group would read it once more."""
    table = config.TABLE["sm_90"]
    with FakeTensorMode():
        hidden, weight = torch.empty(N, H, device=device), torch.empty(V, H, device=device)
        policy = tiles.Operands(hidden, weight, None)
        rows = backend_triton.forward_rows(policy, models, False, table)
        few = backend_triton.forward_rows(policy._replace(weight=weight[:1]), models, False, table)
    for found in (rows, few):
        assert found > 0 and found * models % (statistics.GROUP * table.statistics.rows) == 0
    assert 8 * models * rows * V // table.statistics.part <= config.STATISTICS_BYTES
