"""What is read off a rollout: TRL's dictionary of prompts and completions, padded to [B, T]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerflow_fast.loss import tb_loss
from powerflow_fast.models.lm_head import ModelHead

SAMPLER_GAP = "sampling/sampling_logp_difference"  # in the logs, as TRL's


def counted_mask(inputs) -> Tensor:  # [B, T] bool
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def counted(hidden: Tensor, mask: Tensor, head: ModelHead) -> Tensor:
    """[N, H]: the states that predict the counted completion tokens, where the head's weight is."""
    hidden = hidden[:, -mask.shape[1] - 1 : -1]
    return hidden[mask.to(hidden.device)].to(head.weight.device)


@torch.no_grad()
def group_log_z(rollout: dict[str, Any], group_size: int, args, accelerator) -> Tensor:
    """[B] each prompt's log Z' estimate [nats/token]; all ranks together hold whole groups."""
    mask = counted_mask(rollout)
    scored = tb_loss(
        rollout["old_per_token_logps"],
        rollout["ref_per_token_logps"],
        mask=mask,
        log_z=0.0,  # the residual is then minus the estimate
        alpha=rollout["alpha"],
        psi=rollout["psi"],
        balance=args.balance,
        backend=args.loss_backend,
        check_finite=False,
    )
    residual = accelerator.gather(scored.residual)
    not_empty = accelerator.gather(mask.any(1)).view(-1, group_size)
    total = -residual.view_as(not_empty).where(not_empty, 0.0).sum(1)
    return (total / not_empty.sum(1).clamp(min=1))[rollout["group"]]


def sampler_gap(rollout: dict[str, Any], accelerator) -> dict[str, float]:
    """|log-prob of the policy - of the sampler| per counted token: mean and max over all ranks."""
    sampled = rollout["sampling_per_token_logps"]
    gap = (rollout["old_per_token_logps"] - sampled).abs()
    gap = gap[counted_mask(rollout) & ~sampled.isnan()]  # NaN: the sampler could not say
    largest = gap.max() if len(gap) else gap.sum()
    figures = torch.stack([gap.sum(), gap.new_tensor(len(gap)), largest])
    figures = accelerator.gather(figures[None])  # [ranks, 3]
    mean = figures[:, 0].sum() / figures[:, 1].sum().clamp(min=1)
    return {f"{SAMPLER_GAP}/mean": mean.item(), f"{SAMPLER_GAP}/max": figures[:, 2].max().item()}
