"""The head in PyTorch: any device, any vocabulary, never [N, V].

The vocabulary is the outer loop: a tile of the weight is converted to the product's type once and
serves every row of policy and reference. Each row carries a running maximum and sum (online
softmax), and on the exact route the running sum_v p_v W_v, rescaled when the maximum moves, as
flash attention rescales its output. So policy log-probs, their gradient direction and the reference
log-probs cost three products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import torch
from torch import Tensor

from powerflow_fast.certified import Peaks, certified_direction
from powerflow_fast.options import HeadForward, HeadOptions

# Tiles of [rows, vocabulary] logits. On a CPU they live in the last-level cache, and with their
# slice of the weight they are the whole working set; a GPU needs larger ones to fill its
# multiprocessors.
_CPU_TILE = (512, 1024)
_GPU_TILE = (4096, 8192)


def forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    ref: tuple[Tensor, Tensor, Tensor | None] | None,  # hidden [N, H], weight [V, H], bias [V]
    options: HeadOptions,
    want_direction: bool,
) -> HeadForward:
    """Log-probs of the targets under both models, and d logps / d hidden if wanted."""
    rows = _counted_rows(targets, options)
    kept = targets if rows is None else targets[rows]
    policy = OnlineHead(_take(hidden, rows), weight, bias, kept, options, want_direction)
    models = [policy]
    if ref is not None:
        ref_hidden, ref_weight, ref_bias = ref
        models.append(OnlineHead(_take(ref_hidden, rows), ref_weight, ref_bias, kept, options))
        models[1].buffer = policy.buffer  # their tiles are formed one after the other
    with _bf16_products(policy.product_dtype, hidden):
        _sweep(models)
        direction = certificate = None
        if want_direction and options.grad_tolerance > 0:
            direction, certificate = certified_direction(policy)
        elif want_direction:
            total = policy.others + policy.target_share
            direction = policy.finish_direction(policy.expected, total)

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
    )


def backward(
    grad_logps: Tensor,  # [N], 0 on ignored rows
    grad_entropy: Tensor | None,  # [N], likewise
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    lse: Tensor,  # [N]
    entropy: Tensor | None,  # [N], needed with grad_entropy
    options: HeadOptions,
    needs: Sequence[bool],  # hidden, weight, bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by recomputing the logits tile by tile; sums are float32 and cast once."""
    rows = _counted_rows(targets, options)
    if rows is not None:
        grad_logps, targets, lse = grad_logps[rows], targets[rows], lse[rows]
        grad_entropy, entropy = _take(grad_entropy, rows), _take(entropy, rows)
    head = OnlineHead(_take(hidden, rows), weight, bias, targets, options)
    grads = _Gradients(head, needs)
    with _bf16_products(head.product_dtype, hidden):
        for start, stop, weight_tile in head.weight_tiles():
            for r in head.row_slices():
                logits = head.logits(r, weight_tile, head.bias_tile(start, stop))
                dlogits = _dlogits(
                    logits,
                    grad_logps[r],
                    None if grad_entropy is None else grad_entropy[r],
                    lse[r],
                    None if entropy is None else entropy[r],
                    targets[r] - start,
                    options,
                )
                grads.add(dlogits, r, start, stop, weight_tile)
            grads.store_tile(start, stop)
    grad_hidden = grads.hidden
    if grad_hidden is not None and rows is not None:
        grad_hidden = grad_hidden.new_zeros(hidden.shape).index_copy_(0, rows, grad_hidden)
    return (
        None if grad_hidden is None else grad_hidden.to(hidden.dtype),
        grads.weight,
        None if grads.bias is None else grads.bias.to(bias.dtype),
    )


