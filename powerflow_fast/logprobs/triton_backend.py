"""The head on the Triton kernels: row chunks forward, vocabulary chunks backward.

Forward, per row chunk: a pilot of a few columns gives each row its shift, one launch forms softmax
statistics of policy and reference, another merges them, and rows that the pilot misled are done
again. For the unit gradient, the vendor's library multiplies the exp-logits that the statistics
stored with the weight (in float16, where they are relative to shifts of their own, a kernel does).
Backward, per vocabulary chunk: a kernel writes the gradient of the logits, from logits that it
recomputes or, for the first rows of a trained head, from the softmax cache; the products with it
are the vendor library's.

Importing this module imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from powerflow_fast.kernels import config as table
from powerflow_fast.kernels.active_blocks import ActiveBlocks, active_blocks
from powerflow_fast.kernels.cached_dlogits import write_cached_dlogits
from powerflow_fast.kernels.combine import Results, Rows, new_results
from powerflow_fast.kernels.config import Config
from powerflow_fast.kernels.dlogits import UpstreamRows, write_dlogits_chunk
from powerflow_fast.kernels.mean_unit_gradient import write_mean_unit_gradients
from powerflow_fast.kernels.operands import Head, of_rows
from powerflow_fast.kernels.row_shift import log_probs, pilot_shift
from powerflow_fast.kernels.statistics import (
    Heads,
    Search,
    Statistics,
    has_row_shift,
    padded_columns,
)
from powerflow_fast.kernels.unit_gradient import Shifts, TargetRows, write_unit_gradients
from powerflow_fast.logprobs import triton_sparse
from powerflow_fast.logprobs.backend import Gradients, HeadForward, Upstream
from powerflow_fast.logprobs.choice import choose_backend
from powerflow_fast.logprobs.gradients import GradientSums, dlogits_scale
from powerflow_fast.logprobs.options import HeadOptions, batch_invariant
from powerflow_fast.logprobs.products import matmul
from powerflow_fast.logprobs.softmax_cache import SoftmaxCache, VocabTiling
from powerflow_fast.logprobs.torch_tiles import exact_sparsity, softcap_slope
from powerflow_fast.logprobs.triton_sparse import RowTotals, unit_gradient_dtype
from powerflow_fast.logprobs.triton_tuning import Calls, tile_config

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONVERTS_TILES = False


def vocab_tiling(device: torch.device) -> VocabTiling:
    return VocabTiling(table.CACHE_TILE, table.CACHE_MULTIPLE)


def forward(
    policy: Head,
    reference: Head | None,
    targets: Tensor,  # [N] int64
    options: HeadOptions,
    cache: SoftmaxCache | None = None,
    config: Config | None = None,  # tile shapes, to try them; None chooses
) -> HeadForward:
    """See `Backend.forward`. `cache` is filled for as many rows as it has, counted or not."""
    policy = _checked(policy)
    if reference is not None:
        reference = _checked(reference)
        if not _fit_one_launch(policy, reference):
            alone = forward(reference, None, targets, replace(options, entropy=False, route="none"))
            out = forward(policy, None, targets, options, cache, config)
            return out._replace(ref_logps=alone.logps)
    config = config or tile_config(policy, targets, options, tuned_calls)
    heads = Heads(policy, reference, targets.contiguous(), options, config)
    results = new_results(heads)
    out = HeadForward(
        logps=results.logps[0],
        lse=results.lse[0],
        entropy=None if results.entropy is None else results.entropy[0],
        unit_gradient=None,
        ref_logps=None if reference is None else results.logps[1],
    )
    if options.wants_unit_gradient:
        certified = options.grad_tolerance > 0
        search = triton_sparse.start_search(heads) if certified and len(targets) else None
        if search is not None:
            return _with_sparse_gradient(heads, results, search, out)
        sparsity = exact_sparsity(len(targets), heads.tile.rows, out.logps) if certified else None
        return out._replace(unit_gradient=_unit_gradient(heads, results), sparsity=sparsity)
    for chunk in _chunks(heads, results, 0 if cache is None else cache.rows):
        if cache is not None and chunk.span.start < cache.rows:
            _fill_cache(chunk, cache.of_rows(chunk.span))
        else:
            chunk.log_probs(None)
    return out


def _unit_gradient(heads: Heads, results: Results) -> Tensor:  # [N, H]
    """Over the whole vocabulary; fills the results."""
    hidden = heads.policy.hidden
    unit_gradient = hidden.new_empty(hidden.shape, dtype=unit_gradient_dtype(hidden, heads.options))
    rows = forward_rows(heads, store_exp_logits=True)
    rows = rows if batch_invariant() else min(rows, len(hidden))
    buffer = hidden.new_empty((rows, padded_columns(heads.num_v, heads.tile)))
    for chunk in _chunks(heads, results, store_exp_logits=True):
        _write_unit_gradient(chunk, buffer, unit_gradient[chunk.span])
    return unit_gradient


def _with_sparse_gradient(
    heads: Heads, results: Results, search: Search, out: HeadForward
) -> HeadForward:
    """`out` with the certified unit gradient; rows that fail the check are done exactly."""
    totals = [chunk.row_totals() for chunk in _chunks(heads, results, search=search)]
    row_totals = RowTotals(*map(torch.cat, zip(*totals, strict=True)))
    policy = heads._replace(reference=None)
    (unit_gradient, sparsity, kept_columns), failed = triton_sparse.sparse_unit_gradient(
        policy, search.column_max, row_totals
    )
    if len(failed):
        exact = replace(heads.options, grad_tolerance=0.0, entropy=False, route="unit_gradient")
        part = policy.of_rows(failed)
        again = forward(part.policy, None, part.targets, exact, config=heads.config)
        unit_gradient[failed] = again.unit_gradient.to(unit_gradient.dtype)
    return out._replace(unit_gradient=unit_gradient, sparsity=sparsity, kept_columns=kept_columns)


def backward(
    head: Head,
    upstream: Upstream,
    options: HeadOptions,
    needs: Sequence[bool],  # hidden, weight, bias
    kept_columns: Tensor | None = None,
    cache: SoftmaxCache | None = None,
    config: Config | None = None,  # as in `forward`
) -> Gradients:
    """See `Backend.backward`. Where the kept columns are few, hidden's gradient is not formed."""
    head = _checked(head)
    grad_logps, grad_entropy, targets, *_ = upstream
    config = config or tile_config(head, targets, options, tuned_calls)
    (num_n, _), num_v = head.hidden.shape, len(head.weight)
    rows = _upstream_rows(upstream, options)
    active = rows.active
    out_scale = grad_logps.new_ones(1, dtype=torch.float32)
    if head.hidden.dtype == torch.float16 and num_n:  # the other types have float32's range
        out_scale = dlogits_scale(grad_logps, grad_entropy, num_v, options)
    heads = Heads(head, None, targets.contiguous(), options, config)
    if kept_columns is not None and triton_sparse.few(kept_columns):
        return triton_sparse.kept_gradients(heads, rows, kept_columns, out_scale, needs)
    # 0 * inf is NaN: inactive rows must be 0 in the product over the tokens.
    finite = head.hidden.where(active[:, None], 0) if needs[1] else head.hidden
    sums = GradientSums(head._replace(hidden=finite), needs, out_scale)
    columns = backward_columns(head, needs[1], config)
    buffer = head.hidden.new_empty((num_n, columns))
    cached_rows = 0 if cache is None else cache.rows
    grad_cached = grad_logps[:cached_rows] * (options.scale * out_scale)
    recomputed = heads.of_rows(slice(cached_rows, None))
    rows = of_rows(rows, slice(cached_rows, None))
    blocks = active_blocks(rows.active, 0, config.dlogits.rows)
    for start in range(0, num_v, columns):
        stop = min(start + columns, num_v)
        dlogits = buffer[:, : stop - start]
        if cached_rows:
            assert start % table.CACHE_TILE == 0
            write_cached_dlogits(
                cache.exp_logits[:, start:],
                cache.factors[start // table.CACHE_TILE :],
                cache.one_minus_p,
                targets[:cached_rows] - start,
                grad_cached,
                active[:cached_rows],
                dlogits[:cached_rows],
            )
        weight = head.weight[start:stop]
        if cached_rows < num_n:
            bias = None if head.bias is None else head.bias[start:stop]
            chunk = recomputed._replace(
                policy=Head(recomputed.policy.hidden, weight, bias),
                targets=recomputed.targets - start,
            )
            write_dlogits_chunk(chunk, rows, blocks, out_scale, dlogits[cached_rows:])
        sums.start(start, stop)
        if num_n:
            sums.add(dlogits, slice(None), None, weight)
        sums.store()
    return sums.results()


def _upstream_rows(upstream: Upstream, options: HeadOptions) -> UpstreamRows:
    """As the kernels take them; a row is active where it counts and has a gradient."""
    grad_logps, grad_entropy, targets, logps, lse, entropy = upstream
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    active &= targets != options.ignore_index
    entropy = None if grad_entropy is None else entropy
    vectors = (grad_logps, grad_entropy, logps, -torch.expm1(logps), lse, entropy, active)
    return UpstreamRows(*(None if x is None else x.contiguous() for x in vectors))


def tuned_calls(head: Head, targets: Tensor, options: HeadOptions, config: Config) -> Calls:
    """What tuning times, by the field of `Config` whose tile it tries: calls with a Config."""
    plain = replace(options, entropy=False, grad_tolerance=0.0, route="none")
    scores = partial(forward, head, None, targets, plain)
    unit_gradient = partial(forward, head, None, targets, replace(plain, route="unit_gradient"))
    out = scores(config=config)
    upstream = Upstream(torch.ones_like(out.lse), None, targets, out.logps, out.lse, None)
    dlogits = partial(backward, head, upstream, plain, (True, False, False))
    calls: Calls = {"statistics": scores, "unit_gradient": unit_gradient, "dlogits": dlogits}
    if has_row_shift(head.hidden.dtype):
        del calls["unit_gradient"]  # the vendor's product
    return calls


def _checked(head: Head) -> Head:
    """With a bias of unit stride.

    Raises:
        ValueError: for devices and types that the kernels do not have.
    """
    hidden, weight, bias = head
    choose_backend("triton", hidden.device)
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            "backend: 'triton' expects hidden and weight in one of float32, float16, bfloat16, got "
            f"{hidden.dtype} and {weight.dtype}; cast them or use backend='torch'"
        )
    return Head(hidden, weight, None if bias is None else bias.contiguous())


