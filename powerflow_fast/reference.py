"""The specification: every quantity of this library in plain PyTorch and float64.

Tests and benchmarks answer to this file. It materialises [N, V] logits and is meant for small
inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # [N, V] float64
    """softcap(logit_scale * (hidden @ weight.T + bias)) / temperature."""
    z = hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logprobs(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N] int64
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    **transform,
) -> tuple[Tensor, Tensor]:  # logps [N], entropy [N], float64
    """Log-probability of each target and entropy [nats] of each row; 0 where ignored."""
    counted = targets != ignore_index
    log_p = logits(hidden, weight, bias, **transform).log_softmax(-1)
    logps = log_p.gather(1, targets.where(counted, 0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logps.where(counted, 0.0), entropy.where(counted, 0.0)


def tb_loss(
    logps: list[Tensor],  # S tensors [T_s]: counted tokens only
    ref_logps: list[Tensor],  # likewise
    *,
    log_z: Tensor,  # [S]
    alpha: Tensor,  # [S]
    psi: Tensor,  # [S]
    weights: Tensor,  # [S] importance weights, detached
    balance: str = "length",
) -> tuple[Tensor, Tensor]:  # loss, residual [S]
    """LA-TB (arXiv 2603.18363, eq. 10) and the two balances it compares with, by sequence."""
    residuals = []
    for s, (policy, ref) in enumerate(zip(logps, ref_logps, strict=True)):
        if balance == "length":
            policy_term, ref_term = policy.mean(), ref.mean()
        elif balance == "trajectory":
            policy_term, ref_term = policy.sum(), ref.sum()
        else:
            policy_term, ref_term = policy.sum(), ref.mean()
        residuals.append(log_z[s] + policy_term - alpha[s] * (ref_term + psi[s]))
    residual = torch.stack(residuals)
    return (weights * residual**2).mean(), residual
