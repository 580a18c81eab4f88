"""The certified sparse route on the Triton kernels; torch_sparse.py says what it is.

Candidate columns need p_v before the log-sum-exp is known. So it is guessed, from the columns of
some of the targets: text is written from the distribution, and its tokens hold most of the mass. A
guess is too low, hence keeps too many columns, and the check does not depend on it.

The host reads small results, in the backward pass of a trained head too, so this route cannot be
captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.torch_sparse import (
    BLOCK,
    LARGEST_SHARE,
    PROBE,
    SparseDirection,
    num_blocks,
)
from powerflow_fast.logprobs.torch_tiles import target_columns
from powerflow_fast.logprobs.triton_gradients import product

if TYPE_CHECKING:
    from powerflow_fast.kernels.config import Config
    from powerflow_fast.kernels.statistics import Search
    from powerflow_fast.kernels.tiles import Operands

SAMPLE = 2048  # columns from which the log-sum-exp is guessed
# As in torch_sparse.py; fewer, as each is a try of its own, in which a block's columns start
# afresh. The low guess enlarges bounds 1.8 to 2.7 times on the text of SmolLM2. There no block of
# 128 rows fails at 4, and it keeps no more columns than 8 does with another try of the one in eight
# that do.
SLACKS = (4.0, 1.0)
# Share of the columns that blocks may keep on average for the route to be taken. By the times of
# its kernels on an H100 it gains below 9 to 15 % (docs/gpu-notes.md).
PAYS = 0.1
CHUNK = 2048  # rows whose kept columns are multiplied together for a trained head


class RowTotals(NamedTuple):
    """What the pass over the whole vocabulary leaves of every row of the policy, [N] each."""

    shift: Tensor
    total: Tensor
    others: Tensor  # 1 - p of the target, NaN where it is outside the vocabulary
    target_logit: Tensor


def guess_lse(policy: Operands, targets: Tensor, options: HeadOptions, config: Config) -> Tensor:
    """[N] log-sum-exp over up to SAMPLE columns: targets, each once, and others in their place."""
    from powerflow_fast.kernels.combine import combine, new_results
    from powerflow_fast.kernels.statistics import Heads, logit_statistics

    num_n, num_v = len(targets), len(policy.weight)
    tokens = targets[:: max(1, -(-num_n // SAMPLE))].sort().values
    spread = torch.linspace(0, num_v - 1, len(tokens), device=tokens.device).long()
    usable = (tokens >= 0) & (tokens < num_v)
    usable[1:] &= tokens[1:] != tokens[:-1]
    columns = tokens.where(usable, spread)
    bias = None if policy.bias is None else policy.bias[columns]
    sample = policy._replace(weight=policy.weight[columns], bias=bias)
    heads = Heads(sample, None, targets, options, config.statistics, config.tma)
    results = new_results(heads)
    combine(logit_statistics(heads, heads.active_blocks()), heads, results)
    return results.lse[0]


def direction_dtype(hidden: Tensor, options: HeadOptions) -> torch.dtype:
    """float32; with a tolerance bfloat16 where hidden is: half the memory between the passes.

    The gradient is rounded twice then, here and when it is scaled. float16 has no range for what
    is not scaled yet.
    """
    certified = options.grad_tolerance > 0 and options.group_name is None
    return torch.bfloat16 if certified and hidden.dtype == torch.bfloat16 else torch.float32


def start_search(
    policy: Operands, targets: Tensor, options: HeadOptions, config: Config
) -> Search | None:
    """None where the policy is so flat that the exact route is cheaper."""
    options = replace(options, entropy=False)  # the pass that follows forms it, not the search
    if not _looks_sharp(policy, targets, options, config):
        return None
    return _search(policy, targets, options, config)


def _search(policy: Operands, targets: Tensor, options: HeadOptions, config: Config) -> Search:
    from powerflow_fast.kernels.statistics import Search

    blocks = -(-len(targets) // config.statistics.rows)
    shape = (blocks, len(policy.weight))
    peaks = policy.hidden.new_full(shape, -torch.inf, dtype=torch.float16)
    return Search(guess_lse(policy, targets, options, config), peaks)


def _looks_sharp(policy: Operands, targets: Tensor, options: HeadOptions, config: Config) -> bool:
    """Whether blocks made of rows all over the batch would keep so few columns that it pays."""
    from powerflow_fast.kernels.columns import choose_columns
    from powerflow_fast.kernels.statistics import Heads, logit_statistics

    num_n, block = len(targets), config.statistics.rows
    if num_n < 4 * block:  # the look would cost as much as it saves
        return True
    rows = max(1, num_n // (PROBE * block)) * block  # whole blocks
    stride = num_n // rows
    sample = policy._replace(hidden=policy.hidden[: rows * stride : stride])
    targets = targets[: rows * stride : stride].contiguous()
    search = _search(sample, targets, options, config)
    heads = Heads(sample, None, targets, options, config.statistics, config.tma)
    logit_statistics(heads, heads.active_blocks(), search=search)
    counts = choose_columns(search.peaks, SLACKS[0] * options.grad_tolerance, most=1).counts
    return bool(counts.float().mean() <= PAYS * len(policy.weight))


class Attempt(NamedTuple):
    """What one choice of columns gives; a block's numbers are repeated on its rows."""

    direction: Tensor  # [N, H]
    skipped: Tensor  # [N] mass left out, 0 where ignored
    share: Tensor  # [N] of the columns, kept by the row's block
    lowest: Tensor  # [N] peaks below this are of columns that are left out