def _fit_one_launch(policy: Head, reference: Head) -> bool:
    return (
        policy.hidden.dtype == reference.hidden.dtype == reference.weight.dtype
        and policy.hidden.shape == reference.hidden.shape
        and policy.weight.shape == reference.weight.shape
        and (policy.bias is None) == (reference.bias is None)
        and (policy.bias is None or policy.bias.dtype == reference.bias.dtype)
    )


class _Chunk(NamedTuple):
    """Rows that go through the vocabulary together."""

    span: slice  # of the rows
    heads: Heads
    active: ActiveBlocks
    shift: Tensor | None  # [models * n] by the pilot; None in float16
    results: Results  # to be filled
    search: Search | None

    def log_probs(self, exp_logits: Tensor | None) -> tuple[Statistics, Rows, TargetRows]:
        """Fills results and, if given, exp_logits -> both models' statistics, the policy's rows."""
        _, heads, active, shift, results, search = self
        n = len(heads.targets)
        statistics, rows = log_probs(heads, active, shift, results, exp_logits, search)
        policy = of_rows(rows, slice(n))
        at_target = policy.one_minus_p, statistics.target_logit[:n]
        return statistics, policy, TargetRows(heads.targets, *at_target)

    def row_totals(self) -> RowTotals:
        """What the certified route needs of the policy; fills the results."""
        _, rows, targets = self.log_probs(None)
        return RowTotals(rows.shift, rows.total, *targets[1:])


