"""A frozen head as attention, on the CPUs where PyTorch's attention kernel is the fastest way.

With hidden states as queries and the head's rows as keys and values, attention returns
sum_v p_v W_v, which the unit gradient needs, and the log-sum-exp. The kernel (flash attention, its
CPU form) forms both of a whole tile in one parallel region and keeps float32 logits in registers
and cache, from bfloat16 operands too. So there is no pass over logits, and no barrier at which
threads wait between passes while other processes hold the cores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerflow_fast.kernels.config import ceil_div
from powerflow_fast.logprobs.products import is_intel
from powerflow_fast.logprobs.torch_tiles import OnlineHead

ROWS, COLUMNS = 1024, 4096  # of a tile: their mask is what a call holds beside its sums
_KERNELS_ROWS = 64  # that one thread takes at a time; more rows of larger batches


def takes_attention(head: OnlineHead) -> bool:
    """Whether attention computes all that is wanted of `head`, and at more speed."""
    options = head.options
    plain = head.bias is None and options.softcap is None and not options.round_logits
    sums_alone = head.weighted is None and head.column_max is None and head.cache is None
    if not (plain and sums_alone and head.hidden.device.type == "cpu"):
        return False
    if head.hidden.dtype == torch.bfloat16:  # the second product costs little, even if not wanted
        return torch.cpu._is_amx_tile_supported()
    return head.hidden.dtype == torch.float32 and is_intel() and head.expected is not None


class AttentionSweep:
    """Statistics of one or two models over the same weight, tile by tile.

    Targets are left out, as in `OnlineHead`; `finish` hands the result to the models.
    """

    def __init__(self, models: list[OnlineHead]) -> None:
        self.models = models
        policy = models[0]
        self.hidden = torch.cat([head.hidden for head in models])
        self.targets = torch.cat([head.targets for head in models])
        self.scale = policy.options.scale
        rows = len(self.hidden)
        self.lse = torch.full((rows,), -torch.inf)
        self.mean = policy.expected  # [n, H] of the policy's rows alone, which come first
        size = (min(ROWS, rows), min(COLUMNS, len(policy.weight)))
        self.mask = torch.zeros(size, dtype=self.hidden.dtype)

    def update(self, start: int, stop: int, weight_tile: Tensor) -> None:
        """Take columns start:stop of the vocabulary into the statistics."""
        for first in range(0, len(self.hidden), ROWS):
            r = slice(first, min(first + ROWS, len(self.hidden)))
            mask = self.mask[: r.stop - r.start, : stop - start]
            targets = self.targets[r] - start
            rows = ((targets >= 0) & (targets < stop - start)).nonzero()[:, 0]
            places = (rows, targets[rows])  # scatter_ would copy a whole mask of bfloat16
            mask[places] = -torch.inf
            means, lse = _attention(self.hidden[r], weight_tile, mask, self.scale)
            mask[places] = 0.0
            self._add(r, means, lse)

    def _add(self, r: slice, means: Tensor, lse: Tensor) -> None:
        """Parts of the vocabulary: sum_v p_v W_v [parts, n, H] of rows r, log-sum-exp [parts, n]."""
        before = self.lse[r]
        total = torch.cat([before[None], lse]).logsumexp(0)
        if self.mean is not None and r.start < len(self.mean):
            sums = self.mean[r]
            n = len(sums)
            finite = total[:n].where(total[:n] != -torch.inf, 0.0)
            sums.mul_((before[:n] - finite).exp()[:, None])
            for mean, share in zip(means, (lse[:, :n] - finite).exp(), strict=True):
                sums.addcmul_(mean[:n].to(sums.dtype), share[:, None])
        self.lse[r] = total

    def finish(self) -> None:
        sizes = [len(head.hidden) for head in self.models]
        for head, lse in zip(self.models, self.lse.split(sizes), strict=True):
            head.maximum = torch.maximum(head.maximum, lse)
            finite = head.maximum.where(head.maximum != -torch.inf, 0.0)
            head.others = (lse - finite).exp()
        if self.mean is not None:
            self.mean.mul_(self.models[0].others[:, None])


def _attention(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [v, H]
    mask: Tensor,  # [n, v] added to the logits
    scale: float,
) -> tuple[Tensor, Tensor]:
    """sum_v p_v W_v [parts, n, H] and log-sum-exp [parts, n] of equal parts of the columns.

    As many parts as it takes for every thread to have work.
    """
    n, v = mask.shape
    parts = ceil_div(torch.get_num_threads(), ceil_div(n, _KERNELS_ROWS))
    parts = parts if v % parts == 0 else 1
    query = hidden.expand(parts, 1, n, -1)
    key = weight.view(parts, 1, v // parts, -1)
    mask = mask.view(n, parts, 1, v // parts).permute(1, 2, 0, 3)
    mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, key, 0.0, False, attn_mask=mask, scale=scale
    )
    return mean[:, 0], lse[:, 0]
