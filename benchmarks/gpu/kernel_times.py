"""Stage `kernels`: each kernel alone, on the chunk that a step gives it, beside a bare product.

Operations are those of the product inside; bytes are what must move: inputs read once, results
written once. Where a vendor's product does the same work but for what the kernel adds, its time is
in the same line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import method
from benchmarks.gpu.lines import Line
from benchmarks.gpu.shapes import dtype_of, shapes
from benchmarks.gpu.worker import Run
from benchmarks.inputs import Inputs, Shape, draw
from powerflow_fast.kernels import combine, config, row_shift, statistics
from powerflow_fast.kernels.active_blocks import active_blocks
from powerflow_fast.kernels.cached_dlogits import write_cached_dlogits
from powerflow_fast.kernels.choose_columns import choose_columns
from powerflow_fast.kernels.dlogits import UpstreamRows, write_dlogits_chunk
from powerflow_fast.kernels.kept_probabilities import kept_probabilities
from powerflow_fast.kernels.mean_unit_gradient import write_mean_unit_gradients
from powerflow_fast.kernels.operands import Head
from powerflow_fast.kernels.unit_gradient import KeptColumns, TargetRows, write_unit_gradients
from powerflow_fast.logprobs import triton_backend, triton_sparse
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.products import matmul
from powerflow_fast.logprobs.softmax_cache import new_softmax_cache

SECONDS = 0.15  # of rounds for each kernel
KEPT = 0.05  # of the columns, for the kernels of the certified route
MOST_ROWS = 2048  # of the vendor's product beside a kernel: it forms every logit
PLAIN = HeadOptions()


def kernels(run: Run) -> Iterator[None]:
    torch.zeros(1, device=run.device)
    yield
    for name, shape in shapes(run.tiny).items():
        dtype = dtype_of(run.device)
        kernel_chunks = Chunks.draw(shape, dtype, run.device)
        for kernel, case in CASES.items():
            run.case(f"{kernel}, {name}", partial(timed, case, kernel_chunks, run.budget(SECONDS)))
        del kernel_chunks


@dataclass(frozen=True)
class Work:
    """A launch, what it must do, and the vendor's product beside it."""

    launch: Callable[[], object]
    moved: int  # bytes
    flops: int = 0
    vendor: Callable[[], object] | None = None
    rows: int = 0


def timed(case: Callable[[Chunks], Work], chunks: Chunks, budget: float) -> Line:
    work = case(chunks)
    line: Line = dict(method.quartiles(method.repeat(work.launch, chunks.device, budget)))
    line |= {"rows": work.rows, "bytes": work.moved}
    line["bandwidth"] = work.moved / line["seconds"]
    if work.flops:
        line |= {"flops": work.flops, "tflops": work.flops / line["seconds"] / 1e12}
    if work.vendor is not None:
        beside = method.quartiles(method.repeat(work.vendor, chunks.device, budget))
        line |= {"vendor_seconds": beside["seconds"]}
        line["vendor_tflops"] = work.flops / beside["seconds"] / 1e12
    return line


