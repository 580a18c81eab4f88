"""One shift for every row, known before the pass over the vocabulary.

The eager code it replaces, with z the logits in units of log 2:

    shift = ceil(z[:, pilot].amax(1))                                         # [N]
    shift = where(total within bounds, shift, ceil(z.amax(1)))

The pilot columns lie evenly over the vocabulary; they cost PILOT / V of a product. A shift may be
off by 100 powers of two before a float32 total of exp2(z - shift) is out of range: only exponents
differ, no digit does. Rows that are further off are done again with their true maximum, by programs
that mostly find, on the device, that there is nothing to do: no host waits. A block of rows is done
as a whole; those that were right get the same numbers again.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from powerflow_fast.kernels.active_blocks import ActiveBlocks
from powerflow_fast.kernels.combine import Misled, Rows, combine
from powerflow_fast.kernels.config import Tile
from powerflow_fast.kernels.statistics import Statistics, logit_statistics, raise_to_maxima
from powerflow_fast.kernels.tiles import Operands

PILOT = 256  # columns


def pilot_shift(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    active: ActiveBlocks,
    options,
    tile: Tile,
    use_tma: bool,
) -> torch.Tensor:
    """-> [models, N], -inf in blocks that are not active."""
    models = _pilot(policy), None if reference is None else _pilot(reference)
    shape = (1 + (reference is not None), len(targets))
    shift = torch.full(shape, float("-inf"), dtype=torch.float32, device=targets.device)
    raise_to_maxima(shift, *models, targets, active, options, tile, use_tma)
    return shift


def _pilot(model: Operands) -> Operands:
    """Of the same hidden states, with the pilot columns alone; a view of the weight."""
    step = max(1, len(model.weight) // PILOT)
    columns = slice(0, PILOT * step, step)
    bias = None if model.bias is None else model.bias[columns].contiguous()
    return model._replace(weight=model.weight[columns], bias=bias)


def redo_misled(
    policy: Operands,
    reference: Operands | None,
    targets: torch.Tensor,  # [N] contiguous
    misled: Misled,  # as `combine` left it
    statistics: Statistics,  # as all that follows, written again where rows were misled
    rows: Rows,
    logps: torch.Tensor,  # [models, N]
    lse: torch.Tensor,  # [models, N]
    entropy: torch.Tensor | None,  # [models, N]
    soft: torch.Tensor | None,  # [N, padded_columns]
    search,
    options,
    tile: Tile,
    use_tma: bool,
) -> None:
    models, blocks = (policy, reference, targets), ActiveBlocks(misled.blocks, misled.count)
    raise_to_maxima(misled.shift, *models, blocks, options, tile, use_tma, misled.rows)
    statistics = statistics._replace(row_shift=misled.shift)
    few = replace(tile, persistent=True)  # as many programs as run at once: most find no work
    how = (options, few, use_tma, search)
    logit_statistics(*models, soft, *how, misled.shift, blocks, statistics)
    results, num_v = (logps, lse, entropy), len(policy.weight)
    combine(statistics, targets, num_v, options.ignore_index, *results, misled, True, rows)
