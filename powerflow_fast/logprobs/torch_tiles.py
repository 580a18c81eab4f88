"""One model's head in PyTorch, tile by tile: logits, running softmax statistics, unit gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property, partial

import torch
from torch import Tensor

from powerflow_fast.kernels.config import ceil_div, stored_exponent
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.products import (
    add_product_,
    has_bf16_units,
    is_intel,
    matmul,
    uses_onednn,
)
from powerflow_fast.logprobs.softmax_cache import SoftmaxCache

# Tiles of [rows, vocabulary] logits. On a CPU they live in the last-level cache, and with their
# slice of the weight they are the whole working set; a GPU needs larger ones to fill its
# multiprocessors.
_CPU_TILE = (512, 2048)
_GPU_TILE = (4096, 8192)
# Products that a CPU's bf16 units round take more columns at a time; the passes over their logits,
# which are float32, as many numbers as the cores' own caches hold.
ROUNDED_TILES = ((256, 16384), (512, 8192))  # of a batch that fits the first, and of larger ones
_ROUNDED_PASS = 1 << 19
# Cached exp-logits relative to the largest of their tile, and tiles relative to their row, are 0
# below these. The first is far below a rounding of the tile. A tile is as far below its row as the
# target is confident, up to 50 nats. Together with a gradient they stay clear of subnormal numbers,
# see `exp_`.
_SMALLEST_EXP = 2.0**-40
_SMALLEST_FACTOR = 2.0**-76
_LARGEST_RISE = 50.0  # nats
LOG2E = math.log2(math.e)
# Rows that share one choice of columns on the certified route. 64 keep about half of what 128 keep,
# and cost least of 32, 64 and 128 on two CPU cores.
BLOCK = 64


class ColumnMax:
    """[blocks, V] largest z_v - max over a block's rows, targets left out: bounds log p_v."""

    def __init__(self, rows: int, weight: Tensor) -> None:
        shape = (num_blocks(rows), len(weight))
        self.values = torch.full(shape, -torch.inf, dtype=torch.float16, device=weight.device)

    def update(self, z: Tensor, first_row: int, start: int, stop: int) -> None:
        """Note columns start:stop of the rows from `first_row` (a multiple of BLOCK); z - max."""
        first, whole = first_row // BLOCK, len(z) // BLOCK
        blocks = z[: whole * BLOCK].view(whole, BLOCK, z.shape[1])
        self.values[first : first + whole, start:stop] = blocks.amax(1)
        if whole * BLOCK < len(z):  # the batch's last rows
            self.values[first + whole, start:stop] = z[whole * BLOCK :].amax(0)


def num_blocks(rows: int) -> int:
    return ceil_div(rows, BLOCK)


def exact_sparsity(rows: int, block: int, like: Tensor) -> Tensor:
    """The SparsityReport [3] of a gradient over the whole vocabulary for every block of rows."""
    report = like.new_zeros(3)
    # fill_ takes the number along; an assignment would copy it from the host, which waits.
    report[:1].fill_(1.0)
    report[2:].fill_(ceil_div(rows, block))
    return report


