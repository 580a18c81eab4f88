"""The head in PyTorch: any device, any vocabulary, never [N, V].

The vocabulary is the outer loop: a tile of the weight is converted to the product's type once and
serves every row of policy and reference. Each row carries a running maximum and sum (online
softmax), and on the exact route the running sum_v p_v W_v, rescaled when the maximum moves, as
flash attention rescales its output. So policy log-probs, their gradient direction and the reference
log-probs cost three products.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from powerflow_fast.logprobs.options import HeadForward, HeadOptions
from powerflow_fast.logprobs.softmax_cache import Layout, Numerators
from powerflow_fast.logprobs.torch_sparse import (
    BLOCK,
    Peaks,
    exact_certificate,
    looks_sharp,
    sparse_direction,
)
from powerflow_fast.logprobs.torch_tiles import (
    Head,
    OnlineHead,
    add_product_,
    exp_,
    has_bf16_units,
    matmul,
    softcap_slope,
    target_columns,
    tile_shape,
)

CONVERTS_TILES = True  # of a weight in another type than hidden's


def numerators_layout(device: torch.device) -> Layout:
    return Layout(piece=tile_shape(device)[1], multiple=1)


def direction_dtype(hidden: Tensor, options: HeadOptions) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


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
) -> HeadForward:
    """Log-probs of the targets under both models, and d logps / d hidden if wanted.

    `numerators`, if given, are filled for as many rows that count as they have.
    """
    rows = _counted_rows(targets, options)
    counted = targets if rows is None else targets[rows]
    policy = OnlineHead(_take(hidden, rows), weight, bias, counted, options)
    models = [policy]
    if ref is not None:
        ref_hidden, ref_weight, ref_bias = ref
        models.append(OnlineHead(_take(ref_hidden, rows), ref_weight, ref_bias, counted, options))
        models[1].buffer = policy.buffer  # their tiles are formed one after the other
    with _bf16_products(policy.product_dtype, hidden):
        if want_direction:
            _prepare_direction(policy)
        policy.numerators = numerators
        _sweep(models)
        if numerators is not None:
            policy.finish_numerators()
        direction = certificate = kept = None
        if policy.peaks is not None:
            direction, certificate, kept = sparse_direction(policy)
        elif want_direction:
            total = policy.others + policy.target_share
            direction = policy.finish_direction(policy.expected, total)
            if options.grad_tolerance > 0:
                certificate = exact_certificate(len(policy.hidden), BLOCK, total)

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None or rows is None:
            return values
        return values.new_zeros(len(targets), *values.shape[1:]).index_copy_(0, rows, values)

    return HeadForward(
        logps=spread(policy.logps),
        lse=spread(policy.lse),
        entropy=spread(policy.entropy) if options.entropy else None,
        direction=spread(direction),
        ref_logps=spread(models[1].logps) if ref is not None else None,
        certificate=certificate,
        kept=kept if want_kept else None,
    )


def backward(
    grad_logps: Tensor,  # [N], 0 on ignored rows
    grad_entropy: Tensor | None,  # [N], likewise
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    logps: Tensor,  # [N] of the targets, over the whole vocabulary
    lse: Tensor,  # [N] likewise
    entropy: Tensor | None,  # [N], needed with grad_entropy
    options: HeadOptions,
    needs: Sequence[bool],  # hidden, weight, bias
    kept: Tensor | None = None,  # [blocks, V] bool as the forward pass left it
    numerators: Numerators | None = None,  # likewise, without grad_entropy
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients, hidden's in float32, by recomputing the logits of rows without numerators.

    Those of the kept columns alone, if given. A confident target's 1 - p comes from `logps`: the
    recomputed logits have lost its digits.
    """
    rows = _counted_rows(targets, options)
    if rows is not None:
        grad_logps, targets, logps, lse = (x[rows] for x in (grad_logps, targets, logps, lse))
        grad_entropy, entropy = _take(grad_entropy, rows), _take(entropy, rows)
    head = Head(_take(hidden, rows), weight, bias, targets, options)
    if kept is not None:  # few columns of each block remain of a tile
        head.tile = (BLOCK, 4 * head.tile[1])
    grads = _Gradients(head, needs)
    known = 0 if numerators is None else min(numerators.rows, len(targets))
    with _bf16_products(head.product_dtype, hidden):
        for start, stop, weight_tile in head.weight_tiles():
            grads.start_tile(start, stop)
            for r in head.row_slices(0, known):
                dlogits = _kept_dlogits(numerators, head, grad_logps[r], r, start, stop)
                grads.add(dlogits, r, start, slice(0, stop - start), weight_tile)
            for r in head.row_slices(known):
                columns = _kept_columns(kept, r, start, stop)
                tile = weight_tile[columns]
                if len(tile) == 0:
                    continue
                bias_tile = None if bias is None else bias[start:stop][columns]
                logits = head.logits(r, tile, bias_tile)
                dlogits = _dlogits(
                    logits,
                    grad_logps[r],
                    None if grad_entropy is None else grad_entropy[r],
                    lse[r],
                    None if entropy is None else entropy[r],
                    None if logps is None else logps[r],
                    target_columns(targets[r] - start, columns, stop - start),
                    options,
                )
                grads.add(dlogits, r, start, columns, tile)
            grads.store_tile(start, stop)
    grad_hidden = grads.hidden
    if grad_hidden is not None and rows is not None:
        grad_hidden = grad_hidden.new_zeros(hidden.shape).index_copy_(0, rows, grad_hidden)
    return grad_hidden, grads.weight, None if grads.bias is None else grads.bias.to(bias.dtype)


