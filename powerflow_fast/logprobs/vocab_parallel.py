"""Heads that are spread over ranks: used as the slices that they are, or gathered.

* `process_group=`: the vocabulary is split over the group's ranks, in slices of any size by rank,
  and hidden is the same everywhere (tensor parallel). Each rank computes over its own slice as if
  it were a whole head; one all-gather of [3, N] statistics turns the local results into those of
  the whole vocabulary, and one all-reduce sums, in float32, the unit gradient of a frozen head or
  the gradient of hidden of a trained one.
* a DTensor without `process_group` (FSDP2, where hidden differs by rank): gathered once per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs.backend import Backend, Gradients, HeadForward, Upstream
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.torch_tiles import softcap_slope

IGNORED = -1  # among the targets of a slice
ROWS = 1024  # of the weight that are gathered at a time


def forward(
    backend: Backend,
    policy: Head,  # hidden is the same on every rank; weight and bias are this rank's slices
    reference: Head | None,  # likewise
    targets: Tensor,  # [N] int64, in the whole vocabulary
    options: HeadOptions,
) -> HeadForward:
    """As a back end's `forward`."""
    group, local_options = _group(options), _local_options(options)
    local_targets, inside, counted = _local_targets(targets, policy.weight, options)
    # Any column does for the targets of other slices: what belongs to it is taken out again.
    local_targets = local_targets.where(inside, 0).where(counted, IGNORED)
    local = backend.forward(policy, None, local_targets, local_options)
    logps, lse, entropy = _combine(local, inside, group)
    unit_gradient = None
    if options.wants_unit_gradient:
        whole = local._replace(logps=logps, lse=lse)
        unit_gradient = _local_unit_gradient(local, whole, policy, local_targets, inside, options)
        dist.all_reduce(unit_gradient, group=group)
        unit_gradient.masked_fill_((logps.isnan() & counted)[:, None], torch.nan)
    ref_logps = None
    if reference is not None:
        scores_alone = replace(local_options, entropy=False, route="none")
        local = backend.forward(reference, None, local_targets, scores_alone)
        ref_logps, _, _ = _combine(local, inside, group)
    return HeadForward(logps, lse, entropy if options.entropy else None, unit_gradient, ref_logps)


def backward(
    backend: Backend,
    head: Head,  # as in `forward`
    upstream: Upstream,  # of the whole vocabulary
    options: HeadOptions,
    needs: Sequence[bool],
) -> Gradients:
    """As a back end's `backward`; the gradient of hidden is summed over the ranks."""
    local_targets, inside, counted = _local_targets(upstream.targets, head.weight, options)
    local_targets = local_targets.where(inside, len(head.weight)).where(counted, IGNORED)
    local = upstream._replace(targets=local_targets)
    grads = backend.backward(head, local, _local_options(options), needs)
    if grads.hidden is not None:  # float32 still
        dist.all_reduce(grads.hidden, group=_group(options))
    return grads


def slice_sizes(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks] int64 vocabulary of each rank's slice."""
    local = torch.full((1,), weight.shape[0], dtype=torch.int64, device=weight.device)
    sizes = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, local, group=group)
    return torch.cat(sizes)


def plain_tensor(
    name: str, tensor: Any, group: dist.ProcessGroup | None
) -> Any:  # Tensor or None, as it came
    """A DTensor's own slice where `group` holds the slices, else the whole, gathered.

    The gradient of a gathered tensor is the mean over ranks, as FSDP2 takes it of its own.
    """
    if type(tensor).__name__ != "DTensor":
        return tensor
    from torch.distributed.tensor import Partial, Shard

    if tensor.device_mesh.ndim != 1 or tensor.placements != (Shard(0),):
        raise ValueError(
            f"{name}: expected a plain tensor, or a DTensor sharded along the vocabulary over a "
            f"mesh of one dimension, got placements {tensor.placements} over {tensor.device_mesh}"
        )
    if group is None:
        return tensor.full_tensor(grad_placements=[Partial("avg")])
    if tensor.device_mesh.get_group() != group:
        raise ValueError(
            f"{name}: expected a DTensor over the ranks of process_group, got one over "
            f"{tensor.device_mesh}; without process_group it is gathered"
        )
    return tensor.to_local()


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group that `ProcessGroup.group_name` named."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _group(options: HeadOptions) -> dist.ProcessGroup:
    return resolve_group(options.group_name)