def _chunks(
    heads: Heads,
    results: Results,
    cached_rows: int = 0,  # they have chunks of their own
    search: Search | None = None,
    store_exp_logits: bool = False,
) -> Iterator[_Chunk]:
    rows = forward_rows(heads, store_exp_logits)
    spans = []
    for start, stop in ((0, cached_rows), (cached_rows, len(heads.targets))):
        if start == stop:
            continue
        listed = heads.of_rows(slice(start, stop)).active_blocks(rows)
        for index, first in enumerate(range(start, stop, rows)):
            active = listed.of_chunk(index, rows // heads.tile.rows)
            spans.append((slice(first, min(first + rows, stop)), active))
    shift = None
    if spans and has_row_shift(heads.policy.hidden.dtype):
        # One launch for all rows: it takes the host as long as a chunk takes the device.
        shift = pilot_shift(heads, spans[0][1] if len(spans) == 1 else heads.active_blocks())
    for span, active in spans:
        yield _Chunk(
            span,
            heads.of_rows(span),
            active,
            None if shift is None else shift[:, span].reshape(-1),
            of_rows(results, span),
            search and search.of_rows(span, heads.tile.rows),
        )


def forward_rows(heads: Heads, store_exp_logits: bool) -> int:
    """Rows of one chunk: its statistics and exp-logits stay within their budgets.

    Whole groups of row blocks where they fit: the weight is read once for each. float16's product
    over the vocabulary fills the chip best.
    """
    (num_n, num_h), tile = heads.policy.hidden.shape, heads.tile
    models = 2 if batch_invariant() else heads.models
    columns = padded_columns(heads.num_v, tile)
    row_shift = has_row_shift(heads.policy.hidden.dtype)
    statistics = columns // tile.columns * 2 if row_shift else columns // tile.part * 3
    limit = table.STATISTICS_BYTES // (statistics * models * 4)
    if store_exp_logits:
        limit = min(limit, table.EXP_LOGITS_BYTES // (columns * heads.policy.hidden.element_size()))
    if store_exp_logits and not row_shift:
        product = heads.config.unit_gradient
        return table.balanced_rows(
            num_n,
            limit,
            block=product.rows,
            columns=table.ceil_div(num_h, product.columns),
            processors=table.num_processors(heads.policy.hidden.device),
        )
    blocks, group = max(limit // tile.rows, 1), table.GROUP // models
    return (blocks - blocks % group if blocks >= group else blocks) * tile.rows


def _write_unit_gradient(
    chunk: _Chunk,
    buffer: Tensor,  # [at least n, padded columns] for exp_logits
    unit_gradient: Tensor,  # [n, H] to be filled
) -> None:
    num_n, weight = len(unit_gradient), chunk.heads.policy.weight
    exp_logits = buffer[:num_n]
    statistics, rows, targets = chunk.log_probs(exp_logits)
    if rows.factor is None:
        shifts = Shifts(statistics.tile_shift, rows.shift, rows.total)
        write_unit_gradients(
            exp_logits, chunk.heads, targets, unit_gradient, shifts, active=chunk.active
        )
        return
    left = buffer if batch_invariant() else exp_logits
    in_place = len(left) == num_n and unit_gradient.dtype == torch.float32
    out = unit_gradient if in_place else None
    mean = matmul(left[:, : len(weight)], weight, out=out)[:num_n]
    write_mean_unit_gradients(mean, chunk.heads, targets, rows.factor, unit_gradient)


def _fill_cache(chunk: _Chunk, cache: SoftmaxCache) -> None:
    """With exp_logits, the factors that bring them to probabilities, and the targets' 1 - p."""
    exp_logits, factors, one_minus_p = cache
    options, tile = chunk.heads.options, chunk.heads.tile
    statistics, rows, targets = chunk.log_probs(exp_logits)
    if rows.factor is not None:
        factors[:] = rows.factor
    else:
        p = torch.exp2(statistics.tile_shift[:, : len(one_minus_p)] - rows.shift) / rows.total
        p *= 2.0 ** -table.stored_exponent(exp_logits.dtype)
        repeats = tile.part // table.CACHE_TILE
        factors[: len(p) * repeats] = p.repeat_interleave(repeats, 0)
    one_minus_p[:] = rows.one_minus_p
    if options.softcap is not None:
        one_minus_p *= softcap_slope(targets.target_logit, options)


def backward_columns(head: Head, need_weight: bool, config: Config) -> int:
    """Columns of one backward chunk: whole tiles within the budget, at least one tile.

    Within it are the chunk's dlogits and, in float32, its rows of the weight's gradient.
    """
    (num_n, num_h), block = head.hidden.shape, config.dlogits.columns
    column_bytes = max(num_n, 1) * head.hidden.element_size()
    if need_weight:
        column_bytes = max(column_bytes, 4 * num_h)
    tiles = max(1, table.DLOGITS_BYTES // (column_bytes * block))
    return min(tiles, table.ceil_div(len(head.weight), block)) * block