def _prepare_direction(policy: OnlineHead) -> None:
    """Have the sweep collect what the direction needs: its sum, or which columns matter."""
    if policy.options.grad_tolerance > 0 and looks_sharp(policy):
        policy.peaks = Peaks(len(policy.hidden), policy.weight)
    else:
        policy.collect_expected()


class _Gradients:
    """Float32 sums of the gradients that are needed, each cast once."""

    def __init__(self, head: Head, needs: Sequence[bool]) -> None:
        self.head = head
        weight = head.weight
        full = partial(torch.full, dtype=head.dtype, device=weight.device)
        self.hidden = full(head.hidden.shape, 0.0) if needs[0] else None
        self.weight = weight.new_empty(weight.shape) if needs[1] else None
        self.bias = full((len(weight),), 0.0) if needs[2] else None
        self.tile: Tensor | None = None  # float32 rows of the weight's gradient

    def start_tile(self, start: int, stop: int) -> None:
        """Columns start:stop of the vocabulary are next."""
        if self.weight is not None:
            rows = self.weight[start:stop]
            same = rows.dtype == self.head.dtype  # then they are summed where they belong
            self.tile = rows.zero_() if same else torch.zeros_like(rows, dtype=self.head.dtype)

    def add(
        self, dlogits: Tensor, r: slice, start: int, columns: slice | Tensor, weight_tile: Tensor
    ) -> None:
        """Take in rows r and `columns`, counted from column `start` of the vocabulary."""
        if self.bias is not None:
            self.bias[start:][columns] += dlogits.sum(0)
        dlogits = dlogits.to(weight_tile.dtype)
        if self.hidden is not None:
            add_product_(self.hidden[r], dlogits, weight_tile)
        if self.tile is not None:
            x = self.head.hidden[r].to(weight_tile.dtype)
            if isinstance(columns, slice):
                add_product_(self.tile[columns], dlogits.T, x)
            else:
                self.tile.index_add_(0, columns, matmul(dlogits.T, x))

    def store_tile(self, start: int, stop: int) -> None:
        if self.weight is not None and self.tile.dtype != self.weight.dtype:
            self.weight[start:stop] = self.tile


def _sweep(models: list[OnlineHead]) -> None:
    """One pass over the vocabulary for all models; a shared weight's tiles are converted once."""
    policy = models[0]
    for start, stop, weight_tile in policy.weight_tiles():
        for model in models:
            tile = weight_tile
            if model.weight is not policy.weight:
                tile = model.factor(model.weight[start:stop])
            for r in model.row_slices():
                model.update(r, start, stop, tile)


def _dlogits(
    logits: Tensor,  # [n, v], overwritten
    grad_logps: Tensor,  # [n]
    grad_entropy: Tensor | None,  # [n]
    lse: Tensor,  # [n]
    entropy: Tensor | None,  # [n]
    logps: Tensor | None,  # [n]
    target_columns: tuple[Tensor, Tensor],  # [n, 1] of the tile, and whether they lie in it
    options: HeadOptions,
) -> Tensor:  # [n, v]
    """g (1[y=v] - p_v) - e p_v (log p_v + entropy), times the transform's derivative."""
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
    own = -grad_logps * logps.expm1()
    if grad_entropy is not None:
        own = own - grad_entropy * logps.exp() * (logps + entropy)
    dlogits.scatter_(1, index, own[:, None].where(inside, dlogits.gather(1, index)))
    if slope is not None:
        dlogits.mul_(slope)
    return dlogits.mul_(options.scale)


def _kept_dlogits(
    numerators: Numerators,
    head: Head,
    grad_logps: Tensor,  # [n] of rows r
    r: slice,
    start: int,
    stop: int,
) -> Tensor:  # [n, stop - start]
    """What `_dlogits` gives for rows r and the tile's columns, from the kept numerators."""
    values, factors, own = numerators
    grad = grad_logps * head.options.scale
    dlogits = head.scratch(len(grad), stop - start)
    coefficient = factors[start // head.tile[1], r] * -grad
    torch.mul(values[r, start:stop], coefficient[:, None], out=dlogits)
    index, inside = target_columns(head.targets[r] - start, slice(0, stop - start), stop - start)
    return dlogits.scatter_add_(1, index, (grad * own[r])[:, None].where(inside, 0.0))


def _kept_columns(kept: Tensor | None, r: slice, start: int, stop: int) -> slice | Tensor:
    """Columns of the tile start:stop, counted from its start, that the block of rows r keeps."""
    if kept is None:
        return slice(0, stop - start)
    kept = kept[r.start // BLOCK, start:stop]
    return slice(0, stop - start) if kept.all() else kept.nonzero()[:, 0]


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
    if bf16_copies and has_bf16_units(hidden.device) and threading.active_count() == 1:
        return _onednn_bf16()
    return nullcontext()