class OnlineHead:
    """One model's head over the counted rows: logits tile by tile, running softmax statistics."""

    def __init__(
        self,
        hidden: Tensor,  # [n, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [n]
        options: HeadOptions,
        want_direction: bool = False,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.options = options
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Products of bf16 with float32 results exist on CUDA; elsewhere float32 copies are
        # multiplied.
        native = hidden.is_cuda and hidden.dtype == torch.bfloat16
        self.product_dtype = hidden.dtype if native else self.dtype
        self.tile = _GPU_TILE if hidden.is_cuda else _CPU_TILE
        n = len(hidden)
        full = partial(torch.full, dtype=self.dtype, device=hidden.device)
        self.buffer = full((0,), 0.0)
        self.target_logits = self._target_logits()
        # Sums leave the target out: where it has nearly all the mass, log(1 + others) and
        # 1 - p_y = others / total keep the digits that a sum with it would round away.
        self.maximum = self.target_logits.where(~self.target_logits.isnan(), -torch.inf)
        self.others = full((n,), 0.0)  # sum_v e^(z_v - max)
        self.weighted = full((n,), 0.0) if options.entropy else None  # times (z_v - max)
        certified = want_direction and options.grad_tolerance > 0
        self.expected = full(hidden.shape, 0.0) if want_direction and not certified else None
        self.peaks = Peaks(n, weight) if certified else None

    def row_slices(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self.tile[0]):
            yield slice(start, start + self.tile[0])

    def weight_tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, weight[start:stop]) with the tile in the product's type."""
        for start in range(0, len(self.weight), self.tile[1]):
            tile = self.weight[start : start + self.tile[1]]
            yield start, start + len(tile), tile.to(self.product_dtype)

    def logits(self, r: slice, weight_tile: Tensor, bias_tile: Tensor | None) -> Tensor:
        """Logits of rows r and the tile's columns, in a buffer that the next call overwrites."""
        x = self.hidden[r].to(self.product_dtype)
        size = len(x) * len(weight_tile)
        if len(self.buffer) < size:
            self.buffer.resize_(size)
        z = self.buffer[:size].view(len(x), len(weight_tile))
        _matmul(x, weight_tile.T, out=z)
        return self._transform(z, bias_tile)

    def bias_tile(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]

    def _transform(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Products to logits, in place."""
        options = self.options
        if bias is not None:
            z += bias.to(self.dtype)
        if options.round_logits:
            z.copy_(z.to(self.hidden.dtype))
        if options.softcap is not None:
            z.mul_(options.logit_scale / options.softcap).tanh_()
            z.mul_(options.softcap / options.temperature)
        elif options.scale != 1.0:
            z.mul_(options.scale)
        return z

    def _target_logits(self) -> Tensor:
        """[n] logits of the targets; NaN where the target is outside the vocabulary."""
        inside = (self.targets >= 0) & (self.targets < len(self.weight))
        index = self.targets.where(inside, 0)
        z = torch.empty(len(index), dtype=self.dtype, device=index.device)
        for r in self.row_slices():
            own = self.weight[index[r]].to(self.dtype)
            z[r] = own.mul_(self.hidden[r]).sum(1)
        z = self._transform(z, None if self.bias is None else self.bias[index])
        return z.where(inside, torch.nan)

    def update(self, r: slice, start: int, stop: int, weight_tile: Tensor) -> None:
        """Take columns start:stop into the running statistics of rows r."""
        z = self.logits(r, weight_tile, self.bias_tile(start, stop))
        slope = softcap_slope(z, self.options) if self._wants_slope else None
        index, inside = _target_columns(self.targets[r] - start, stop - start)
        z.scatter_(1, index, z.gather(1, index).masked_fill_(inside, -torch.inf))
        maximum = torch.maximum(self.maximum[r], z.amax(1))
        # A row of nothing but -inf keeps exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
        finite = maximum.where(maximum != -torch.inf, 0.0)
        shift = self.maximum[r] - finite
        decay = shift.exp()
        z.sub_(finite[:, None])
        if self.peaks is not None:
            self.peaks.update(z, r.start, start, stop)
        e = z.exp_() if self.weighted is None else z.exp()
        if self.weighted is not None:
            # exp underflows to 0 long before z reaches -inf, whose product with 0 would be NaN.
            moved = self.weighted[r] + self.others[r] * shift.clamp_min(-1e30)
            self.weighted[r] = moved * decay + (e * z.clamp_min_(-1e30)).sum(1)
        self.others[r] = self.others[r] * decay + e.sum(1)
        self.maximum[r] = maximum
        if self.expected is not None:
            if slope is not None:
                e.mul_(slope)
            self.accumulate(self.expected[r].mul_(decay[:, None]), e, weight_tile)

    def accumulate(self, rows: Tensor, e: Tensor, weight_tile: Tensor) -> None:
        """rows += e @ weight_tile, summed in float32."""
        if self.product_dtype == self.dtype:
            rows.addmm_(e, weight_tile)
        else:
            rows += _matmul(e.to(self.product_dtype), weight_tile)

    @property
    def _wants_slope(self) -> bool:
        return self.options.softcap is not None and self.expected is not None

    @cached_property  # read once the sweep is over
    def target_share(self) -> Tensor:
        """e^(z_y - max); 0 where the target is not in this vocabulary."""
        return (self.target_logits - self.maximum).exp().nan_to_num(0.0)

    @cached_property  # read once the sweep is over
    def log_total(self) -> Tensor:
        """log sum_v e^(z_v - max)."""
        target_is_max = self.target_logits == self.maximum
        return torch.where(
            target_is_max, self.others.log1p(), (self.others + self.target_share).log()
        )

    @property
    def lse(self) -> Tensor:
        return self.maximum + self.log_total

    @property
    def logps(self) -> Tensor:
        # (z_y - max) - log(total) keeps digits that z_y - lse loses where all logits are large.
        return (self.target_logits - self.maximum) - self.log_total

    @property
    def entropy(self) -> Tensor:
        target_logits = (self.target_logits - self.maximum).nan_to_num(0.0, neginf=-1e30)
        weighted = self.weighted + self.target_share * target_logits
        return self.log_total - weighted / (self.others + self.target_share)

    @cached_property  # read once the sweep is over
    def other_share(self) -> Tensor:
        """[n] 1 - p_y, which is known to more digits than p_y."""
        return self.others / (self.others + self.target_share)

    def finish_direction(self, sums: Tensor, divisor: Tensor) -> Tensor:
        """scale * ((1 - p_y) J_y W[y] - sums / divisor), in place of `sums` [n, H].

        NaN where the target is outside the vocabulary, as logps is.
        """
        own = self.options.scale * self.other_share
        if self.options.softcap is not None:
            own = own * softcap_slope(self.target_logits, self.options)
        own = own.where(~self.target_logits.isnan(), torch.nan)
        for r in self.row_slices():
            target_rows = self.weight[self.targets[r].clamp(0, len(self.weight) - 1)]
            rows = sums[r].mul_((-self.options.scale / divisor[r])[:, None])
            rows.addcmul_(target_rows.to(self.dtype), own[r][:, None])
        return sums


class _Gradients:
    """Float32 sums of the gradients that are needed, each cast once."""

    def __init__(self, head: OnlineHead, needs: Sequence[bool]) -> None:
        self.head = head
        weight = head.weight
        full = partial(torch.full, dtype=head.dtype, device=weight.device)
        self.hidden = full(head.hidden.shape, 0.0) if needs[0] else None
        self.weight = weight.new_empty(weight.shape) if needs[1] else None
        self.bias = full((len(weight),), 0.0) if needs[2] else None
        width = min(len(weight), head.tile[1])
        self.tile = full((width, weight.shape[1]), 0.0) if needs[1] else None

    def add(self, dlogits: Tensor, r: slice, start: int, stop: int, weight_tile: Tensor) -> None:
        if self.bias is not None:
            self.bias[start:stop] += dlogits.sum(0)
        dlogits = dlogits.to(weight_tile.dtype)
        if self.hidden is not None:
            self.hidden[r] += _matmul(dlogits, weight_tile)
        if self.tile is not None:
            x = self.head.hidden[r].to(weight_tile.dtype)
            self.tile[: stop - start] += _matmul(dlogits.T, x)

    def store_tile(self, start: int, stop: int) -> None:
        if self.tile is not None:
            self.weight[start:stop] = self.tile[: stop - start]
            self.tile.zero_()


def _sweep(models: list[OnlineHead]) -> None:
    """One pass over the vocabulary for all models; a shared weight's tiles are converted once."""
    policy = models[0]
    for start, stop, weight_tile in policy.weight_tiles():
        for model in models:
            tile = weight_tile
            if model.weight is not policy.weight:
                tile = model.weight[start:stop].to(model.product_dtype)
            for r in model.row_slices():
                model.update(r, start, stop, tile)


def _dlogits(
    logits: Tensor,  # [n, v], overwritten
    grad_logps: Tensor,  # [n]
    grad_entropy: Tensor | None,  # [n]
    lse: Tensor,  # [n]
    entropy: Tensor | None,  # [n]
    local_targets: Tensor,  # [n], relative to the tile
    options: HeadOptions,
) -> Tensor:  # [n, v]
    """g (1[y=v] - p_v) - e p_v (log p_v + entropy), times the transform's derivative."""
    slope = None if options.softcap is None else softcap_slope(logits, options)
    log_p = logits.sub_(lse[:, None])
    p = log_p.exp()
    coefficient = -grad_logps[:, None]
    if grad_entropy is not None:
        coefficient = coefficient - grad_entropy[:, None] * (
            log_p.clamp_min(-1e30) + entropy[:, None]
        )
    dlogits = p.mul_(coefficient)
    index, inside = _target_columns(local_targets, dlogits.shape[1])
    dlogits.scatter_add_(1, index, grad_logps[:, None].where(inside, 0.0))
    if slope is not None:
        dlogits.mul_(slope)
    return dlogits.mul_(options.scale)


def _target_columns(local_targets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[n, 1] columns of the targets in a tile, clamped to it, and whether they lie in it."""
    local = local_targets[:, None]
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def softcap_slope(logits: Tensor, options: HeadOptions) -> Tensor:
    """1 - tanh(x)^2 from the capped logits: tanh(x) = logits * temperature / softcap."""
    return 1.0 - (logits * (options.temperature / options.softcap)) ** 2


def _counted_rows(targets: Tensor, options: HeadOptions) -> Tensor | None:
    """Indices of the rows that count, so that padding and prompts never reach a product."""
    rows = (targets != options.ignore_index).nonzero()[:, 0]
    return None if len(rows) == len(targets) else rows


def _take(values: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return values if values is None or rows is None else values[rows]


def _matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with sums and result in float32 (float64 for float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@contextmanager
def _bf16_matmul_precision() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up at import
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _bf16_products(product_dtype: torch.dtype, hidden: Tensor):
    """On CPUs with bf16 units, float32 copies of bf16 operands are multiplied at bf16 speed.

    The operands hold bf16 values already, so their products stay exact; sums are float32.
    """
    bf16_copies = hidden.dtype == torch.bfloat16 and product_dtype == torch.float32
    if hidden.device.type == "cpu" and bf16_copies and torch.cpu._is_avx512_bf16_supported():
        return _bf16_matmul_precision()
    return nullcontext()
