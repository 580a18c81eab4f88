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
from powerflow_fast.kernels import (
    columns,
    combine,
    config,
    direction,
    dlogits,
    kept,
    mean_direction,
    row_shift,
    statistics,
)
from powerflow_fast.kernels import kept_dlogits as kept_rows
from powerflow_fast.kernels.active_blocks import active_blocks
from powerflow_fast.kernels.tiles import Operands
from powerflow_fast.logprobs import triton_backend, triton_sparse
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import new_numerators
from powerflow_fast.logprobs.triton_gradients import product

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
    line: Line = dict(method.spread(method.repeat(work.launch, chunks.device, budget)))
    line |= {"rows": work.rows, "bytes": work.moved}
    line["bandwidth"] = work.moved / line["seconds"]
    if work.flops:
        line |= {"flops": work.flops, "tflops": work.flops / line["seconds"] / 1e12}
    if work.vendor is not None:
        beside = method.spread(method.repeat(work.vendor, chunks.device, budget))
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

    def rows(self, models: int, want_direction: bool) -> int:
        chunk = triton_backend.forward_rows(
            self.operands(len(self.inputs.hidden)), models, want_direction, self.config
        )
        return min(chunk, len(self.inputs.hidden))

    def operands(self, rows: int, reference: bool = False) -> Operands:
        hidden = self.inputs.ref_hidden if reference else self.inputs.hidden.detach()
        return Operands(hidden[:rows], self.weight, None)

    def soft(self, rows: int) -> Tensor:
        padded = statistics.padded_columns(len(self.weight), self.config.statistics)
        return self.weight.new_empty((rows, padded))

    def heads(self, rows: int, models: int) -> statistics.Heads:
        reference = self.operands(rows, True) if models == 2 else None
        targets = self.inputs.targets[:rows]
        tile, tma = self.config.statistics, self.config.tma
        return statistics.Heads(self.operands(rows), reference, targets, PLAIN, tile, tma)

    def pilot(self, rows: int, models: int) -> Tensor:
        heads = self.heads(rows, models)
        return row_shift.pilot_shift(heads, heads.active_blocks()).view(-1)

    def statistics(self, shift: Tensor, rows: int, models: int, soft=None, search=None):
        heads = self.heads(rows, models)
        return statistics.logit_statistics(heads, heads.active_blocks(), shift, soft, search)

    def combined(self, stats, rows: int, models: int) -> tuple[combine.Rows, combine.Misled]:
        heads = self.heads(rows, models)
        misled = combine.new_misled(stats.row_shift, heads)
        return combine.combine(stats, heads, combine.new_results(heads), misled), misled


def _pilot(chunks: Chunks) -> Work:
    rows, models = chunks.rows(2, want_direction=True), 2
    num_h, item = chunks.weight.shape[1], chunks.item
    moved = item * num_h * (models * rows + row_shift.PILOT) + 4 * models * rows
    flops = 2 * models * rows * num_h * row_shift.PILOT
    return Work(lambda: chunks.pilot(rows, models), moved, flops, rows=rows)


def _statistics(chunks: Chunks, stored: bool = False, peaks: bool = False) -> Work:
    rows, models = chunks.rows(2, want_direction=stored), 2
    (num_v, num_h) = chunks.weight.shape
    soft = chunks.soft(rows) if stored else None
    search = None
    if peaks:
        options = HeadOptions(grad_tolerance=1e-3)
        operands, targets = chunks.operands(rows), chunks.inputs.targets[:rows]
        search = triton_sparse._search(operands, targets, options, chunks.config)
    shift = chunks.pilot(rows, models)
    tiles = num_v // chunks.config.statistics.columns
    moved = chunks.item * num_h * (models * rows + num_v) + 4 * tiles * models * rows
    moved += 0 if soft is None else soft.nbytes
    moved += 0 if search is None else search.peaks.nbytes
    hidden, weight = chunks.inputs.hidden.detach(), chunks.weight
    both = torch.cat([hidden[:rows], chunks.inputs.ref_hidden[:rows]])
    return Work(
        lambda: chunks.statistics(shift, rows, models, soft, search),
        moved,
        2 * models * rows * num_h * num_v,
        (lambda: both @ weight.T) if rows <= MOST_ROWS else None,
        rows,
    )


