"""The certified sparse route on the Triton kernels; torch_sparse.py says what it is.

Candidate columns need p_v before the log-sum-exp is known. So it is estimated, from the columns of
some of the targets: text is written from the distribution, and its tokens hold most of the mass.
The estimate is too low, hence keeps too many columns, and the check does not depend on it.

The host reads small results, in the backward pass of a trained head too, so this route cannot be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from powerflow_fast.kernels import config as table
from powerflow_fast.kernels.active_blocks import active_blocks
from powerflow_fast.kernels.choose_columns import choose_columns
from powerflow_fast.kernels.combine import combine, new_results
from powerflow_fast.kernels.dlogits import UpstreamRows, write_dlogits_chunk
from powerflow_fast.kernels.kept_probabilities import kept_probabilities
from powerflow_fast.kernels.operands import Head, of_rows
from powerflow_fast.kernels.statistics import Heads, Search, logit_statistics
from powerflow_fast.kernels.unit_gradient import KeptColumns, TargetRows, write_unit_gradients
from powerflow_fast.logprobs.backend import Gradients
from powerflow_fast.logprobs.gradients import GradientSums
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.torch_sparse import LARGEST_SHARE, PROBE, SparseUnitGradient
from powerflow_fast.logprobs.torch_tiles import BLOCK, num_blocks, target_columns

SAMPLE = 2048  # columns from which the log-sum-exp is estimated
# As in torch_sparse.py; fewer, as each is a try of its own, in which a block's columns start
# afresh. The low estimate enlarges bounds 1.8 to 2.7 times on the text of SmolLM2. There no block
# of 128 rows fails at 4, and it keeps no more columns than 8 does with another try of the one in
# eight that do.
OVERSHOOTS = (4.0, 1.0)
# Share of the columns that blocks may keep on average for the route to be taken. By the times of
# its kernels on an H100 it gains below 9 to 15 % (docs/gpu-notes.md).
PAYS = 0.1
CHUNK = 2048  # rows whose kept columns are multiplied together for a trained head


class RowTotals(NamedTuple):
    """What the pass over the whole vocabulary leaves of every row of the policy, [N] each."""

    shift: Tensor
    total: Tensor
    one_minus_p: Tensor  # of the target, NaN where it is outside the vocabulary
    target_logit: Tensor


def unit_gradient_dtype(hidden: Tensor, options: HeadOptions) -> torch.dtype:
    """float32; with a tolerance bfloat16 where hidden is: half the memory between the passes.

    The gradient is rounded twice then, here and when it is scaled. float16 has no range for what
    is not scaled yet.
    """
    certified = options.grad_tolerance > 0 and options.group_name is None
    return torch.bfloat16 if certified and hidden.dtype == torch.bfloat16 else torch.float32


def start_search(heads: Heads) -> Search | None:
    """The policy's search; None where it is so flat that the exact route is cheaper."""
    options = replace(heads.options, entropy=False)  # the pass that follows forms it
    heads = heads._replace(reference=None, options=options)
    return _search(heads) if _looks_sharp(heads) else None


def _search(heads: Heads) -> Search:
    shape = (table.ceil_div(len(heads.targets), heads.tile.rows), heads.num_v)
    column_max = heads.targets.new_full(shape, -torch.inf, dtype=torch.float16)
    return Search(_estimated_lse(heads), column_max)


def _estimated_lse(heads: Heads) -> Tensor:
    """[N] log-sum-exp over up to SAMPLE columns: targets, each once, and others in their place."""
    (_, weight, bias), num_v = heads.policy, heads.num_v
    tokens = heads.targets[:: max(1, table.ceil_div(len(heads.targets), SAMPLE))].sort().values
    evenly = torch.linspace(0, num_v - 1, len(tokens), device=tokens.device).long()
    usable = (tokens >= 0) & (tokens < num_v)
    usable[1:] &= tokens[1:] != tokens[:-1]
    columns = tokens.where(usable, evenly)
    bias = None if bias is None else bias[columns]
    sample = heads._replace(policy=heads.policy._replace(weight=weight[columns], bias=bias))
    results = new_results(sample)
    combine(logit_statistics(sample, sample.active_blocks()), sample, results)
    return results.lse[0]