def _local_options(options: HeadOptions) -> HeadOptions:
    """Options for one slice: its targets are relative, and it is always exact."""
    return replace(options, ignore_index=IGNORED, grad_tolerance=0.0)


def _local_targets(
    targets: Tensor, weight: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets relative to this rank's slice, which of them lie in it, and which of them count."""
    group = _group(options)
    local = targets - slice_sizes(weight, group)[: dist.get_rank(group)].sum()
    counted = targets != options.ignore_index
    return local, counted & (local >= 0) & (local < len(weight)), counted


def _local_unit_gradient(
    local: HeadForward,  # its unit gradient is overwritten
    whole: HeadForward,  # logps and lse over the whole vocabulary
    policy: Head,
    local_targets: Tensor,  # [N]
    inside: Tensor,  # [N] bool
    options: HeadOptions,
) -> Tensor:  # [N, H]
    """What this slice adds to the unit gradient over the whole vocabulary.

    That of the slice alone is scale * ((1 - q_y) J_y W[y] - sum over v != y of q_v J_v W_v), with
    q = p / share and share the slice's part of the mass. Here q becomes p, and y stays only where
    it is the target; in other slices it was any column, which then counts like the rest.
    """
    share = (local.lse - whole.lse).exp()
    at_target = torch.where(inside, -whole.logps.expm1(), 0.0)
    added = share * torch.where(inside, -local.logps.expm1(), 1.0)
    at_target -= added.where(share > 0, 0.0)
    if options.softcap is not None:
        at_target *= softcap_slope(local.logps + local.lse, options)
    unit_gradient = local.unit_gradient
    for r in torch.arange(len(at_target), device=at_target.device).split(ROWS):
        rows = policy.weight[local_targets[r].clamp_min(0)].to(policy.hidden.dtype)
        # Where the slice has no mass its own gradient is no number.
        scaled = (unit_gradient[r] * share[r, None]).where(share[r, None] > 0, 0.0)
        at_rows = rows.to(unit_gradient.dtype) * (options.scale * at_target[r, None])
        unit_gradient[r] = scaled + at_rows
    return unit_gradient


def _combine(
    local: HeadForward, inside: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """logps, lse and entropy over all slices; logps is NaN where no rank owns the target.

    The target is kept apart from the rest of the vocabulary: where it has nearly all the mass, what
    the others have is not told from a sum with it.
    """
    entropy = torch.zeros_like(local.lse) if local.entropy is None else local.entropy
    target = (local.logps + local.lse).where(inside, -torch.inf)
    rest = local.lse + (-local.logps.expm1()).log().where(inside, 0.0)
    entropy = _entropy_of_others(entropy, local.logps).where(inside, entropy)
    stats = torch.stack([rest, target, entropy])
    gathered = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, stats, group=group)
    rests, targets, entropies = torch.stack(gathered).unbind(1)  # each [ranks, N]
    target, rest = targets.amax(0), rests.logsumexp(0)
    # A slice of -inf alone has no share, and its entropy is no number.
    empty = rests == -torch.inf
    share = (rests - rest).exp().masked_fill(empty, 0.0)
    entropy = (share * (entropies + rest - rests).masked_fill(empty, 0.0)).sum(0)
    owned = target != -torch.inf
    softplus = torch.nn.functional.softplus
    logps = -softplus(rest - target)  # log(1 + e^(rest - target)), to all digits of a small one
    lse = torch.where(owned, target - logps, rest)
    log_others = -softplus(target - rest)
    others = log_others.exp()
    entropy = others * (entropy - log_others.clamp_min(-1e30)) - logps.exp() * logps
    return logps.where(owned, torch.nan), lse, entropy


def _entropy_of_others(entropy: Tensor, logps: Tensor) -> Tensor:
    """Entropy of a distribution without its target; 0 where the target has all the mass."""
    log_others = (-logps.expm1()).log()
    others = log_others.exp()
    rest = (entropy + logps.exp() * logps + others * log_others.clamp_min(-1e30)) / others
    return rest.where(others > 0, 0.0)