def _combine(chunks: Chunks) -> Work:
    rows, models = chunks.rows(2, want_direction=True), 2
    stats = chunks.statistics(chunks.pilot(rows, models), rows, models)
    read = stats.tile_total.nbytes
    return Work(lambda: chunks.combined(stats, rows, models), read + 32 * models * rows, rows=rows)


def _guard(chunks: Chunks) -> Work:
    """Launches that find that no row was misled."""
    rows, models = chunks.rows(2, want_direction=True), 2
    stats = chunks.statistics(chunks.pilot(rows, models), rows, models)
    found, misled = chunks.combined(stats, rows, models)
    heads = chunks.heads(rows, models)
    written = (stats, found, combine.new_results(heads), None, None)
    return Work(
        lambda: row_shift.redo_misled(heads, misled, *written), misled.rows.nbytes, rows=rows
    )


def _direction(chunks: Chunks) -> Work:
    """The vendor's product, and what brings it to the direction."""
    rows = chunks.rows(2, want_direction=True)
    num_v, num_h = chunks.weight.shape
    soft = chunks.soft(rows)
    stats = chunks.statistics(chunks.pilot(rows, 1), rows, 1, soft)
    found, _ = chunks.combined(stats, rows, 1)
    out = torch.empty((rows, num_h), dtype=torch.float32, device=chunks.device)
    targets = chunks.inputs.targets[:rows]
    at_target = direction.TargetRows(targets, found.others, stats.target_logit)

    def launch() -> None:
        product(soft[:, :num_v], chunks.weight, out=out)
        how = (found.factor, out, PLAIN)
        mean_direction.write_mean_directions(out, chunks.weight, at_target, *how)

    moved = soft.nbytes + chunks.weight.nbytes + out.nbytes
    flops = 2 * rows * num_h * num_v
    vendor = lambda: product(soft[:, :num_v], chunks.weight, out=out)  # noqa: E731
    return Work(launch, moved, flops, vendor, rows)


def _dlogits(chunks: Chunks) -> Work:
    """One chunk of the vocabulary of a head that trains."""
    hidden, targets = chunks.inputs.hidden.detach(), chunks.inputs.targets
    num_n, num_h = hidden.shape
    columns_ = triton_backend.backward_columns(hidden, chunks.weight, True, chunks.config)
    weight = chunks.weight[:columns_]
    out = hidden.new_empty((num_n, columns_))
    grad, lse = torch.ones(2, num_n, device=chunks.device).unbind()
    active = torch.ones(num_n, dtype=torch.bool, device=chunks.device)
    scale = torch.ones(1, device=chunks.device)
    tile, tma = chunks.config.dlogits, chunks.config.tma
    policy = Operands(hidden, weight, None)
    blocks = active_blocks(active, 0, tile.rows)
    rows = dlogits.UpstreamRows(grad, None, -lse, lse, lse, None, active)
    return Work(
        lambda: dlogits.write_dlogits_chunk(
            policy, targets, rows, blocks, scale, out, PLAIN, tile, tma
        ),
        hidden.nbytes + weight.nbytes + out.nbytes,
        2 * num_n * num_h * columns_,
        lambda: hidden @ weight.T,
        num_n,
    )


def _kept_dlogits(chunks: Chunks) -> Work:
    """d loss / d logits of the rows whose numerators a trained head keeps."""
    hidden = chunks.inputs.hidden.detach()
    layout = triton_backend.numerators_layout(chunks.device)
    numerators = new_numerators(hidden, chunks.weight, layout, True)
    numerators.factors.fill_(1.0), numerators.values.fill_(0.5), numerators.own.fill_(0.5)
    rows = numerators.rows
    columns_ = triton_backend.backward_columns(hidden, chunks.weight, True, chunks.config)
    out = hidden.new_empty((rows, columns_))
    grad = torch.ones(rows, device=chunks.device)
    active = torch.ones(rows, dtype=torch.bool, device=chunks.device)
    targets = chunks.inputs.targets[:rows]
    return Work(
        lambda: kept_rows.write_kept_dlogits(numerators, 0, targets, grad, active, out),
        2 * out.nbytes,
        rows=rows,
    )