class TiledHead:
    """One model's head over the counted rows: its logits, tile by tile."""

    def __init__(self, head: Head, targets: Tensor, options: HeadOptions) -> None:
        self.hidden, self.weight, self.bias = hidden, _, bias = head
        self.targets, self.options = targets, options  # targets [n]
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Products of bf16 with float32 results exist on CUDA; elsewhere float32 copies are
        # multiplied.
        native = hidden.is_cuda and hidden.dtype == torch.bfloat16
        self.product_dtype = hidden.dtype if native else self.dtype
        # A CPU's bf16 units round what they multiply: fast, and here what was asked for.
        fast = hidden.dtype == torch.bfloat16 and has_bf16_units(hidden.device)
        self.rounds_in_product = options.round_logits and bias is None and fast
        self.tile = tile_shape(hidden.device)
        self.buffer = torch.empty(0, dtype=self.dtype, device=hidden.device)
        self.rounded = hidden.new_empty(0)

    def of_rows(self, r: slice) -> TiledHead:
        """The same head over some of the rows."""
        head = Head(self.hidden[r], self.weight, self.bias)
        return TiledHead(head, self.targets[r], self.options)

    def row_slices(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        stop = len(self.hidden) if stop is None else stop
        for first in range(start, stop, self.tile[0]):
            yield slice(first, min(first + self.tile[0], stop))

    def weight_tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, weight[start:stop]) with the tile in the product's type.

        A tile that had to be converted is overwritten by the next.
        """
        converted: Tensor | None = None
        for start in range(0, len(self.weight), self.tile[1]):
            tile = self.weight[start : start + self.tile[1]]
            if tile.dtype != self.product_dtype:
                if converted is None:
                    converted = torch.empty_like(tile, dtype=self.product_dtype)
                tile = converted[: len(tile)].copy_(tile.to(self.hidden.dtype))
            elif tile.dtype != self.hidden.dtype:
                tile = self.factor(tile)
            yield start, start + len(tile), tile

    def factor(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of the weight in `dtype`, or the product's, with no more digits than hidden has."""
        return rows.to(self.hidden.dtype).to(dtype or self.product_dtype)

    def logits(self, r: slice, weight_tile: Tensor, bias_tile: Tensor | None = None) -> Tensor:
        """Logits of rows r and the tile's columns; the next call may overwrite them."""
        if self.rounds_in_product:
            return self._scale(self.rounded_logits(r, weight_tile).to(self.dtype))
        x = self.hidden[r].to(self.product_dtype)
        out = None if uses_onednn(x) else self.scratch(len(x), len(weight_tile))
        return self._transform(matmul(x, weight_tile.T, out), bias_tile)

    def rounded_logits(self, r: slice, weight_tile: Tensor) -> Tensor:
        """Unscaled logits in the type of hidden; the next call overwrites them."""
        x, w = self.hidden[r], weight_tile.to(self.hidden.dtype)
        return torch.mm(x, w.T, out=_room_in(self.rounded, len(x), len(w)))

    def scratch(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of a buffer that the next call overwrites."""
        return _room_in(self.buffer, rows, columns)

    def bias_tile(self, start: int, stop: int) -> Tensor | None:
        return None if self.bias is None else self.bias[start:stop]

    def _transform(self, z: Tensor, bias: Tensor | None) -> Tensor:
        """Products to logits, in place."""
        if bias is not None:
            z += bias.to(self.dtype)
        if self.options.round_logits:
            z.copy_(z.to(self.hidden.dtype))
        return self._scale(z)

    def _scale(self, z: Tensor) -> Tensor:
        options = self.options
        if options.softcap is not None:
            z.mul_(options.logit_scale / options.softcap).tanh_()
            z.mul_(options.softcap / options.temperature)
        elif options.scale != 1.0:
            z.mul_(options.scale)
        return z

    def accumulate(self, rows: Tensor, e: Tensor, weight_tile: Tensor) -> None:
        """rows += e @ weight_tile, summed in float32."""
        e = e.to(self.product_dtype)
        if self.product_dtype == self.dtype or e.is_cuda:
            add_product_(rows, e, weight_tile)
        else:
            rows += torch.mm(e, weight_tile)


class OnlineHead(TiledHead):
    """A head with the running softmax statistics of a sweep over its vocabulary."""

    def __init__(self, head: Head, targets: Tensor, options: HeadOptions) -> None:
        super().__init__(head, targets, options)
        n = len(self.hidden)
        zeros = partial(torch.zeros, dtype=self.dtype, device=self.hidden.device)
        self.target_logits = self._target_logits()
        # Sums leave the target out: where it has nearly all the mass, log(1 + others) and
        # 1 - p_y = others / total keep the digits that a sum with it would round away.
        self.maximum = self.target_logits.where(~self.target_logits.isnan(), -torch.inf)
        self.others = zeros(n)  # sum_v e^(z_v - max)
        self.weighted = zeros(n) if self.options.entropy else None  # times (z_v - max)
        self.expected: Tensor | None = None  # [n, H] sum_v e^(z_v - max) J_v W_v
        self.column_max: ColumnMax | None = None  # where the columns that matter are to be found
        self.cache: SoftmaxCache | None = None  # to be filled

    @property
    def rounds_tiles(self) -> bool:
        """Whether the sweep's products take and give the type of hidden, a wide tile at a time."""
        return self.rounds_in_product and self.cache is None and self.column_max is None

    def take_tiles(self, tile: tuple[int, int]) -> None:
        """Have the sweep take tiles of this size, in the type of hidden."""
        self.product_dtype, self.tile = self.hidden.dtype, tile

    def collect_expected(self) -> None:
        """Have the sweep collect the sum that the unit gradient over the whole vocabulary needs."""
        self.expected = torch.zeros(self.hidden.shape, dtype=self.dtype, device=self.hidden.device)

    def _target_logits(self) -> Tensor:
        """[n] logits of the targets; NaN where the target is outside the vocabulary."""
        inside = (self.targets >= 0) & (self.targets < len(self.weight))
        index = self.targets.where(inside, 0)
        z = torch.empty(len(index), dtype=self.dtype, device=index.device)
        for r in self.row_slices():
            rows = self.factor(self.weight[index[r]], self.dtype)
            z[r] = rows.mul_(self.hidden[r]).sum(1)
        z = self._transform(z, None if self.bias is None else self.bias[index])
        return z.where(inside, torch.nan)

    def update(self, r: slice, start: int, stop: int, weight_tile: Tensor) -> None:
        """Take columns start:stop into the running statistics of rows r."""
        if not self.rounds_tiles:
            z = self.logits(r, weight_tile, self.bias_tile(start, stop))
            e, decay = self._take_in(z, r, start, stop)
        else:
            e, decay = self.rounded_logits(r, weight_tile), self.maximum[r].clone()
            step = max(1, _ROUNDED_PASS // e.shape[1])
            for first in range(0, len(e), step):
                rows = slice(first, min(first + step, len(e)))
                z = self._scale(self.scratch(*e[rows].shape).copy_(e[rows]))
                at = slice(r.start + rows.start, r.start + rows.stop)
                taken, decay[rows] = self._take_in(z, at, start, stop)
                if self.expected is not None:
                    e[rows] = taken
        if self.expected is not None:
            self.accumulate(self.expected[r].mul_(decay[:, None]), e, weight_tile)

    def _take_in(self, z: Tensor, r: slice, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Logits of rows r and columns start:stop, overwritten, into the statistics.

        Returns e^(z - max), times the softcap's slope, and the factor on sums of earlier columns.
        """
        slope = softcap_slope(z, self.options) if self._wants_slope else None
        drop_targets(z, self.targets[r] - start, None)
        tile_maximum = z.amax(1)
        maximum = torch.maximum(self.maximum[r], tile_maximum)
        # A row of nothing but -inf keeps exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
        finite = maximum.where(maximum != -torch.inf, 0.0)
        shift = self.maximum[r] - finite
        decay = shift.exp()
        z.sub_(finite[:, None])
        if self.column_max is not None:
            self.column_max.update(z, r.start, start, stop)
        e = exp_(z if self.weighted is None else z.clone())
        if self.weighted is not None:
            # exp underflows to 0 long before z reaches -inf, whose product with 0 would be NaN.
            moved = self.weighted[r] + self.others[r] * shift.clamp_min(-1e30)
            self.weighted[r] = moved * decay + (e * z.clamp_min_(-1e30)).sum(1)
        self.others[r] = self.others[r] * decay + e.sum(1)
        self.maximum[r] = maximum
        if slope is not None:
            e.mul_(slope)
        if self.cache is not None:
            self._fill_cache(e, finite - tile_maximum, r, start, stop)
        return e, decay

    @property
    def _wants_slope(self) -> bool:
        wanted = self.expected is not None or self.cache is not None
        return self.options.softcap is not None and wanted

    def _fill_cache(self, e: Tensor, below: Tensor, r: slice, start: int, stop: int) -> None:
        """Store exp-logits of rows r, relative to their tile's largest; `e` is overwritten.

        The tile's largest lies `below` [nats] the running maximum, to which `e` is relative. Beside
        a confident target, exp-logits relative to the maximum would have no place in a 16-bit type.
        """
        exp_logits, factors, _ = self.cache
        r = slice(r.start, min(r.stop, self.cache.rows))
        if r.start >= r.stop:
            return
        n = r.stop - r.start
        up = below[:n].clamp(0.0, _LARGEST_RISE)
        e = e[:n].mul_(up.exp()[:, None])
        exponent = stored_exponent(exp_logits.dtype)
        e = torch.threshold_(e, _SMALLEST_EXP, 0.0)
        exp_logits[r, start:stop] = e.mul_(2.0**exponent) if exponent else e
        factors[start // self.tile[1], r] = self.maximum[r] - up

    def finish_cache(self) -> None:
        """Once the sweep is over: shifts to factors, and the targets' 1 - p."""
        exp_logits, factors, one_minus_p = self.cache
        n = min(self.cache.rows, len(self.hidden))
        p = factors[:, :n].sub_(self.maximum[:n]).sub_(self.log_total[:n]).exp_()
        torch.threshold_(p, _SMALLEST_FACTOR, 0.0).mul_(2.0 ** -stored_exponent(exp_logits.dtype))
        one_minus_p[:n] = self.target_derivative[:n]

    @cached_property  # read once the sweep is over
    def target_exp(self) -> Tensor:
        """[n] e^(z_y - max); 0 where the target is not in this vocabulary."""
        return (self.target_logits - self.maximum).exp().nan_to_num(0.0)

    @cached_property  # read once the sweep is over
    def total(self) -> Tensor:
        """[n] sum_v e^(z_v - max)."""
        return self.others + self.target_exp

    @cached_property  # read once the sweep is over
    def log_total(self) -> Tensor:
        target_is_max = self.target_logits == self.maximum
        return torch.where(target_is_max, self.others.log1p(), self.total.log())

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
        weighted = self.weighted + self.target_exp * target_logits
        return self.log_total - weighted / self.total

    @cached_property  # read once the sweep is over
    def one_minus_p(self) -> Tensor:
        """[n] 1 - p_y, which is known to more digits than p_y."""
        return self.others / self.total

    @property
    def target_derivative(self) -> Tensor:
        """[n] (1 - p_y) J_y."""
        if self.options.softcap is None:
            return self.one_minus_p
        return self.one_minus_p * softcap_slope(self.target_logits, self.options)

    def finish_unit_gradient(self, sums: Tensor, divisor: Tensor) -> Tensor:
        """scale * ((1 - p_y) J_y W[y] - sums / divisor), in place of `sums` [n, H].

        NaN where the target is outside the vocabulary, as logps is.
        """
        at_target = self.options.scale * self.target_derivative
        at_target = at_target.where(~self.target_logits.isnan(), torch.nan)
        for r in self.row_slices():
            target_rows = self.weight[self.targets[r].clamp(0, len(self.weight) - 1)]
            rows = sums[r].mul_((-self.options.scale / divisor[r])[:, None])
            rows.addcmul_(self.factor(target_rows, self.dtype), at_target[r][:, None])
        return sums


def _room_in(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] of the buffer [any], which grows to hold them."""
    size = rows * columns
    if len(buffer) < size:
        buffer.resize_(size)
    return buffer[:size].view(rows, columns)


def tile_shape(device: torch.device) -> tuple[int, int]:
    return _GPU_TILE if device.type == "cuda" else _CPU_TILE


def exp_(z: Tensor) -> Tensor:
    """e^z in place; 0 where it would be subnormal.

    Such numbers are below any rounding of a softmax, and CPUs multiply them many times slower.
    """
    smallest = math.log(torch.finfo(z.dtype).tiny)
    torch.threshold_(z, smallest, -torch.inf)
    # MKL computes exp, on other makers' CPUs at a quarter of the speed of exp2.
    return z.exp_() if z.device.type == "cpu" and is_intel() else z.mul_(LOG2E).exp2_()


def drop_targets(z: Tensor, targets: Tensor, columns: Tensor | None) -> None:
    """Set the logits of the targets to -inf, in place; arguments as in `target_columns`."""
    index, inside = target_columns(targets, columns, z.shape[1])
    z.scatter_(1, index, z.gather(1, index).masked_fill_(inside, -torch.inf))


def target_columns(
    targets: Tensor,  # [n] counted from the tile's first column
    columns: Tensor | None,  # ascending, the columns in use; None: all of the tile
    width: int,  # of the tile
) -> tuple[Tensor, Tensor]:
    """[n, 1] places of the targets among the columns, clamped, and whether they are there."""
    if columns is None:
        place = targets.clamp(0, width - 1)
        there = targets == place
    elif len(columns):
        place = torch.searchsorted(columns, targets).clamp_max(len(columns) - 1)
        there = columns[place] == targets
    else:
        place, there = targets[:0], targets[:0] < 0
    return place[:, None], there[:, None]


def softcap_slope(logits: Tensor, options: HeadOptions) -> Tensor:
    """1 - tanh(x)^2 from the capped logits: tanh(x) = logits * temperature / softcap."""
    return 1.0 - (logits * (options.temperature / options.softcap)) ** 2
