"""The head on the Triton kernels: row chunks forward, vocabulary chunks backward.

Forward, per row chunk: a pilot of a few columns gives each row its shift, one launch forms softmax
statistics of policy and reference, another merges them, and rows that the pilot misled are done
again. Where the direction is wanted, the softmax numerators that the statistics stored are
multiplied with the weight by the vendor's library (float16's, relative to shifts of their own, by
a kernel). Backward, per vocabulary chunk: the gradient of the logits is written by a kernel that
recomputes them, or for the first rows of a trained head by one that reads the numerators which the
forward pass kept; the products with it are the vendor library's.

Triton is imported when a function here is called, not with this module.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.logprobs import triton_sparse
from powerflow_fast.logprobs.options import HeadForward, HeadOptions, batch_invariant
from powerflow_fast.logprobs.softmax_cache import Layout, Numerators
from powerflow_fast.logprobs.torch_sparse import exact_certificate
from powerflow_fast.logprobs.torch_tiles import softcap_slope
from powerflow_fast.logprobs.triton_gradients import GradientSums, dlogits_scale, product
from powerflow_fast.logprobs.triton_sparse import direction_dtype

if TYPE_CHECKING:
    from powerflow_fast.kernels.active_blocks import ActiveBlocks
    from powerflow_fast.kernels.combine import Results, Rows
    from powerflow_fast.kernels.config import Config
    from powerflow_fast.kernels.direction import TargetRows
    from powerflow_fast.kernels.statistics import Heads, Search, Statistics
    from powerflow_fast.kernels.tiles import Operands

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CONVERTS_TILES = False  # a kernel's operands have one type


def numerators_layout(device: torch.device) -> Layout:
    from powerflow_fast.kernels import config

    return config.numerators_layout()


def forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    ref: tuple[Tensor, Tensor, Tensor | None] | None,  # hidden [N, H], weight [V, H], bias [V]
    options: HeadOptions,
    want_direction: bool,
    numerators: Numerators | None = None,
    want_kept: bool = False,
    config: Config | None = None,  # tile shapes, to try them; None chooses
) -> HeadForward:
    """Log-probs of the targets under both models; the direction d logps / d hidden if wanted.

    `numerators`, if given, are filled for as many rows as they have; no direction goes with them.
    """
    from powerflow_fast.kernels.combine import new_results
    from powerflow_fast.kernels.statistics import Heads
    from powerflow_fast.logprobs.triton_tuning import tile_config

    _check_inputs(hidden, weight)
    policy = _operands(hidden, weight, bias)
    reference = None if ref is None else _operands(*ref)
    if reference is not None and not _fit_one_launch(policy, reference):
        _check_inputs(reference.hidden, reference.weight)
        wants = (want_direction, numerators, want_kept)
        out = forward(hidden, weight, bias, targets, None, options, *wants, config=config)
        ref_hidden, ref_weight, ref_bias = reference
        alone = forward(ref_hidden, ref_weight, ref_bias, targets, None, options, False)
        return out._replace(ref_logps=alone.logps)

    config = config or tile_config(policy, targets, options)
    targets, num_n = targets.contiguous(), len(targets)
    heads = Heads(policy, reference, targets, options, config.statistics, config.tma)
    results = new_results(heads)
    search = direction = soft = certificate = kept = None
    if want_direction and options.grad_tolerance > 0 and num_n:
        search = triton_sparse.start_search(policy, targets, options, config)
    if want_direction and search is None:
        direction = hidden.new_empty(hidden.shape, dtype=direction_dtype(hidden, options))
    models = 2 if batch_invariant() else heads.models
    rows = forward_rows(policy, models, direction is not None, config)
    if direction is not None:
        soft = _soft(heads, rows)
    known = 0 if numerators is None else numerators.rows
    chunks = _chunks(heads, known, rows)
    shift = _pilot_shift(heads, chunks)
    totals: list[triton_sparse.RowTotals] = []
    for span, active in chunks:
        chunk = _Chunk(
            heads.of_rows(span),
            active,
            None if shift is None else shift[:, span].reshape(-1),
            results.of_rows(span),
            search and search.of_rows(span, config.statistics.rows),
        )
        if numerators is not None and span.start < known:
            _fill_numerators(chunk, numerators.of_rows(span))
        elif direction is not None:
            _write_direction(chunk, soft, direction[span], config)
        else:
            totals.append(chunk.row_totals())
    if search is not None:
        row_totals = triton_sparse.RowTotals(*map(torch.cat, zip(*totals, strict=True)))
        (direction, certificate, kept), failed = triton_sparse.sparse_direction(
            policy, targets, search.peaks, row_totals, options, config, want_kept
        )
        if len(failed):
            part = (policy.hidden[failed], weight, bias, targets[failed], None)
            exact = replace(options, grad_tolerance=0.0, entropy=False)
            exact_rows = forward(*part, exact, True, config=config).direction
            direction[failed] = exact_rows.to(direction.dtype)
    elif direction is not None and options.grad_tolerance > 0:
        certificate = exact_certificate(num_n, config.statistics.rows, results.logps)
    return HeadForward(
        logps=results.logps[0],
        lse=results.lse[0],
        entropy=None if results.entropy is None else results.entropy[0],
        direction=direction,
        ref_logps=None if reference is None else results.logps[1],
        certificate=certificate,
        kept=kept,
    )


def backward(
    grad_logps: Tensor,  # [N] float32, 0 on ignored rows
    grad_entropy: Tensor | None,  # [N] float32
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    logps: Tensor,  # [N] of the targets, over the whole vocabulary
    lse: Tensor,  # [N] likewise
    entropy: Tensor | None,  # [N], needed with grad_entropy
    options: HeadOptions,
    needs: tuple[bool, bool, bool],  # hidden, weight, bias
    kept: Tensor | None = None,  # [blocks, V] bool as `forward` left it, without grad_entropy
    numerators: Numerators | None = None,  # as `forward` left them, without grad_entropy
    config: Config | None = None,  # as in `forward`
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients, hidden's in float32, by recomputing the logits of rows without numerators.

    Those of the kept columns alone, where they are given and few; hidden's is not formed then. A
    confident target's 1 - p comes from `logps`: the recomputed logits have lost its digits.
    """
    from powerflow_fast.kernels.active_blocks import active_blocks
    from powerflow_fast.kernels.dlogits import UpstreamRows, write_dlogits_chunk
    from powerflow_fast.kernels.kept_dlogits import write_kept_dlogits
    from powerflow_fast.logprobs.triton_tuning import tile_config

    _check_inputs(hidden, weight)
    config = config or tile_config(_operands(hidden, weight, bias), targets, options)
    num_n, num_v = len(hidden), len(weight)
    active = grad_logps != 0 if grad_entropy is None else (grad_logps != 0) | (grad_entropy != 0)
    active &= targets != options.ignore_index
    out_scale = dlogits_scale(grad_logps, grad_entropy, num_v, options, hidden.dtype)
    if kept is not None and triton_sparse.few(kept):
        grads = triton_sparse.kept_gradients(
            _operands(hidden, weight, bias),
            targets.contiguous(),
            grad_logps.contiguous(),
            logps.contiguous(),
            lse.contiguous(),
            active,
            kept,
            out_scale,
            needs,
            options,
            config,
        )
        return None, *grads
    sums = GradientSums(hidden, weight, bias, active, out_scale, needs)
    columns = backward_columns(hidden, weight, needs[1], config)
    buffer = hidden.new_empty((num_n, columns))
    known = 0 if numerators is None else numerators.rows
    grad_known = grad_logps[:known] * (options.scale * out_scale)
    entropy = None if grad_entropy is None else entropy
    vectors = (grad_logps, grad_entropy, logps, -torch.expm1(logps), lse, entropy, active)
    rows = UpstreamRows(*(None if x is None else x[known:].contiguous() for x in vectors))
    blocks = active_blocks(rows.active, 0, config.dlogits.rows)
    for start in range(0, num_v if num_n else 0, columns):
        stop = min(start + columns, num_v)
        dlogits = buffer[:, : stop - start]
        if known:
            of_known = (targets[:known] - start, grad_known, active[:known], dlogits[:known])
            write_kept_dlogits(numerators, start, *of_known)
        if known < num_n:
            of_chunk = weight[start:stop], None if bias is None else bias[start:stop]
            write_dlogits_chunk(
                _operands(hidden[known:], *of_chunk),
                targets[known:] - start,
                rows,
                blocks,
                out_scale,
                dlogits[known:],
                options,
                config.dlogits,
                config.tma,
            )
        sums.add(dlogits, start, stop)
    return sums.results()


