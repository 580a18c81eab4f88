"""The head in PyTorch: any device, any vocabulary, never [N, V].

The vocabulary is the outer loop: a tile of the weight is converted to the product's type once and
serves every row of policy and reference. Each row carries a running maximum and sum (online
softmax). For the unit gradient it also carries the running sum_v p_v W_v, rescaled when the maximum
moves, as flash attention rescales its output. So policy log-probs, their unit gradient and the
reference log-probs cost three products. On some CPUs a frozen head takes torch_attention.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from powerflow_fast.kernels.operands import Head, of_rows
from powerflow_fast.logprobs.backend import Gradients, HeadForward, Upstream
from powerflow_fast.logprobs.gradients import GradientSums
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.products import has_bf16_units
from powerflow_fast.logprobs.softmax_cache import SoftmaxCache, VocabTiling
from powerflow_fast.logprobs.torch_attention import TILES, attention_sweeps, takes_attention
from powerflow_fast.logprobs.torch_sparse import looks_sharp, sparse_unit_gradient
from powerflow_fast.logprobs.torch_tiles import (
    BLOCK,
    ROUNDED_TILES,
    ColumnMax,
    OnlineHead,
    TiledHead,
    exact_sparsity,
    exp_,
    softcap_slope,
    target_columns,
    tile_shape,
)

CONVERTS_TILES = True


def vocab_tiling(device: torch.device) -> VocabTiling:
    return VocabTiling(tile_columns=tile_shape(device)[1], padded_to=1)


def unit_gradient_dtype(hidden: Tensor, options: HeadOptions) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def forward(
    policy: Head,
    reference: Head | None,
    targets: Tensor,  # [N] int64
    options: HeadOptions,
    cache: SoftmaxCache | None = None,
) -> HeadForward:
    """See `Backend.forward`."""
    rows = _counted_rows(targets, options)
    models = []
    for head in (policy, reference):
        if head is not None:
            hidden = _take(head.hidden, rows)
            models.append(OnlineHead(head._replace(hidden=hidden), _take(targets, rows), options))
    online = models[0]
    # The models' tiles are formed one after the other.
    models[-1].buffer, models[-1].rounded = online.buffer, online.rounded
    unit_gradient = sparsity = kept_columns = None
    with _bf16_products(online.product_dtype, policy.hidden):
        if _certified_pays(online):
            online.column_max = ColumnMax(len(online.hidden), online.weight)
        elif options.wants_unit_gradient:
            online.collect_expected()
        online.cache = cache
        _sweep(models)
        if cache is not None:
            online.finish_cache()
        if online.column_max is not None:
            unit_gradient, sparsity, kept_columns = sparse_unit_gradient(online)
        elif online.expected is not None:
            unit_gradient = online.finish_unit_gradient(online.expected, online.total)
            if options.grad_tolerance > 0:
                sparsity = exact_sparsity(len(online.hidden), BLOCK, online.total)

    def scatter_back(values: Tensor | None) -> Tensor | None:
        if values is None or rows is None:
            return values
        return values.new_zeros(len(targets), *values.shape[1:]).index_copy_(0, rows, values)

    return HeadForward(
        logps=scatter_back(online.logps),
        lse=scatter_back(online.lse),
        entropy=scatter_back(online.entropy) if options.entropy else None,
        unit_gradient=scatter_back(unit_gradient),
        ref_logps=None if reference is None else scatter_back(models[1].logps),
        sparsity=sparsity,
        kept_columns=kept_columns if options.route == "sparse" else None,
    )


def backward(
    head: Head,
    upstream: Upstream,
    options: HeadOptions,
    needs: Sequence[bool],  # hidden, weight, bias
    kept_columns: Tensor | None = None,
    cache: SoftmaxCache | None = None,
) -> Gradients:
    """See `Backend.backward`."""
    num_n = len(upstream.targets)
    rows = _counted_rows(upstream.targets, options)
    if rows is not None:
        upstream = of_rows(upstream, rows)
        head = head._replace(hidden=head.hidden[rows])
    tiled = TiledHead(head, upstream.targets, options)
    if kept_columns is not None:  # few columns of each block remain of a tile
        tiled.tile = (BLOCK, 4 * tiled.tile[1])
    sums = GradientSums(head, needs)
    cached_rows = 0 if cache is None else min(cache.rows, len(upstream.targets))
    with _bf16_products(tiled.product_dtype, head.hidden):
        for start, stop, weight_tile in tiled.weight_tiles():
            sums.start(start, stop)
            for r in tiled.row_slices(0, cached_rows):
                dlogits = _cached_dlogits(cache, tiled, upstream.grad_logps[r], r, start, stop)
                sums.add(dlogits, r, None, weight_tile)
            for r in tiled.row_slices(cached_rows):
                columns = _columns_of_tile(kept_columns, r, start, stop)
                tile, bias_tile = weight_tile, tiled.bias_tile(start, stop)
                if columns is not None:
                    tile = weight_tile[columns]
                    bias_tile = None if bias_tile is None else bias_tile[columns]
                if len(tile) == 0:
                    continue
                of_tile = of_rows(upstream, r)
                target = target_columns(of_tile.targets - start, columns, stop - start)
                dlogits = _dlogits(tiled.logits(r, tile, bias_tile), of_tile, target, options)
                sums.add(dlogits, r, columns, tile)
            sums.store()
    grads = sums.results()
    if grads.hidden is not None and rows is not None:
        whole = grads.hidden.new_zeros(num_n, grads.hidden.shape[1])
        grads = grads._replace(hidden=whole.index_copy_(0, rows, grads.hidden))
    return grads


def _certified_pays(head: OnlineHead) -> bool:
    """Whether the columns that matter are worth looking for, where a tolerance allows it.

    Where attention multiplies bfloat16, all of them cost less than the few.
    """
    if not (head.options.wants_unit_gradient and head.options.grad_tolerance > 0):
        return False
    attended = head.hidden.dtype == torch.bfloat16 and takes_attention(head)
    return not attended and looks_sharp(head)


def _sweep(models: list[OnlineHead]) -> None:
    """One pass over the vocabulary for all models; a shared weight's tiles are converted once."""
    policy = models[0]
    attended = [model for model in models if takes_attention(model)]
    plain = [model for model in models if model not in attended]
    for model in models:
        if model in attended:
            model.take_tiles(TILES[model.hidden.dtype])
        elif model.rounds_tiles:
            small, large = ROUNDED_TILES
            model.take_tiles(small if len(model.hidden) <= small[0] else large)
    sweeps = attention_sweeps(attended)

    def of(model: OnlineHead) -> Tensor:
        """The tile of the model's own weight."""
        if model.weight is policy.weight and weight_tile.dtype == model.product_dtype:
            return weight_tile
        return model.factor(model.weight[start:stop])

    for start, stop, weight_tile in policy.weight_tiles():  # noqa: B007, read by `of`
        for sweep in sweeps:
            sweep.update(start, stop, of(sweep.heads[0]))
        for model in plain:
            for r in model.row_slices():
                model.update(r, start, stop, of(model))
    for sweep in sweeps:
        sweep.finish()