@dataclass
class Chunks:
    """Operands of one shape; chunks of rows as the back end cuts them."""

    inputs: Inputs
    config: config.Config
    device: torch.device

    @classmethod
    def draw(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Chunks:
        tiles = config.config_for(device, dtype)
        return cls(draw("random", shape, dtype, device), tiles, device)

    @property
    def weight(self) -> Tensor:  # [V, H]
        return self.inputs.weight

    @property
    def item(self) -> int:
        return self.weight.element_size()

    def rows(self, models: int, store_exp_logits: bool) -> int:
        whole = self.heads(len(self.inputs.hidden), models)
        return min(triton_backend.forward_rows(whole, store_exp_logits), len(self.inputs.hidden))

    def exp_logits(self, rows: int) -> Tensor:
        padded = statistics.padded_columns(len(self.weight), self.config.statistics)
        return self.weight.new_empty((rows, padded))

    def heads(self, rows: int, models: int, options: HeadOptions = PLAIN) -> statistics.Heads:
        policy = Head(self.inputs.hidden.detach()[:rows], self.weight, None)
        reference = Head(self.inputs.ref_hidden[:rows], self.weight, None) if models == 2 else None
        return statistics.Heads(policy, reference, self.inputs.targets[:rows], options, self.config)

    def pilot(self, rows: int, models: int) -> Tensor:
        heads = self.heads(rows, models)
        return row_shift.pilot_shift(heads, heads.active_blocks()).view(-1)

    def statistics(self, shift: Tensor, rows: int, models: int, exp_logits=None, search=None):
        heads = self.heads(rows, models)
        return statistics.logit_statistics(heads, heads.active_blocks(), shift, exp_logits, search)

    def combined(self, stats, rows: int, models: int) -> tuple[combine.Rows, combine.Misled]:
        heads = self.heads(rows, models)
        misled = combine.new_misled(stats.row_shift, heads)
        return combine.combine(stats, heads, combine.new_results(heads), misled), misled


def _pilot(chunks: Chunks) -> Work:
    rows, models = chunks.rows(2, store_exp_logits=True), 2
    num_h, item = chunks.weight.shape[1], chunks.item
    moved = item * num_h * (models * rows + row_shift.PILOT) + 4 * models * rows
    flops = 2 * models * rows * num_h * row_shift.PILOT
    return Work(lambda: chunks.pilot(rows, models), moved, flops, rows=rows)


def _statistics(chunks: Chunks, stored: bool = False, column_max: bool = False) -> Work:
    rows, models = chunks.rows(2, store_exp_logits=stored), 2
    (num_v, num_h) = chunks.weight.shape
    exp_logits = chunks.exp_logits(rows) if stored else None
    search = None
    if column_max:
        search = triton_sparse._search(chunks.heads(rows, 1, HeadOptions(grad_tolerance=1e-3)))
    shift = chunks.pilot(rows, models)
    tiles = num_v // chunks.config.statistics.columns
    moved = chunks.item * num_h * (models * rows + num_v) + 4 * tiles * models * rows
    moved += 0 if exp_logits is None else exp_logits.nbytes
    moved += 0 if search is None else search.column_max.nbytes
    hidden, weight = chunks.inputs.hidden.detach(), chunks.weight
    both = torch.cat([hidden[:rows], chunks.inputs.ref_hidden[:rows]])
    return Work(
        lambda: chunks.statistics(shift, rows, models, exp_logits, search),
        moved,
        2 * models * rows * num_h * num_v,
        (lambda: both @ weight.T) if rows <= MOST_ROWS else None,
        rows,
    )


def _combine(chunks: Chunks) -> Work:
    rows, models = chunks.rows(2, store_exp_logits=True), 2
    stats = chunks.statistics(chunks.pilot(rows, models), rows, models)
    read = stats.tile_total.nbytes
    return Work(lambda: chunks.combined(stats, rows, models), read + 32 * models * rows, rows=rows)


def _guard(chunks: Chunks) -> Work:
    """Launches that find that no row was misled."""
    rows, models = chunks.rows(2, store_exp_logits=True), 2
    stats = chunks.statistics(chunks.pilot(rows, models), rows, models)
    found, misled = chunks.combined(stats, rows, models)
    heads = chunks.heads(rows, models)
    written = (stats, found, combine.new_results(heads), None, None)
    return Work(
        lambda: row_shift.redo_misled(heads, misled, *written), misled.rows.nbytes, rows=rows
    )


def _unit_gradient(chunks: Chunks) -> Work:
    """The vendor's product, and what brings it to the unit gradient."""
    rows = chunks.rows(2, store_exp_logits=True)
    num_v, num_h = chunks.weight.shape
    exp_logits = chunks.exp_logits(rows)
    stats = chunks.statistics(chunks.pilot(rows, 1), rows, 1, exp_logits)
    found, _ = chunks.combined(stats, rows, 1)
    out = torch.empty((rows, num_h), dtype=torch.float32, device=chunks.device)
    heads = chunks.heads(rows, 1)
    at_target = TargetRows(heads.targets, found.one_minus_p, stats.target_logit)

    def launch() -> None:
        matmul(exp_logits[:, :num_v], chunks.weight, out=out)
        write_mean_unit_gradients(out, heads, at_target, found.factor, out)

    moved = exp_logits.nbytes + chunks.weight.nbytes + out.nbytes
    flops = 2 * rows * num_h * num_v
    vendor = lambda: matmul(exp_logits[:, :num_v], chunks.weight, out=out)  # noqa: E731
    return Work(launch, moved, flops, vendor, rows)


def _dlogits(chunks: Chunks) -> Work:
    """One chunk of the vocabulary of a head that trains."""
    heads = chunks.heads(len(chunks.inputs.hidden), 1)
    hidden, (num_n, num_h) = heads.policy.hidden, heads.policy.hidden.shape
    columns = triton_backend.backward_columns(heads.policy, True, chunks.config)
    weight = chunks.weight[:columns]
    out = hidden.new_empty((num_n, columns))
    grad, lse = torch.ones(2, num_n, device=chunks.device).unbind()
    active = torch.ones(num_n, dtype=torch.bool, device=chunks.device)
    scale = torch.ones(1, device=chunks.device)
    chunk = heads._replace(policy=Head(hidden, weight, None))
    blocks = active_blocks(active, 0, chunks.config.dlogits.rows)
    rows = UpstreamRows(grad, None, -lse, lse, lse, None, active)
    return Work(
        lambda: write_dlogits_chunk(chunk, rows, blocks, scale, out),
        hidden.nbytes + weight.nbytes + out.nbytes,
        2 * num_n * num_h * columns,
        lambda: hidden @ weight.T,
        num_n,
    )


def _cached_dlogits(chunks: Chunks) -> Work:
    """d loss / d logits of the rows whose softmax a trained head caches."""
    head = chunks.heads(len(chunks.inputs.hidden), 1).policy
    cache = new_softmax_cache(*head[:2], triton_backend.vocab_tiling(chunks.device))
    cache.factors.fill_(1.0), cache.exp_logits.fill_(0.5), cache.one_minus_p.fill_(0.5)
    rows = cache.rows
    columns = triton_backend.backward_columns(head, True, chunks.config)
    out = head.hidden.new_empty((rows, columns))
    grad = torch.ones(rows, device=chunks.device)
    active = torch.ones(rows, dtype=torch.bool, device=chunks.device)
    targets = chunks.inputs.targets[:rows]
    return Work(
        lambda: write_cached_dlogits(*cache, targets, grad, active, out),
        2 * out.nbytes,
        rows=rows,
    )


def _column_maxima(chunks: Chunks) -> Tensor:
    """[row blocks, V] of which about KEPT lie above the threshold that is found."""
    num_v = len(chunks.weight)
    blocks = -(-len(chunks.inputs.hidden) // chunks.config.statistics.rows)
    generator = torch.Generator().manual_seed(0)  # one of the CPU: chunks may have no storage
    low = torch.rand(blocks, num_v, generator=generator) * -10 - 30
    high = torch.rand(blocks, num_v, generator=generator) < KEPT
    return torch.where(high, -5.0, low).half().to(chunks.device)


def _columns(chunks: Chunks) -> Work:
    column_max = _column_maxima(chunks)
    most = max(1, int(triton_sparse.LARGEST_SHARE * column_max.shape[1]))
    return Work(
        lambda: choose_columns(column_max, 1e-3, most),
        column_max.nbytes + int(4 * KEPT * column_max.numel()),
        rows=len(chunks.inputs.hidden),
    )


def _kept(chunks: Chunks) -> Work:
    """Probabilities of the kept columns of one chunk of rows."""
    heads, found, width, totals = _kept_chunk(chunks)
    rows, num_h = len(heads.targets), chunks.weight.shape[1]
    return Work(
        lambda: kept_probabilities(heads, totals.shift, totals.total, found, width),
        chunks.item * (rows * (num_h + width) + found.columns.shape[0] * width * num_h),
        2 * rows * num_h * width,
        rows=rows,
    )


def _kept_unit_gradient(chunks: Chunks) -> Work:
    """Their product with the gathered rows of the weight."""
    heads, found, width, totals = _kept_chunk(chunks)
    rows, num_h = len(heads.targets), chunks.weight.shape[1]
    exp_logits, _ = kept_probabilities(heads, totals.shift, totals.total, found, width)
    out = torch.empty((rows, num_h), dtype=chunks.weight.dtype, device=chunks.device)
    zeros = torch.zeros(rows, device=chunks.device)
    at_target = TargetRows(heads.targets, totals.one_minus_p, zeros)
    return Work(
        lambda: write_unit_gradients(exp_logits, heads, at_target, out, kept=found),
        exp_logits.nbytes + chunks.item * found.columns.shape[0] * width * num_h + out.nbytes,
        2 * rows * num_h * width,
        rows=rows,
    )


def _kept_chunk(chunks: Chunks) -> tuple[statistics.Heads, KeptColumns, int, combine.Rows]:
    column_max = _column_maxima(chunks)
    block, num_v = chunks.config.statistics.rows, column_max.shape[1]
    width = max(1, int(KEPT * num_v))
    budget = config.KEPT_BYTES // (block * chunks.item)
    blocks = min(max(1, budget // width), len(column_max))
    rows = min(blocks * block, len(chunks.inputs.hidden))
    most = max(width, int(triton_sparse.LARGEST_SHARE * num_v))
    found = choose_columns(column_max[:blocks], 1e-3, most)
    found = found._replace(counts=found.counts.clamp(max=width))
    totals, _ = chunks.combined(chunks.statistics(chunks.pilot(rows, 1), rows, 1), rows, 1)
    return chunks.heads(rows, 1), found, width, totals


CASES: dict[str, Callable[[Chunks], Work]] = {
    "pilot of the pair": _pilot,
    "statistics of the pair": _statistics,
    "statistics of the pair, exp-logits stored": partial(_statistics, stored=True),
    "unit gradient": _unit_gradient,
    "dlogits": _dlogits,
    "combine": _combine,
    "guard": _guard,
    "statistics of the pair, column peaks": partial(_statistics, column_max=True),
    "columns": _columns,
    "kept probabilities": _kept,
    "unit gradient, kept columns": _kept_unit_gradient,
    "kept dlogits": _cached_dlogits,
}
