"""`log_completions`: LA-TB's figures of each completion, in TRL's table of completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from powerflow_fast.loss import TBOutput
from powerflow_fast.rewards import no_psi

COLUMNS = ("log pi", "log base", "residual")  # [nats/token] of each completion


class CompletionTable:
    """The completions of the last rollout that have been trained on so far."""

    def __init__(self) -> None:
        self.rows: dict[int, list[float]] = {}  # place in the rollout -> COLUMNS

    def clear(self) -> None:
        self.rows = {}

    def add(self, out: TBOutput, rows: Tensor, gather: Callable[[Tensor], Tensor]) -> None:
        """Take in a micro-batch, whose completions are `rows` [S] of the rollout."""
        lengths = out.lengths
        owner = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        means = [
            x.new_zeros(len(lengths)).index_add(0, owner, x) / lengths
            for x in (out.logps.detach(), out.ref_logps)
        ]
        figures = torch.stack([rows.to(lengths), *means, out.residual.detach()], 1)
        for row, *values in gather(figures).tolist():
            self.rows[int(row)] = values

    @contextmanager
    def in_place_of_rewards(self, logs: dict[str, Any], training: bool) -> Iterator[None]:
        """Inside, TRL's lists of a rollout hold COLUMNS in place of reward and advantage."""
        rewards, advantages = logs["rewards"], logs["advantages"]
        shown = {name: values for name, values in rewards.items() if name != no_psi.__name__}
        if training and self.rows:
            nothing = [math.nan] * len(COLUMNS)
            rows = [self.rows.get(i, nothing) for i in range(len(logs["prompt"]))]
            shown |= dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        logs |= {"rewards": shown, "advantages": None}
        try:
            yield
        finally:
            logs |= {"rewards": rewards, "advantages": advantages}