def _dlogits(
    logits: Tensor,  # [n, v], overwritten
    upstream: Upstream,  # [n]
    target_columns: tuple[Tensor, Tensor],  # [n, 1] of the tile, and whether they lie in it
    options: HeadOptions,
) -> Tensor:  # [n, v]
    """g (1[y=v] - p_v) - e p_v (log p_v + entropy), times the transform's derivative."""
    grad_logps, grad_entropy, _, logps, lse, entropy = upstream
    slope = None if options.softcap is None else softcap_slope(logits, options)
    log_p = logits.sub_(lse[:, None])
    coefficient = -grad_logps[:, None]
    if grad_entropy is not None:
        coefficient = coefficient - grad_entropy[:, None] * (
            log_p.clamp_min(-1e30) + entropy[:, None]
        )
    p = exp_(log_p)
    dlogits = p.mul_(coefficient)
    index, inside = target_columns
    at_target = -grad_logps * logps.expm1()
    if grad_entropy is not None:
        at_target = at_target - grad_entropy * logps.exp() * (logps + entropy)
    dlogits.scatter_(1, index, at_target[:, None].where(inside, dlogits.gather(1, index)))
    if slope is not None:
        dlogits.mul_(slope)
    return dlogits.mul_(options.scale)


def _cached_dlogits(
    cache: SoftmaxCache,
    tiled: TiledHead,
    grad_logps: Tensor,  # [n] of rows r
    r: slice,
    start: int,
    stop: int,
) -> Tensor:  # [n, stop - start]
    """What `_dlogits` gives for rows r and the tile's columns, from the softmax cache."""
    grad = grad_logps * tiled.options.scale
    dlogits = tiled.scratch(len(grad), stop - start)
    coefficient = cache.factors[start // tiled.tile[1], r] * -grad
    torch.mul(cache.exp_logits[r, start:stop], coefficient[:, None], out=dlogits)
    index, inside = target_columns(tiled.targets[r] - start, None, stop - start)
    at_target = (grad * cache.one_minus_p[r])[:, None].where(inside, 0.0)
    return dlogits.scatter_add_(1, index, at_target)


def _columns_of_tile(kept_columns: Tensor | None, r: slice, start: int, stop: int) -> Tensor | None:
    """Columns of the tile start:stop that the block of rows r keeps; None: all of them."""
    if kept_columns is None:
        return None
    kept = kept_columns[r.start // BLOCK, start:stop]
    return None if kept.all() else kept.nonzero()[:, 0]


def _counted_rows(targets: Tensor, options: HeadOptions) -> Tensor | None:
    """Indices of the rows that count, so that padding and prompts never reach a product."""
    rows = (targets != options.ignore_index).nonzero()[:, 0]
    return None if len(rows) == len(targets) else rows


def _take(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return values if values is None or rows is None else values[rows]


@contextmanager
def _onednn_bf16() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up at import
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _bf16_products(product_dtype: torch.dtype, hidden: Tensor):
    """On CPUs with bf16 units, float32 copies of bf16 operands are multiplied at bf16 speed.

    The operands hold bf16 values already, so their products stay exact; sums are float32. oneDNN's
    setting is the whole process's, so it is left alone where another thread might multiply.
    """
    bf16_copies = hidden.dtype == torch.bfloat16 and product_dtype == torch.float32
    if bf16_copies and has_bf16_units(hidden.device) and _multiplies_alone():
        return _onednn_bf16()
    return nullcontext()


def _multiplies_alone() -> bool:
    """Whether no thread of Python's but this one could multiply; tqdm's, in trainers, watches."""
    others = set(threading.enumerate()) - {threading.current_thread()}
    return all(type(thread).__module__ == "tqdm._monitor" for thread in others)