def _peaks(chunks: Chunks) -> Tensor:
    """[row blocks, V] of which about KEPT lie above the threshold that is found."""
    num_v = len(chunks.weight)
    blocks = -(-len(chunks.inputs.hidden) // chunks.config.statistics.rows)
    generator = torch.Generator(chunks.device).manual_seed(0)
    low = torch.rand(blocks, num_v, generator=generator, device=chunks.device) * -10 - 30
    high = torch.rand(blocks, num_v, generator=generator, device=chunks.device) < KEPT
    return torch.where(high, -5.0, low).half()


def _columns(chunks: Chunks) -> Work:
    peaks = _peaks(chunks)
    most = max(1, int(triton_sparse.LARGEST_SHARE * peaks.shape[1]))
    return Work(
        lambda: columns.choose_columns(peaks, 1e-3, most),
        peaks.nbytes + int(4 * KEPT * peaks.numel()),
        rows=len(chunks.inputs.hidden),
    )


def _kept(chunks: Chunks) -> Work:
    """Probabilities of the kept columns of one chunk of rows."""
    rows, found, width, of_rows, targets, policy = _kept_chunk(chunks)
    num_h = chunks.weight.shape[1]
    totals = (of_rows.shift, of_rows.total)
    return Work(
        lambda: kept.kept_probabilities(
            policy, targets, *totals, found, width, PLAIN, chunks.config.statistics
        ),
        chunks.item * (rows * (num_h + width) + found.columns.shape[0] * width * num_h),
        2 * rows * num_h * width,
        rows=rows,
    )


def _kept_direction(chunks: Chunks) -> Work:
    """Their product with the gathered rows of the weight."""
    rows, found, width, of_rows, targets, policy = _kept_chunk(chunks)
    num_h = chunks.weight.shape[1]
    totals = (of_rows.shift, of_rows.total)
    soft, _ = kept.kept_probabilities(
        policy, targets, *totals, found, width, PLAIN, chunks.config.statistics
    )
    out = torch.empty((rows, num_h), dtype=chunks.weight.dtype, device=chunks.device)
    zeros = torch.zeros(rows, device=chunks.device)
    at_target = direction.TargetRows(targets, of_rows.others, zeros)
    arguments = (soft, chunks.weight, at_target, out, PLAIN, chunks.config)
    return Work(
        lambda: direction.write_directions(*arguments, kept=found),
        soft.nbytes + chunks.item * found.columns.shape[0] * width * num_h + out.nbytes,
        2 * rows * num_h * width,
        rows=rows,
    )


def _kept_chunk(chunks: Chunks):
    peaks = _peaks(chunks)
    block, num_v = chunks.config.statistics.rows, peaks.shape[1]
    width = max(1, int(KEPT * num_v))
    budget = config.KEPT_BYTES // (block * chunks.item)
    blocks = min(max(1, budget // width), len(peaks))
    rows = min(blocks * block, len(chunks.inputs.hidden))
    most = max(width, int(triton_sparse.LARGEST_SHARE * num_v))
    found = columns.choose_columns(peaks[:blocks], 1e-3, most)
    found = found._replace(counts=found.counts.clamp(max=width))
    of_rows, _ = chunks.combined(chunks.statistics(chunks.pilot(rows, 1), rows, 1), rows, 1)
    targets, policy = chunks.inputs.targets[:rows], chunks.operands(rows)
    return rows, found, width, of_rows, targets, policy


CASES: dict[str, Callable[[Chunks], Work]] = {
    "pilot of the pair": _pilot,
    "statistics of the pair": _statistics,
    "statistics of the pair, numerators stored": partial(_statistics, stored=True),
    "direction": _direction,
    "dlogits": _dlogits,
    "combine": _combine,
    "guard": _guard,
    "statistics of the pair, column peaks": partial(_statistics, peaks=True),
    "columns": _columns,
    "kept probabilities": _kept,
    "kept direction": _kept_direction,
    "kept dlogits": _kept_dlogits,
}