def sequence_residual_forward(
    logps: Tensor,  # [N] float32
    ref_logps: Tensor,  # [N] float32
    starts: Tensor,  # [S] int32, ascending: cu_seqlens[:-1], or b * T for padded rows
    ends: Tensor,  # [S] int32
    mask: Tensor | None,  # [N] bool
    alpha: Tensor,  # [S] float32
    psi: Tensor,  # [S] float32
    balance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> l_pi - alpha * (l_ref + psi), l_pi, l_ref and int32 lengths, all [S], zero where empty."""
    from powerflow_fast.kernels import residual  # type: ignore[attr-defined]  # kernels.py says why

    floats = (_vector(logps), _vector(ref_logps))
    bounds = (_vector(starts, torch.int32), _vector(ends, torch.int32))
    mask = None if mask is None else _vector(mask, torch.bool)
    return residual.sequence_residual_forward(
        *floats, *bounds, mask, _vector(alpha), _vector(psi), balance
    )


def sequence_residual_backward(
    grad_delta0: Tensor,  # [S] float32
    lengths: Tensor,  # [S] int32
    starts: Tensor,  # [S] int32, ascending
    ends: Tensor,  # [S] int32
    mask: Tensor | None,  # [N] bool
    num_tokens: int,
    balance: str,
) -> Tensor:
    """-> d delta0 / d logps times the upstream gradient, [N]; 0 on tokens that are not counted."""
    from powerflow_fast.kernels import residual  # type: ignore[attr-defined]  # kernels.py says why

    bounds = [_vector(x, torch.int32) for x in (lengths, starts, ends)]
    mask = None if mask is None else _vector(mask, torch.bool)
    return residual.sequence_residual_backward(
        _vector(grad_delta0), *bounds, mask, num_tokens, balance
    )


def _vector(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values.to(dtype).contiguous()


def _check_inputs(hidden: Tensor, weight: Tensor) -> None:
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise ValueError(
            f"backend: 'triton' expects tensors on a GPU, got {hidden.device}; "
            "use backend='torch' (or TRITON_INTERPRET=1 to run the kernels in the interpreter)"
        )
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            "backend: 'triton' expects hidden and weight in one of float32, float16, bfloat16, got "
            f"{hidden.dtype} and {weight.dtype}; cast them or use backend='torch'"
        )


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
    from powerflow_fast.kernels.tiles import Operands

    return Operands(hidden, weight, None if bias is None else bias.contiguous())


def _fit_one_launch(policy: Operands, reference: Operands) -> bool:
    return (
        policy.hidden.dtype == reference.hidden.dtype == reference.weight.dtype
        and policy.hidden.shape == reference.hidden.shape
        and policy.weight.shape == reference.weight.shape
        and (policy.bias is None) == (reference.bias is None)
        and (policy.bias is None or policy.bias.dtype == reference.bias.dtype)
    )


def _chunks(
    heads: Heads,
    known: int,  # rows that keep their numerators: they have chunks of their own
    rows: int,  # of a chunk
) -> list[tuple[slice, ActiveBlocks]]:
    """Rows of each chunk, and which of their blocks have anything to compute."""
    chunks = []
    for start, stop in ((0, known), (known, len(heads.targets))):
        if start == stop:
            continue
        active = heads.of_rows(slice(start, stop)).active_blocks(rows)
        for index, first in enumerate(range(start, stop, rows)):
            span = slice(first, min(first + rows, stop))
            chunks.append((span, active.of_chunk(index, rows // heads.tile.rows)))
    return chunks


def forward_rows(policy: Operands, models: int, want_direction: bool, config: Config) -> int:
    """Rows of one chunk: its statistics and softmax numerators stay within their budgets.

    Whole groups of row blocks where they fit: the weight is read once for each. float16's product
    over the vocabulary fills the chip best.
    """
    from powerflow_fast.kernels import config as table
    from powerflow_fast.kernels.statistics import GROUP, has_row_shift, padded_columns

    num_n, num_h = policy.hidden.shape
    tile = config.statistics
    columns = padded_columns(policy.weight.shape[0], tile)
    row_shift = has_row_shift(policy.hidden.dtype)
    statistics = columns // tile.columns * 2 if row_shift else columns // tile.part * 3
    limit = table.STATISTICS_BYTES // (statistics * models * 4)
    if want_direction:
        limit = min(limit, table.SOFT_BYTES // (columns * policy.hidden.element_size()))
    if want_direction and not row_shift:
        return table.balanced_rows(
            num_n,
            limit,
            block=config.direction.rows,
            columns=math.ceil(num_h / config.direction.columns),
            processors=table.num_processors(policy.hidden.device),
        )
    blocks, group = max(limit // tile.rows, 1), GROUP // models
    return (blocks - blocks % group if blocks >= group else blocks) * tile.rows


class _Chunk(NamedTuple):
    """Rows that go through the vocabulary together."""

    heads: Heads
    active: ActiveBlocks
    shift: Tensor | None  # [models * n] by the pilot; None in float16
    results: Results  # to be filled
    search: Search | None

    def log_probs(self, soft: Tensor | None) -> tuple[Statistics, Rows, TargetRows]:
        """Fills the results and, if given, softmax numerators -> both models'; the policy's."""
        from powerflow_fast.kernels.direction import TargetRows
        from powerflow_fast.kernels.row_shift import log_probs

        heads, active, shift, results, search = self
        n = len(heads.targets)
        statistics, rows = log_probs(heads, active, shift, results, soft, search)
        own = rows.of(slice(n))
        return statistics, own, TargetRows(heads.targets, own.others, statistics.target_logit[:n])

    def row_totals(self) -> triton_sparse.RowTotals:
        """Of the policy, for the certified route; fills the results."""
        _, rows, targets = self.log_probs(None)
        return triton_sparse.RowTotals(rows.shift, rows.total, *targets[1:])


def _write_direction(
    chunk: _Chunk,
    buffer: Tensor,  # [at least n, padded columns] for softmax numerators
    direction: Tensor,  # [n, H] to be filled
    config: Config,
) -> None:
    from powerflow_fast.kernels.direction import Shifts, write_directions
    from powerflow_fast.kernels.mean_direction import write_mean_directions

    weight, options, num_n = chunk.heads.policy.weight, chunk.heads.options, len(direction)
    soft = buffer[:num_n]
    statistics, rows, targets = chunk.log_probs(soft)
    if rows.factor is None:
        shifts = Shifts(statistics.tile_shift, rows.shift, rows.total)
        how = (options, config, shifts, None, chunk.active)
        write_directions(soft, weight, targets, direction, *how)
        return
    left = buffer if batch_invariant() else soft
    in_place = len(left) == num_n and direction.dtype == torch.float32
    out = direction if in_place else None
    mean = product(left[:, : len(weight)], weight, out=out)[:num_n]
    write_mean_directions(mean, weight, targets, rows.factor, direction, options)


def _soft(heads: Heads, rows: int) -> Tensor:
    """For the softmax numerators of one chunk after the other."""
    from powerflow_fast.kernels.statistics import padded_columns

    rows = rows if batch_invariant() else min(rows, len(heads.targets))
    return heads.policy.hidden.new_empty((rows, padded_columns(heads.num_v, heads.tile)))


def _pilot_shift(heads: Heads, chunks: list[tuple[slice, ActiveBlocks]]) -> Tensor | None:
    """[models, N] of all rows at once: a launch takes the host as long as a chunk the device."""
    from powerflow_fast.kernels.row_shift import pilot_shift
    from powerflow_fast.kernels.statistics import has_row_shift

    if not chunks or not has_row_shift(heads.policy.hidden.dtype):
        return None
    return pilot_shift(heads, chunks[0][1] if len(chunks) == 1 else heads.active_blocks())


def _fill_numerators(chunk: _Chunk, numerators: Numerators) -> None:
    """With the factors that bring them to probabilities, and what belongs to the targets."""
    from powerflow_fast.kernels.config import soft_exponent

    values, factors, own = numerators
    statistics, rows, targets = chunk.log_probs(values)
    if rows.factor is not None:
        factors[:] = rows.factor
    else:
        p = torch.exp2(statistics.tile_shift[:, : len(own)] - rows.shift) / rows.total
        p *= 2.0 ** -soft_exponent(values.dtype)
        repeats = chunk.heads.tile.part // numerators_layout(values.device).piece
        factors[: len(p) * repeats] = p.repeat_interleave(repeats, 0)
    own[:] = rows.others
    if chunk.heads.options.softcap is not None:
        own *= softcap_slope(targets.target_logit, chunk.heads.options)


def backward_columns(hidden: Tensor, weight: Tensor, need_weight: bool, config: Config) -> int:
    """Columns of one backward chunk: whole tiles within the budget, at least one tile.

    Within it are the chunk's dlogits and, in float32, its rows of the weight's gradient.
    """
    from powerflow_fast.kernels.config import DLOGITS_BYTES

    (num_n, num_h), block = hidden.shape, config.dlogits.columns
    column_bytes = max(num_n, 1) * hidden.element_size()
    if need_weight:
        column_bytes = max(column_bytes, 4 * num_h)
    tiles = max(1, DLOGITS_BYTES // (column_bytes * block))
    return min(tiles, math.ceil(len(weight) / block)) * block


__all__ = [
    "backward",
    "direction_dtype",
    "forward",
    "numerators_layout",
    "sequence_residual_backward",
    "sequence_residual_forward",
]
