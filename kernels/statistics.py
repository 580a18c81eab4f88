"""Softmax statistics of the logits, tile by tile, for the policy and the reference in one launch.

The eager code it replaces, with z the logits of `HeadOptions` in units of log 2:

    e = exp2(z_tile - shift), 0 at the target
    total = e.sum(1)                                                          # [N], each tile
    weighted_sum = (e * (z_tile - shift)).sum(1)                              # if entropy is wanted
    target_logit = logits.gather(1, targets)
    exp_logits = e * softcap_slope                                            # if it is given
    column_max = (z_block - lse_estimate).amax(0), without targets            # if it is given

The shift is an integer, so a change of shift multiplies by a power of two: exact. The target is
left out, as a sum with it would lose the digits of 1 - p: `combine` adds it.

* bfloat16 and float32 have 8 bits of exponent. Their rows have one shift each, which is known
  before the pass (row_shift.py) and may be off by 100 powers of two.
* float16 has 5. A row has a shift for each part of a tile: ceil(z_part.amax(1)).

Every vocabulary tile is a unit of its own: few tokens still fill the chip, and nothing is carried
from tile to tile, which at this tile size would spill registers. A program takes one tile, or, with
a persistent tile shape, every so many-th.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from powerflow_fast.kernels.active_blocks import ActiveBlocks, active_blocks
from powerflow_fast.kernels.config import (
    GROUP,
    Config,
    Tile,
    ceil_div,
    num_processors,
    persistent,
    stored_exponent,
)
from powerflow_fast.kernels.operands import Head
from powerflow_fast.kernels.statistics_kernel import statistics_kernel
from powerflow_fast.kernels.tiles import can_describe, describe, logit_form, rounding, strides_of


class Heads(NamedTuple):
    """What a pass over the vocabulary computes with."""

    policy: Head
    reference: Head | None  # of the policy's shapes and types
    targets: torch.Tensor  # [N] contiguous
    options: Any  # HeadOptions
    config: Config

    @property
    def tile(self) -> Tile:
        return self.config.statistics

    @property
    def models(self) -> int:
        return 1 if self.reference is None else 2

    @property
    def num_v(self) -> int:
        return len(self.policy.weight)

    def of_rows(self, rows: slice | torch.Tensor) -> Heads:
        models = (m and m._replace(hidden=m.hidden[rows]) for m in self[:2])
        return Heads(*models, self.targets[rows], *self[3:])

    def persistent(self) -> Heads:
        """For launches whose tiles are few, or mostly find no work."""
        return self._replace(config=persistent(self.config))

    def active_blocks(self, chunk_rows: int | None = None) -> ActiveBlocks:
        return active_blocks(self.targets, self.options.ignore_index, self.tile.rows, chunk_rows)


class Statistics(NamedTuple):
    """What the kernel leaves for `combine`; a row is one token of one model.

    A row with one shift has one number a tile, a row with a shift for each part one number a part.
    Nothing is written for a block in which no row counts.
    """

    row_shift: torch.Tensor | None  # [rows]
    tile_shift: torch.Tensor | None  # [parts, rows], if there is no row_shift
    tile_total: torch.Tensor | None  # [tiles or parts, rows], targets left out
    tile_weighted_sum: torch.Tensor | None  # likewise
    target_logit: torch.Tensor | None  # [rows], NaN where the target is outside the vocabulary


class Search(NamedTuple):
    """What the certified route's pass over the vocabulary needs to find candidate columns."""

    lse_estimate: torch.Tensor  # [N] rough log-sum-exp
    # [row blocks, V] float16 to be filled: largest log2 p by the estimate. -inf to begin with, as
    # blocks in which no row counts are passed by.
    column_max: torch.Tensor

    def of_rows(self, rows: slice, block: int) -> Search:
        """`rows` starts at a multiple of `block`."""
        blocks = slice(rows.start // block, ceil_div(rows.stop, block))
        return Search(self.lse_estimate[rows], self.column_max[blocks])


def has_row_shift(dtype: torch.dtype) -> bool:
    """Whether the type's exponent holds exp-logits of a shift that is far off."""
    return dtype != torch.float16


def padded_columns(num_v: int, tile: Tile) -> int:
    """Columns of the buffer of exp-logits: every tile is stored whole."""
    return ceil_div(num_v, tile.columns) * tile.columns


def raise_to_maxima(
    highest: torch.Tensor,  # [models * N] to be raised
    heads: Heads,
    active: ActiveBlocks,
    wanted: torch.Tensor | None = None,  # [models * N] int32: rows with a 0 stay; None: all wanted
) -> None:
    """Each row's number to ceil of its largest logit, in units of log 2, if that is larger.

    By persistent programs: their tiles are few, of pilot columns or of rows that are done again.
    """
    _launch(heads.persistent(), active, highest=highest, wanted=wanted)


def logit_statistics(
    heads: Heads,
    active: ActiveBlocks,
    row_shift: torch.Tensor | None = None,  # [models * N] integers; None: each part has its own
    exp_logits: torch.Tensor | None = None,  # [N, padded_columns] to be filled
    search: Search | None = None,  # whose column maxima [row blocks, V] are to be filled
    out: Statistics | None = None,  # to be filled
) -> Statistics:
    """One launch over both models."""
    if out is None:
        rows, tiles = len(heads.targets) * heads.models, ceil_div(heads.num_v, heads.tile.columns)
        parts = tiles * heads.tile.parts if row_shift is None else tiles
        total = heads.targets.new_empty((parts, rows), dtype=torch.float32)
        out = Statistics(
            row_shift,
            torch.empty_like(total) if row_shift is None else None,
            total,
            torch.empty_like(total) if heads.options.entropy else None,
            # No program owns an out-of-range target: its row stays NaN, never a plausible number.
            total.new_full((rows,), float("nan")),
        )
    _launch(heads, active, out=out, exp_logits=exp_logits, search=search)
    return out


def _launch(
    heads: Heads,
    active: ActiveBlocks,
    *,
    highest: torch.Tensor | None = None,
    wanted: torch.Tensor | None = None,
    out: Statistics = Statistics(None, None, None, None, None),  # noqa: B008
    exp_logits: torch.Tensor | None = None,
    search: Search | None = None,
) -> None:
    policy, reference, targets, options, config = heads
    tile, use_tma = heads.tile, config.tma
    hidden, weight, _ = policy
    ref_hidden, ref_weight, ref_bias = reference or policy
    (num_n, num_h), num_v = hidden.shape, heads.num_v
    use_tma = use_tma and all(map(can_describe, (hidden, weight, ref_hidden, ref_weight)))
    store_tma = use_tma and exp_logits is not None and can_describe(exp_logits)
    programs = ceil_div(num_n, tile.rows) * heads.models * ceil_div(num_v, tile.columns)
    if tile.persistent:
        programs = min(programs, num_processors(hidden.device))
    with torch.cuda.device_of(hidden):
        statistics_kernel[(programs,)](
            hidden=describe(hidden, tile.rows, tile.depth, use_tma),
            weight=describe(weight, tile.columns, tile.depth, use_tma),
            bias_ptr=policy.bias,
            strides=strides_of(hidden, weight),
            ref_hidden=describe(ref_hidden, tile.rows, tile.depth, use_tma),
            ref_weight=describe(ref_weight, tile.columns, tile.depth, use_tma),
            ref_bias_ptr=ref_bias,
            ref_strides=strides_of(ref_hidden, ref_weight),
            targets_ptr=targets,
            active=active,
            highest_ptr=highest,
            wanted_ptr=wanted,
            out=out,
            exp_logits=describe(exp_logits, tile.rows, tile.part, store_tma),
            stride_en=0 if exp_logits is None else exp_logits.stride(0),
            search=search,
            num_n=num_n,
            num_v=num_v,
            num_h=num_h,
            form=logit_form(options),
            ignore_index=options.ignore_index,
            MODELS=heads.models,
            USE_TMA=use_tma,
            ROUND_TO=rounding(options, hidden.dtype),
            STORED_EXPONENT=stored_exponent(hidden.dtype),
            STORE_TMA=store_tma,
            GROUP=GROUP,
            PERSISTENT=tile.persistent,
            **tile.constants,
            **tile.launch_options,
        )
