"""The trajectory-balance residual of every sequence from its tokens' log-probs, and its gradient.

The eager code it replaces, for sequence s with counted tokens T_s:

    l_pi, l_ref = logps[T_s].mean(), ref_logps[T_s].mean()     # or sums, by `balance`
    delta0[s] = l_pi - alpha[s] * (l_ref + psi[s])             # 0 where T_s is empty
    grad_logps[T_s] = grad_delta0[s] / len(T_s)                # or not divided; 0 elsewhere

A sequence is the range [starts, ends) of the tokens, in ascending order: packed rows pass
cu_seqlens, padded rows b * T. Sums run in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from powerflow_fast.kernels.config import LAUNCH, ceil_div
from powerflow_fast.kernels.operands import BALANCES

BLOCK = 1024


@triton.jit
def residual_kernel(
    logps_ptr,  # [N]
    ref_logps_ptr,  # [N]
    starts_ptr,  # [S]
    ends_ptr,  # [S]
    mask_ptr,  # [N] or None
    alpha_ptr,  # [S]
    psi_ptr,  # [S]
    delta_ptr,  # [S]
    policy_ptr,  # [S]
    reference_ptr,  # [S]
    lengths_ptr,  # [S]
    MEAN_POLICY: tl.constexpr,
    MEAN_REFERENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0)
    start = tl.load(starts_ptr + seq)
    end = tl.load(ends_ptr + seq)
    offs = tl.arange(0, BLOCK)
    # One accumulator per lane: a sum of 131,072 tokens is a tree over 1,024 sums of 128.
    policy = tl.zeros([BLOCK], tl.float32)
    reference = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(start, end, BLOCK):
        offs_n = first + offs
        counted = offs_n < end
        if mask_ptr is not None:
            counted = counted & (tl.load(mask_ptr + offs_n, mask=counted, other=0) != 0)
        policy += tl.load(logps_ptr + offs_n, mask=counted, other=0.0)
        reference += tl.load(ref_logps_ptr + offs_n, mask=counted, other=0.0)
        count += counted.to(tl.int32)
    length = tl.sum(count, 0)
    divisor = tl.maximum(length, 1).to(tl.float32)
    l_pi = tl.sum(policy, 0)
    l_ref = tl.sum(reference, 0)
    if MEAN_POLICY:
        l_pi = l_pi / divisor
    if MEAN_REFERENCE:
        l_ref = l_ref / divisor
    delta = l_pi - tl.load(alpha_ptr + seq) * (l_ref + tl.load(psi_ptr + seq))
    tl.store(delta_ptr + seq, tl.where(length > 0, delta, 0.0))
    tl.store(policy_ptr + seq, l_pi)
    tl.store(reference_ptr + seq, l_ref)
    tl.store(lengths_ptr + seq, length)


@triton.jit
def residual_gradient_kernel(
    grad_delta_ptr,  # [S]
    lengths_ptr,  # [S]
    starts_ptr,  # [S] ascending
    ends_ptr,  # [S]
    mask_ptr,  # [N] or None
    grad_logps_ptr,  # [N]
    num_n,
    num_s,
    num_halvings,
    MEAN_POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs_n < num_n
    # Each token finds the last sequence that starts at or before it by halving [low, high): tokens
    # are tiled evenly however the lengths differ.
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + num_s
    for _ in range(num_halvings):
        middle = (low + high) // 2
        begun = tl.load(starts_ptr + tl.minimum(middle, num_s - 1)) <= offs_n
        open_range = low < high
        low = tl.where(open_range & begun, middle + 1, low)
        high = tl.where(open_range & (begun == 0), middle, high)
    seq = tl.maximum(low - 1, 0)
    counted = inside & (low > 0) & (offs_n < tl.load(ends_ptr + seq))
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + offs_n, mask=inside, other=0) != 0)
    grad = tl.load(grad_delta_ptr + seq, mask=counted, other=0.0)
    if MEAN_POLICY:
        grad = grad / tl.load(lengths_ptr + seq, mask=counted, other=1).to(tl.float32)
    tl.store(grad_logps_ptr + offs_n, grad, mask=inside)


def residual_forward(
    logps: torch.Tensor,  # [N] contiguous float32
    ref_logps: torch.Tensor,  # [N] likewise
    starts: torch.Tensor,  # [S] contiguous int32
    ends: torch.Tensor,  # [S] likewise
    mask: torch.Tensor | None,  # [N] contiguous bool
    alpha: torch.Tensor,  # [S] contiguous float32
    psi: torch.Tensor,  # [S] likewise
    balance: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> residual without log Z, policy and reference mean (or sum), all [S], and int32 lengths."""
    mean_policy, mean_reference = BALANCES[balance]
    delta, policy, reference = torch.empty(
        (3, starts.shape[0]), dtype=torch.float32, device=logps.device
    )
    lengths = torch.empty_like(starts)
    if starts.shape[0] > 0:
        with torch.cuda.device_of(logps):
            residual_kernel[(starts.shape[0],)](
                logps_ptr=logps,
                ref_logps_ptr=ref_logps,
                starts_ptr=starts,
                ends_ptr=ends,
                mask_ptr=mask,
                alpha_ptr=alpha,
                psi_ptr=psi,
                delta_ptr=delta,
                policy_ptr=policy,
                reference_ptr=reference,
                lengths_ptr=lengths,
                MEAN_POLICY=mean_policy,
                MEAN_REFERENCE=mean_reference,
                BLOCK=BLOCK,
                **LAUNCH,
            )
    return delta, policy, reference, lengths


def residual_backward(
    grad_delta0: torch.Tensor,  # [S] contiguous float32
    lengths: torch.Tensor,  # [S] contiguous int32
    starts: torch.Tensor,  # [S] likewise
    ends: torch.Tensor,  # [S] likewise
    mask: torch.Tensor | None,  # [N] contiguous bool
    num_tokens: int,
    balance: str,
) -> torch.Tensor:
    """-> the coefficient of every token [N], 0 where it is not counted or in no sequence."""
    num_s = starts.shape[0]
    if num_s == 0 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.float32, device=grad_delta0.device)
    grad_logps = torch.empty(num_tokens, dtype=torch.float32, device=grad_delta0.device)
    with torch.cuda.device_of(grad_delta0):
        residual_gradient_kernel[(ceil_div(num_tokens, BLOCK),)](
            grad_delta_ptr=grad_delta0,
            lengths_ptr=lengths,
            starts_ptr=starts,
            ends_ptr=ends,
            mask_ptr=mask,
            grad_logps_ptr=grad_logps,
            num_n=num_tokens,
            num_s=num_s,
            num_halvings=num_s.bit_length(),
            MEAN_POLICY=BALANCES[balance][0],
            BLOCK=BLOCK,
            **LAUNCH,
        )
    return grad_logps