def sparse_direction(
    policy: Operands,
    targets: Tensor,  # [N] contiguous
    peaks: Tensor,  # [row blocks, V] as the statistics kernel left them
    totals: RowTotals,
    options: HeadOptions,
    config: Config,
    want_kept: bool,
) -> tuple[SparseDirection, Tensor]:
    """-> what torch_sparse.py's gives, and the rows whose direction is left to be done."""
    block = config.statistics.rows
    block_of_row = torch.arange(len(targets), device=targets.device) // block
    slack, *others = SLACKS
    done = _attempt(policy, targets, peaks, totals, slack, options, config)
    failed, rows = _failed(done.skipped, options.grad_tolerance, block_of_row, len(peaks))
    for slack in others:
        if len(rows) == 0:
            break
        part = _attempt(
            policy._replace(hidden=policy.hidden[rows]),
            targets[rows],
            peaks[failed],
            RowTotals(*(x[rows] for x in totals)),
            slack,
            options,
            config,
        )
        for whole, new in zip(done, part, strict=True):
            whole[rows] = new
        failed, rows = _failed(done.skipped, options.grad_tolerance, block_of_row, len(peaks))
    done.skipped[rows], done.share[rows], done.lowest[rows] = 0.0, 1.0, -torch.inf
    counted = targets != options.ignore_index
    share = done.share.where(counted, 0.0).sum() / counted.sum().clamp(min=1)
    certificate = torch.stack([share, done.skipped.max(), failed.sum().to(share.dtype)])
    kept = None
    if want_kept:
        kept = ~(peaks < done.lowest[::block, None])  # not `>=`: a NaN's column is kept
        kept[block_of_row, targets.clamp(0, len(policy.weight) - 1)] = True
        kept = _per_block(kept, block, len(targets))
    return SparseDirection(done.direction, certificate, kept), rows