def _looks_sharp(heads: Heads) -> bool:
    """Whether blocks made of rows all over the batch would keep so few columns that it pays."""
    num_n, block = len(heads.targets), heads.tile.rows
    if num_n < 4 * block:  # the look would cost as much as it saves
        return True
    rows = max(1, num_n // (PROBE * block)) * block  # whole blocks
    stride = num_n // rows
    sample = heads.of_rows(slice(0, rows * stride, stride))
    sample = sample._replace(targets=sample.targets.contiguous())
    search = _search(sample)
    logit_statistics(sample, sample.active_blocks(), search=search)
    budget = OVERSHOOTS[0] * heads.options.grad_tolerance
    counts = choose_columns(search.column_max, budget, most=1).counts
    return bool(counts.float().mean() <= PAYS * heads.num_v)


class Attempt(NamedTuple):
    """What one choice of columns gives; a block's numbers are repeated on its rows."""

    unit_gradient: Tensor  # [N, H]
    skipped: Tensor  # [N] mass left out, 0 where ignored
    share: Tensor  # [N] of the columns, kept by the row's block
    threshold: Tensor  # [N] column maxima below this are of columns that are left out


def sparse_unit_gradient(
    heads: Heads,
    column_max: Tensor,  # [row blocks, V] as the statistics kernel left them
    totals: RowTotals,
) -> tuple[SparseUnitGradient, Tensor]:
    """-> what torch_sparse.py's gives, and the rows whose unit gradient is left to be done."""
    targets, options, block = heads.targets, heads.options, heads.tile.rows
    block_of_row = torch.arange(len(targets), device=targets.device) // block
    first, *others = OVERSHOOTS
    done = _attempt(heads, column_max, totals, first)
    failed, rows = _failed(done.skipped, options.grad_tolerance, block_of_row, len(column_max))
    for overshoot in others:
        if len(rows) == 0:
            break
        part = heads.of_rows(rows), column_max[failed], of_rows(totals, rows)
        for whole, new in zip(done, _attempt(*part, overshoot), strict=True):
            whole[rows] = new
        failed, rows = _failed(done.skipped, options.grad_tolerance, block_of_row, len(column_max))
    done.skipped[rows], done.share[rows], done.threshold[rows] = 0.0, 1.0, -torch.inf
    counted = targets != options.ignore_index
    share = done.share.where(counted, 0.0).sum() / counted.sum().clamp(min=1)
    sparsity = torch.stack([share, done.skipped.max(), failed.sum().to(share.dtype)])
    kept_columns = None
    if options.route == "sparse":
        # Not `>=`: a NaN's column is kept.
        kept_columns = ~(column_max < done.threshold[::block, None])
        kept_columns[block_of_row, targets.clamp(0, heads.num_v - 1)] = True
        kept_columns = _per_block(kept_columns, block, len(targets))
    return SparseUnitGradient(done.unit_gradient, sparsity, kept_columns), rows


def _per_block(kept_columns: Tensor, rows: int, num_n: int) -> Tensor:
    """[blocks, V] for blocks of BLOCK rows, from blocks of `rows`; one divides the other."""
    if rows >= BLOCK:  # of the last `rows`, some blocks may lie past the last row
        return kept_columns.repeat_interleave(rows // BLOCK, 0)[: num_blocks(num_n)]
    several = BLOCK // rows
    padded = torch.nn.functional.pad(kept_columns, (0, 0, 0, -len(kept_columns) % several))
    return padded.view(-1, several, kept_columns.shape[1]).any(1)


def _failed(
    skipped: Tensor, tolerance: float, block_of_row: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Blocks [row blocks] bool with a row that leaves out too much, and all rows of them."""
    failed = torch.zeros(num_blocks, dtype=torch.bool, device=skipped.device)
    failed[block_of_row[~(skipped <= tolerance)]] = True  # not `>`: a NaN row proves nothing
    return failed, failed[block_of_row].nonzero()[:, 0]


def _attempt(
    heads: Heads,
    column_max: Tensor,  # [row blocks, V]
    totals: RowTotals,
    overshoot: float,
) -> Attempt:
    num_n, num_v, block = len(heads.targets), heads.num_v, heads.tile.rows
    most = max(1, int(LARGEST_SHARE * num_v))
    budget = overshoot * heads.options.grad_tolerance
    columns, counts, threshold = choose_columns(column_max, budget, most)
    counts = counts.where(counts <= most, 0)  # such a block keeps nothing and fails the check
    hidden = heads.policy.hidden
    dtype = unit_gradient_dtype(hidden, heads.options)
    unit_gradient = hidden.new_empty(hidden.shape, dtype=dtype)
    kept_mass = torch.empty_like(totals.one_minus_p)
    room = table.KEPT_BYTES // (block * hidden.element_size())
    for first, last, width in _chunks(counts.tolist(), room):
        rows = slice(first * block, min(last * block, num_n))
        chunk, shift_and_total = heads.of_rows(rows), (totals.shift[rows], totals.total[rows])
        kept = KeptColumns(columns[first:last], counts[first:last], threshold[first:last])
        exp_logits, kept_mass[rows] = kept_probabilities(chunk, *shift_and_total, kept, width)
        at_target = totals.one_minus_p[rows], totals.target_logit[rows]
        target_rows = TargetRows(chunk.targets, *at_target)
        write_unit_gradients(exp_logits, chunk, target_rows, unit_gradient[rows], kept=kept)
        del exp_logits  # its memory is the next chunk's
    skipped = (totals.one_minus_p - kept_mass).clamp_min(0.0)
    skipped = skipped.where(heads.targets != heads.options.ignore_index, 0.0)
    share, threshold = (x.repeat_interleave(block)[:num_n] for x in (counts / num_v, threshold))
    return Attempt(unit_gradient, skipped, share, threshold)


def _chunks(counts: list[int], room: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, width) of consecutive blocks whose number times largest count fits."""
    first = 0
    while first < len(counts):
        last, width = first + 1, counts[first]
        while last < len(counts) and (last + 1 - first) * max(width, counts[last]) <= room:
            width = max(width, counts[last])
            last += 1
        yield first, last, max(width, 1)
        first = last


def few(kept_columns: Tensor) -> bool:
    """Whether so few columns are kept that gathering them pays."""
    return bool(kept_columns.sum() <= LARGEST_SHARE * kept_columns.numel())


def kept_gradients(
    heads: Heads,  # the policy alone is read
    rows: UpstreamRows,
    kept_columns: Tensor,  # [blocks, V] bool as the forward pass left it
    out_scale: Tensor,  # [1]
    needs: Sequence[bool],  # hidden, whose gradient is the unit gradient's, weight, bias
) -> Gradients:
    """Gradients of weight and bias from the kept columns alone.

    Rows go by chunks, each with every column that one of its blocks keeps: large products of
    gathered columns, a few more than are needed. A chunk's columns differ from one another, so
    adding its rows to the gradient is deterministic.
    """
    (hidden, weight, bias), _, targets, _, config = heads
    (num_n, num_h), num_v = hidden.shape, len(weight)
    finite = hidden.where(rows.active[:, None], 0)  # 0 * inf is NaN: such rows must be 0
    sums = GradientSums(Head(finite, weight, bias), (False, *needs[1:]), out_scale)
    spans = [slice(first, min(first + CHUNK, num_n)) for first in range(0, num_n, CHUNK)]
    unions = [kept_columns[r.start // BLOCK : num_blocks(r.stop)].any(0) for r in spans]
    of_spans = [of_rows(rows, r) for r in spans]
    blocks = [active_blocks(x.active, 0, config.dlogits.rows) for x in of_spans]
    width = max(1, min(num_v, table.DLOGITS_BYTES // (4 * num_h)))
    for start in range(0, num_v, width):
        stop = min(start + width, num_v)
        sums.start(start, stop)
        for r, union, upstream, listed in zip(spans, unions, of_spans, blocks, strict=True):
            columns = union[start:stop].nonzero()[:, 0]
            if len(columns) == 0:
                continue
            place, there = target_columns(targets[r] - start, columns, stop - start)
            tile = weight[start:stop][columns]
            chunk = heads._replace(
                policy=Head(hidden[r], tile, None if bias is None else bias[start:stop][columns]),
                targets=place.where(there, -1)[:, 0].contiguous(),
            )
            dlogits = hidden.new_empty((r.stop - r.start, len(columns)))
            write_dlogits_chunk(chunk, upstream, listed, out_scale, dlogits)
            sums.add(dlogits, r, columns, tile)
        sums.store()
    return sums.results()
