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

import torch

from powerflow_fast.kernels.active_blocks import ActiveBlocks
from powerflow_fast.kernels.combine import Misled, Results, Rows, combine, new_misled
from powerflow_fast.kernels.operands import Head
from powerflow_fast.kernels.statistics import (
    Heads,
    Search,
    Statistics,
    logit_statistics,
    raise_to_maxima,
)

PILOT = 256  # columns


def pilot_shift(heads: Heads, active: ActiveBlocks) -> torch.Tensor:
    """-> [models, N], -inf in blocks that are not active."""
    models = (m and _pilot(m) for m in heads[:2])
    shift = heads.targets.new_full(
        (heads.models, len(heads.targets)), float("-inf"), dtype=torch.float32
    )
    raise_to_maxima(shift, Heads(*models, *heads[2:]), active)
    return shift


def _pilot(model: Head) -> Head:
    """The same head with the pilot columns alone, a view of the weight."""
    step = max(1, len(model.weight) // PILOT)
    columns = slice(0, PILOT * step, step)
    bias = None if model.bias is None else model.bias[columns].contiguous()
    return model._replace(weight=model.weight[columns], bias=bias)


def log_probs(
    heads: Heads,
    active: ActiveBlocks,
    shift: torch.Tensor | None,  # [models * N] as the pilot gave it, None in float16
    results: Results,  # to be filled
    exp_logits: torch.Tensor | None,  # [N, padded_columns] likewise
    search: Search | None,
) -> tuple[Statistics, Rows]:
    """The pass over the vocabulary, from logits to log-probs."""
    misled = None if shift is None else new_misled(shift, heads)
    statistics = logit_statistics(heads, active, shift, exp_logits, search)
    rows = combine(statistics, heads, results, misled)
    if misled is not None:
        redo_misled(heads, misled, statistics, rows, results, exp_logits, search)
    return statistics, rows


def redo_misled(
    heads: Heads,
    misled: Misled,  # as `combine` left it
    statistics: Statistics,  # as all that follows, written again where rows were misled
    rows: Rows,
    results: Results,
    exp_logits: torch.Tensor | None,
    search: Search | None,
) -> None:
    blocks = ActiveBlocks(misled.blocks, misled.count)
    raise_to_maxima(misled.shift, heads, blocks, misled.rows)
    statistics = statistics._replace(row_shift=misled.shift)
    # As many programs as run at once: most find no work.
    logit_statistics(heads.persistent(), blocks, misled.shift, exp_logits, search, statistics)
    combine(statistics, heads, results, misled, again=True, out=rows)