def _per_block(kept: Tensor, rows: int, num_n: int) -> Tensor:
    """[blocks, V] for blocks of BLOCK rows, from those of `rows`, one a multiple of the other."""
    if rows >= BLOCK:  # of the last `rows`, some blocks may lie past the last row
        return kept.repeat_interleave(rows // BLOCK, 0)[: num_blocks(num_n)]
    several = BLOCK // rows
    padding = (0, 0, 0, -len(kept) % several)
    return torch.nn.functional.pad(kept, padding).view(-1, several, kept.shape[1]).any(1)


def few(kept: Tensor) -> bool:
    """Whether so few columns are kept that gathering them pays."""
    return bool(kept.sum() <= LARGEST_SHARE * kept.numel())


def kept_gradients(
    policy: Operands,
    targets: Tensor,  # [N] contiguous
    grad_logps: Tensor,  # [N] contiguous float32
    logps: Tensor,  # [N] likewise
    lse: Tensor,  # [N] likewise
    active: Tensor,  # [N] bool
    kept: Tensor,  # [blocks, V] bool as the forward pass left it
    out_scale: Tensor,  # [1]
    needs: Sequence[bool],  # hidden, whose gradient is the direction's, weight, bias
    options: HeadOptions,
    config: Config,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias from the kept columns alone.

    Rows go by chunks, each with every column that one of its blocks keeps: large products of
    gathered columns, a few more than are needed. A chunk's columns differ from one another, so
    adding its rows to the gradient is deterministic.
    """
    from powerflow_fast.kernels.active_blocks import active_blocks
    from powerflow_fast.kernels.config import DLOGITS_BYTES
    from powerflow_fast.kernels.dlogits import UpstreamRows, write_dlogits_chunk

    hidden, weight, bias = policy
    (num_n, num_h), num_v = hidden.shape, len(weight)
    rows = UpstreamRows(grad_logps, None, logps, -torch.expm1(logps), lse, None, active)
    masked = hidden.where(active[:, None], 0)  # 0 * inf is NaN: such rows must be 0
    spans = [slice(first, min(first + CHUNK, num_n)) for first in range(0, num_n, CHUNK)]
    unions = [kept[r.start // BLOCK : -(-r.stop // BLOCK)].any(0) for r in spans]
    of_spans = [rows.of(r) for r in spans]
    blocks = [active_blocks(x.active, 0, config.dlogits.rows) for x in of_spans]
    grad_weight = torch.empty_like(weight) if needs[1] else None
    grad_bias = torch.empty_like(bias) if needs[2] and bias is not None else None
    width = max(1, min(num_v, DLOGITS_BYTES // (4 * num_h)))
    zeros = partial(torch.zeros, dtype=torch.float32, device=weight.device)
    for start in range(0, num_v, width):
        stop = min(start + width, num_v)
        sums = None if grad_weight is None else zeros(stop - start, num_h)
        bias_sums = None if grad_bias is None else zeros(stop - start)
        for index, (r, union) in enumerate(zip(spans, unions, strict=True)):
            columns = union[start:stop].nonzero()[:, 0]
            if len(columns) == 0:
                continue
            place, there = target_columns(targets[r] - start, columns, stop - start)
            dlogits = hidden.new_empty((r.stop - r.start, len(columns)))
            write_dlogits_chunk(
                policy._replace(
                    hidden=hidden[r],
                    weight=weight[start:stop][columns],
                    bias=None if bias is None else bias[start:stop][columns],
                ),
                place.where(there, -1)[:, 0].contiguous(),
                of_spans[index],
                blocks[index],
                out_scale,
                dlogits,
                options,
                config.dlogits,
                config.tma,
            )
            if sums is not None:
                sums.index_add_(0, columns, product(dlogits.T, masked[r]))
            if bias_sums is not None:
                bias_sums.index_add_(0, columns, dlogits.sum(0, dtype=torch.float32))
        for gradient, total in ((grad_weight, sums), (grad_bias, bias_sums)):
            if gradient is not None:  # cast as it is written
                torch.div(total, out_scale, out=gradient[start:stop])
    return grad_weight, grad_bias


def _failed(
    skipped: Tensor, tolerance: float, block_of_row: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Blocks [row blocks] bool with a row that leaves out too much, and all rows of them."""
    failed = torch.zeros(num_blocks, dtype=torch.bool, device=skipped.device)
    failed[block_of_row[~(skipped <= tolerance)]] = True  # not `>`: a NaN row proves nothing
    return failed, failed[block_of_row].nonzero()[:, 0]


def _attempt(
    policy: Operands,
    targets: Tensor,  # [N]
    peaks: Tensor,  # [row blocks, V]
    totals: RowTotals,
    slack: float,
    options: HeadOptions,
    config: Config,
) -> Attempt:
    from powerflow_fast.kernels.columns import choose_columns
    from powerflow_fast.kernels.config import KEPT_BYTES
    from powerflow_fast.kernels.direction import Kept, TargetRows, write_directions
    from powerflow_fast.kernels.kept import kept_probabilities

    num_n, num_v, block = len(targets), len(policy.weight), config.statistics.rows
    most = max(1, int(LARGEST_SHARE * num_v))
    columns, counts, lowest = choose_columns(peaks, slack * options.grad_tolerance, most)
    counts = counts.where(counts <= most, 0)  # such a block keeps nothing and fails the check
    hidden = policy.hidden
    direction = hidden.new_empty(hidden.shape, dtype=direction_dtype(hidden, options))
    kept_mass = torch.empty_like(totals.others)
    budget = KEPT_BYTES // (block * policy.hidden.element_size())
    for first, last, width in _chunks(counts.tolist(), budget):
        rows = slice(first * block, min(last * block, num_n))
        chunk = policy._replace(hidden=policy.hidden[rows])
        kept = Kept(columns[first:last], counts[first:last], lowest[first:last])
        row_totals = (totals.shift[rows], totals.total[rows])
        soft, kept_mass[rows] = kept_probabilities(
            chunk, targets[rows], *row_totals, kept, width, options, config.statistics
        )
        at_target = TargetRows(targets[rows], totals.others[rows], totals.target_logit[rows])
        how = (options, config, None, kept)
        write_directions(soft, policy.weight, at_target, direction[rows], *how)
        del soft  # its memory is the next chunk's
    skipped = (totals.others - kept_mass).clamp_min(0.0)
    skipped = skipped.where(targets != options.ignore_index, 0.0)
    share, lowest = (x.repeat_interleave(block)[:num_n] for x in (counts / num_v, lowest))
    return Attempt(direction, skipped, share, lowest)


def _chunks(counts: list[int], budget: int):
    """(first, last, width) of consecutive blocks whose number times largest count fits."""
    first = 0
    while first < len(counts):
        last, width = first + 1, counts[first]
        while last < len(counts) and (last + 1 - first) * max(width, counts[last]) <= budget:
            width = max(width, counts[last])
            last += 1
        yield first, last, max(width, 1)
        first = last
