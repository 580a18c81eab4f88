"""What a run logs of its losses: sums over micro-batches and ranks, divided once.

A mean of means would depend on how a batch was split: on the ranks, and on micro-batches of few or
empty completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from powerflow_fast.loss import TBOutput
from powerflow_fast.training.health import NOT_FINITE, TrainingStopped

# A metric of TBOutput: its name in the logs, and what its mean is over. "steps": a count, logged as
# the mean over optimizer steps; "worst": the largest value.
METRICS = {
    "residual_mean": ("residual/mean", "sequences"),
    "residual_std": ("residual/std", "sequences"),
    "policy_logp": ("logps/policy", "tokens"),
    "ref_logp": ("logps/reference", "tokens"),
    "log_z": ("log_z", "sequences"),
    "kl": ("kl", "tokens"),
    "entropy": ("entropy", "tokens"),
    "importance_mean": ("importance/mean", "sequences"),
    "clipped_share": ("importance/clipped_share", "sequences"),
    "zero_length_count": ("completions/zero_length", "steps"),
    # With grad_tolerance.
    "columns_kept": ("certified/columns_kept", "tokens"),
    "skipped_mass": ("certified/skipped_mass", "worst"),
    "dense_blocks": ("certified/dense_blocks", "steps"),
}
Gather = Callable[[Tensor], Tensor]  # [1, k] of every rank to [ranks, k]


class MetricSums:
    """Sums since the last log, on the device: adding to them waits for nothing."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # 0-dim

    @torch.no_grad()
    def add(self, out: TBOutput) -> None:
        """Take in a micro-batch."""
        weights = {"sequences": (out.lengths > 0).sum(), "tokens": out.lengths.sum()}
        for name, weight in weights.items():
            self._add(name, weight)
        for name, (_, over) in METRICS.items():
            if name not in out.metrics or name == "residual_std":
                continue
            value = out.metrics[name]
            if over == "worst":
                largest = self.sums.get(name, torch.zeros_like(value))
                self.sums[name] = torch.maximum(largest, value.to(largest))
            else:
                self._add(name, value * weights[over] if over in weights else value)
        self._add("loss", (_wide(out.importance) * _wide(out.residual).square()).sum())
        mean, std = (_wide(out.metrics[f"residual_{name}"]) for name in ("mean", "std"))
        self._add("residual_squares", (mean.square() + std.square()) * weights["sequences"])

    def _add(self, name: str, value: Tensor) -> None:
        value = _wide(value.detach())
        self.sums[name] = value + self.sums[name].to(value) if name in self.sums else value

    def figures(self, gather: Gather, steps: int = 1) -> dict[str, float]:
        """Names in the logs, and "loss" -> means over what came since the last call, on all ranks.

        `steps`: optimizer steps in that time. Every rank must call it.
        """
        if not self.sums:
            return {}
        names = sorted(self.sums)
        device = self.sums["tokens"].device
        of_this_rank = torch.stack([_wide(self.sums[name].to(device)) for name in names])
        ranks = gather(of_this_rank[None])
        total = dict(zip(names, ranks.sum(0).tolist(), strict=True))
        largest = dict(zip(names, ranks.amax(0).tolist(), strict=True))
        self.sums = {}
        counts = {name: max(total[name], 1.0) for name in ("sequences", "tokens")}
        counts |= {"steps": max(steps, 1), "worst": 1}
        figures = {"loss": total["loss"] / counts["sequences"]}
        for name, (shown, over) in METRICS.items():
            if name == "residual_std":
                mean = total["residual_mean"] / counts["sequences"]
                square = total["residual_squares"] / counts["sequences"]
                figures[shown] = max(square - mean * mean, 0.0) ** 0.5
            elif name in total:
                whole = largest[name] if over == "worst" else total[name]
                figures[shown] = whole / counts[over]
        return figures

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums = dict(state)


class LossFigures(Trainer):
    """transformers' Trainer with figures of its losses in the logs, the same for any split."""

    model: Any

    def start_figures(self) -> None:
        self.sums = {"train": MetricSums(), "eval": MetricSums()}
        self._logged_step = 0
        self._prefix = "eval"

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, from empty sums: an earlier `predict` may have left some."""
        self.sums["eval"], self._prefix = MetricSums(), kwargs.get("metric_key_prefix", "eval")
        return super().evaluation_loop(*args, **kwargs)

    def loss_figures(self) -> dict[str, float]:
        """What to log of training, or of the last evaluation, whose names begin with its prefix.

        An evaluation's loss replaces Trainer's, which is a mean over batches. Every rank must call.

        Raises:
            TrainingStopped: for a loss in training that is not finite. Trainer would log 0, and go
                on where fp16's scaler skips every step.
        """
        if self.model.training:
            steps = self.state.global_step - self._logged_step
            self._logged_step = self.state.global_step
            figures = self.sums["train"].figures(self._gather, steps)
            loss = figures.pop("loss", 0.0)  # Trainer's is that of the optimizer steps
            if not math.isfinite(loss):
                raise TrainingStopped(
                    f"the loss up to step {self.state.global_step} is not finite. {NOT_FINITE}"
                )
            return figures
        figures = self.sums["eval"].figures(self._gather)
        return {f"{self._prefix}_{name}": value for name, value in figures.items()}

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.to(self.accelerator.device))


ROLLOUT_SIZES = "rollout sizes"  # among a trainer's lists of figures: completions of each rollout


def over_rollouts(figures: dict[str, list[float]]) -> dict[str, float]:
    """One value for each list, which holds a value for every rollout since the last log.

    That is the mean weighted by completions (an evaluation's last rollout is smaller), or for a
    name that begins with min or max the smallest or largest. NaN, which is no value, is left out.
    """
    sizes = figures.get(ROLLOUT_SIZES, [])
    whole = {}
    for name, values in figures.items():
        weights = sizes if len(sizes) == len(values) else [1.0] * len(values)
        pairs = [(v, w) for v, w in zip(values, weights, strict=True) if not math.isnan(v)]
        kind = name.rsplit("/", 1)[-1]
        if name == ROLLOUT_SIZES or not pairs:
            continue
        if kind.startswith(("min", "max")):
            pick = min if kind.startswith("min") else max
            whole[name] = pick(v for v, _ in pairs)
        else:
            whole[name] = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
    return whole


def _wide(value: Tensor) -> Tensor:
    """In float64, or float32 on Apple's GPUs, which have no float64."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
