"""Autoregressive models small enough to list every sequence, trained by the real loss.

A policy is a table of logits, one row per prefix, and every prompt has a table of its own. Since
all sequences can be listed, its distance to any target is exact at any step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from powerflow_fast import LogZHead, tb_loss


class Enumerable:
    """All N sequences over a small vocabulary, and P random base models over them.

    With `stop`, token 0 ends a sequence, so lengths run from 1 to `length`; else all are equal.

    Attributes:
        base: [P, prefixes, vocab] float64 logits, normal with standard deviation `scale`.
        sequences: N tuples of tokens; mask [N, length] and lengths [N] say which tokens count.
    """

    def __init__(
        self,
        vocab: int,
        length: int,
        *,
        stop: bool = False,
        prompts: int = 1,
        scale: float = 0.7,
        seed: int = 0,
    ) -> None:
        every = itertools.product(range(vocab), repeat=length)
        self.sequences = sorted({_cut(sequence) if stop else sequence for sequence in every})
        prefixes = sorted({s[:i] for s in self.sequences for i in range(len(s))})
        row = {prefix: i for i, prefix in enumerate(prefixes)}
        self.lengths = torch.tensor([len(s) for s in self.sequences])
        self.mask = torch.arange(length) < self.lengths[:, None]
        # [N, length] where a token's log-prob lies in a flattened table; 0 where not counted
        self.places = torch.zeros(self.mask.shape, dtype=torch.int64)
        for n, s in enumerate(self.sequences):
            for i, token in enumerate(s):
                self.places[n, i] = row[s[:i]] * vocab + token
        draw = torch.Generator().manual_seed(seed)
        shape = (prompts, len(prefixes), vocab)
        self.base = torch.randn(shape, dtype=torch.float64, generator=draw) * scale

    def logps(self, table: Tensor) -> Tensor:  # [P, N, length]
        """Token log-probs of every sequence, 0 where not counted."""
        return table.log_softmax(-1).flatten(1)[:, self.places] * self.mask

    def totals(self, table: Tensor) -> Tensor:  # [P, N]
        return self.logps(table).sum(-1)

    def power(self, alpha: float, tilt: Tensor | float = 0.0) -> Tensor:  # [P, N]
        """log of p^alpha exp(-tilt |y|), normalised; tilt is a number or [P]."""
        tilt = torch.as_tensor(tilt, dtype=torch.float64).reshape(-1, 1)
        return (alpha * self.totals(self.base) - tilt * self.lengths).log_softmax(-1)

    def normalising_tilt(self, alpha: float) -> Tensor:  # [P]
        """lambda of Prop. 3.2: the one for which p^alpha exp(-lambda |y|) sums to 1 as it is."""
        low = torch.full((len(self.base),), -60.0, dtype=torch.float64)
        high, totals = -low, alpha * self.totals(self.base)
        for _ in range(80):
            middle = (low + high) / 2
            too_much = (totals - middle[:, None] * self.lengths).logsumexp(-1) > 0
            low, high = low.where(~too_much, middle), high.where(too_much, middle)
        return middle


def _cut(sequence: tuple[int, ...]) -> tuple[int, ...]:
    return sequence[: sequence.index(0) + 1] if 0 in sequence else sequence


def total_variation(logps: Tensor, target: Tensor) -> Tensor:  # [P, N] -> [P]
    return (logps.exp() - target.exp()).abs().sum(-1) / 2


def kl(logps: Tensor, target: Tensor) -> Tensor:  # [P, N] -> [P] nats
    return (logps.exp() * (logps - target)).sum(-1)


def optimum(model: Enumerable, alpha: float, balance: str = "length") -> tuple[Tensor, Tensor]:
    """The loss over *all* sequences, each once, at its minimum by L-BFGS.

    Returns:
        the policy's table [P, prefixes, vocab] and log Z' [P], a free parameter here.
    """
    table = model.base.clone().requires_grad_()
    log_z = torch.zeros(len(table), dtype=torch.float64, requires_grad=True)
    reference = model.logps(model.base).flatten(0, 1)
    prompts, count = len(table), len(model.sequences)
    options: dict[str, Any] = dict(alpha=alpha, balance=balance, mask=model.mask.repeat(prompts, 1))
    optimizer = torch.optim.LBFGS(
        [table, log_z],
        max_iter=2000,
        max_eval=4000,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        every = log_z.repeat_interleave(count)
        out = tb_loss(model.logps(table).flatten(0, 1), reference, log_z=every, **options)
        out.loss.backward()
        return out.loss

    for _ in range(4):
        optimizer.step(closure)
    return table.detach(), log_z.detach()


def train(
    model: Enumerable,
    alpha: float,
    *,
    steps: int,
    completions: int,
    learning_rate: float,
    seed: int,
    log_z: str = "group",
    group_size: int | None = None,
    log_z_lr: float = 1e-3,
    source: str = "policy",
    updates: int = 1,
    importance: str = "mean",
    clip_eps: float = 0.2,
) -> Iterator[tuple[int, Tensor]]:
    """Sampled training of every prompt: (step, its table [P, prefixes, vocab]) after each step.

    Adam, with a learning rate that goes down to 0 along a half cosine. Groups are the `completions`
    of a prompt, or parts of them of `group_size`.

    Args:
        log_z: "group", "learned" (`LogZHead` on a random vector per prompt, started at the mean
            group estimate, as the trainer does) or "learned from 0".
        source: what rollouts are drawn from, "policy" or "base".
        updates: optimizer steps per rollout.
        importance: "none", or of `tb_loss`, whose old log-probs are those of the rollout.
    """
    prompts, draw = len(model.base), torch.Generator().manual_seed(seed)
    table = model.base.clone().requires_grad_()
    reference = model.logps(model.base)
    optimizer = torch.optim.Adam([table], lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    head = None if log_z == "group" else Learned(prompts, log_z_lr, seed)
    each = torch.arange(prompts)[:, None]
    for step in range(steps):
        if step % updates == 0:
            with torch.no_grad():
                old = model.logps(table)
                totals = (old if source == "policy" else reference).sum(-1)
                picked = totals.exp().multinomial(completions, replacement=True, generator=draw)
                old, fixed = (x[each, picked].flatten(0, 1) for x in (old, reference))
                mask = model.mask[picked].flatten(0, 1)
        logps = table.log_softmax(-1).flatten(1).gather(1, model.places[picked].flatten(1))
        options: dict[str, Any] = {"log_z": "group", "group_size": group_size or completions}
        if head is not None:
            if step == 0 and log_z == "learned":
                head.body.warm_start((alpha * fixed - old).sum(-1) / mask.sum(-1))
            options = {"log_z": head().repeat_interleave(completions)}
        if importance != "none":
            options |= {"old_logps": old, "importance": importance, "clip_eps": clip_eps}
        logps = logps.view(mask.shape)
        out = tb_loss(logps, fixed, alpha=alpha, mask=mask, **options)
        out.loss.backward()
        for one in (optimizer, *([head.optimizer] if head else [])):
            one.step()
            one.zero_grad()
        schedule.step()
        yield step + 1, table.detach()


class Learned:
    """The learned log Z' of P prompts: `LogZHead`, its own constant learning rate."""

    def __init__(self, prompts: int, learning_rate: float, seed: int, size: int = 32) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pooled = torch.randn(prompts, size)
            self.body = LogZHead(size)
        self.optimizer = torch.optim.AdamW(
            self.body.parameters(), lr=learning_rate, weight_decay=0.0
        )

    def __call__(self) -> Tensor:  # [P]
        return self.body(self.pooled)


def marks(steps: int, count: int = 24) -> list[int]:
    """Steps at which curves are kept, evenly in logarithms, the last included."""
    return sorted({round(math.exp(i / (count - 1) * math.log(steps))) for i in range(count)})
