"""A frozen head as attention, on the CPUs where PyTorch's attention kernel serves it well.

With hidden states as queries and the head's rows as keys and values, attention returns
sum_v p_v W_v, which the unit gradient needs, and the log-sum-exp. The kernel (flash attention, its
CPU form) makes one parallel region of it, so there is no barrier after each pass over logits at
which threads wait while other processes hold the cores. It gives bfloat16 operands float32 logits.
In float32, plain products are faster; there the kernel's log-sum-exp is the fewest passes, and the
softmax takes the place of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerflow_fast.kernels.config import ceil_div
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.products import is_intel
from powerflow_fast.logprobs.torch_tiles import OnlineHead, TiledHead, exp_

# Rows and columns of a call: the larger they are, the fewer parallel regions there are to wait for.
TILES = {torch.bfloat16: (1024, 4096), torch.float32: (512, 8192)}
_KERNELS_ROWS = 64  # that one thread takes at a time; more of larger batches


def takes_attention(head: OnlineHead) -> bool:
    """Whether this module computes all that is wanted of `head`, and at more speed."""
    options = head.options
    plain = head.bias is None and options.softcap is None and head.hidden.device.type == "cpu"
    others = (head.weighted, head.column_max, head.cache)
    if not plain or any(wanted is not None for wanted in others):
        return False
    if options.round_logits:
        alone = head.rounds_in_product and head.expected is None and options.scale == 1.0
        return alone and is_intel()
    if head.hidden.dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported()
    return head.hidden.dtype == torch.float32 and is_intel()


def attention_sweeps(heads: list[OnlineHead]) -> list[AttentionSweep]:
    """Models that share a weight go together: their products have more rows to share out."""
    if heads and all(head.weight is heads[0].weight for head in heads):
        return [AttentionSweep(heads)]
    return [AttentionSweep([head]) for head in heads]


class AttentionSweep:
    """Statistics of one or two models over the same weight, tile by tile.

    Targets are left out, as in `OnlineHead`; `finish` hands the result to the models.
    """

    def __init__(self, heads: list[OnlineHead]) -> None:
        self.heads = heads
        hidden = torch.cat([head.hidden for head in heads])
        targets = torch.cat([head.targets for head in heads])
        self.rows = TiledHead(Head(hidden, heads[0].weight, None), targets, heads[0].options)
        self.lse = torch.full((len(hidden),), -torch.inf)
        # [n, H] sum_v p_v W_v of the first model's rows, or of none.
        self.mean = hidden[:0] if heads[0].expected is None else heads[0].expected
        rounded = heads[0].options.round_logits
        self.forms_logits = rounded or hidden.dtype == torch.float32
        self.step = heads[0].tile[0]
        size = (min(self.step, len(hidden)), min(heads[0].tile[1], len(heads[0].weight)))
        # Added to the logits that the kernel forms.
        self.mask = hidden.new_zeros((0, 0) if self.forms_logits else size)

    def update(self, start: int, stop: int, weight_tile: Tensor) -> None:
        """Take columns start:stop of the vocabulary into the statistics."""
        for first in range(0, len(self.lse), self.step):
            r = slice(first, min(first + self.step, len(self.lse)))
            targets = self.rows.targets[r] - start
            inside = ((targets >= 0) & (targets < stop - start)).nonzero()[:, 0]
            places = (inside, targets[inside])  # scatter_ would copy a whole tile of bfloat16
            if stop - start == 1:  # of a row without any logit the kernel says lse 0
                z = self.rows.logits(r, self.rows.factor(weight_tile))
                z[places] = -torch.inf
                self._add(r, z[:, 0], weight_tile.expand(len(z), -1))
                continue
            update = self._from_logits if self.forms_logits else self._from_kernel
            update(r, weight_tile, places)

    def _from_kernel(self, r: slice, weight_tile: Tensor, places: tuple[Tensor, Tensor]) -> None:
        mask = self.mask[: r.stop - r.start, : len(weight_tile)]
        mask[places] = -torch.inf
        scale = self.rows.options.scale
        means, lses = _attention(self.rows.hidden[r], weight_tile, mask, scale)
        mask[places] = 0.0
        for mean, lse in zip(means, lses, strict=True):
            self._add(r, lse, mean)

    def _from_logits(self, r: slice, weight_tile: Tensor, places: tuple[Tensor, Tensor]) -> None:
        rounded = self.rows.options.round_logits
        z = (self.rows.rounded_logits if rounded else self.rows.logits)(r, weight_tile)
        z[places] = -torch.inf
        queries, keys = (z.new_zeros(size, 1) for size in z.shape)  # the logits are their mask
        lse = _attention(queries, keys, z)[1].logsumexp(0)
        n, mean = len(self.mean[r]), weight_tile[:0]
        if n:
            mean = exp_(z[:n].sub_(lse[:n, None])) @ weight_tile
        self._add(r, lse, mean)

    def _add(self, r: slice, lse: Tensor, mean: Tensor) -> None:
        """A part of the vocabulary: log-sum-exp [n] of rows r, and sum_v p_v W_v [n, H] of it."""
        total = torch.logaddexp(self.lse[r], lse)
        self.lse[r] = total
        sums = self.mean[r]
        if n := len(sums):
            share = (lse - total.where(total != -torch.inf, 0.0)).exp()
            sums.lerp_(mean[:n].to(sums.dtype), share[:n, None])

    def finish(self) -> None:
        sizes = [len(head.hidden) for head in self.heads]
        for head, lse in zip(self.heads, self.lse.split(sizes), strict=True):
            head.maximum = torch.maximum(head.maximum, lse)
            finite = head.maximum.where(head.maximum != -torch.inf, 0.0)
            head.others = (lse - finite).exp()
        if len(self.mean):
            self.mean.mul_(self.heads[0].others[:, None])


def _attention(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [v, H]
    mask: Tensor,  # [n, v] added to the logits
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """sum_v p_v W_v [parts, n, H] and log-sum-exp [parts, n] of equal parts of the columns.

    As many parts as it takes for every thread to have work.
    """
    n, v = mask.shape
    parts = ceil_div(torch.get_num_threads(), ceil_div(n, _KERNELS_ROWS))
    parts = parts if v % parts == 0 and v > parts else 1
    query = hidden.expand(parts, 1, n, -1)
    key = weight.reshape(parts, 1, v // parts, -1)
    mask = mask.view(n, parts, 1, v // parts).permute(1, 2, 0, 3)
    mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, key, 0.0, False, attn_mask=mask, scale=scale
    )
    return mean[:, 0], lse[:, 0]
