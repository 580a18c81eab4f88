"""Heads that are spread over ranks: used as the slices that they are, or gathered.

* `process_group=`: the vocabulary is split over the group's ranks, in slices of any size by rank,
  and hidden is the same everywhere (tensor parallel). Each rank computes over its own slice as if
  it were a whole head; one all-gather of [3, N] statistics turns the local results into those of
  the whole vocabulary, and one all-reduce sums the gradient of hidden in float32.
* a DTensor without `process_group` (FSDP2, where hidden differs by rank): gathered once per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from powerflow_fast.options import HeadForward, HeadOptions


def forward(
    backend: ModuleType,
    hidden: Tensor,  # [N, H], the same on every rank
    weight: Tensor,  # [own V, H]
    bias: Tensor | None,  # [own V]
    targets: Tensor,  # [N] int64, in the whole vocabulary
    ref: tuple[Tensor, Tensor, Tensor | None] | None,
    options: HeadOptions,
) -> HeadForward:
    """As a back end's `forward`; the backward pass takes the recompute route, so no direction."""
    group = _group(options)
    own_targets = _own_targets(targets, weight, options)
    local = backend.forward(hidden, weight, bias, own_targets, None, options, False)
    logps, lse, entropy = _combine(local, group)
    ref_logps = None
    if ref is not None:
        no_entropy = replace(options, entropy=False)
        local = backend.forward(*ref, own_targets, None, no_entropy, False)
        ref_logps, _, _ = _combine(local, group)
    return HeadForward(
        logps, lse, entropy if options.entropy else None, direction=None, ref_logps=ref_logps
    )


def backward(
    backend: ModuleType,
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [own V, H]
    bias: Tensor | None,  # [own V]
    targets: Tensor,  # [N], in the whole vocabulary
    lse: Tensor,  # [N], of the whole vocabulary
    entropy: Tensor | None,  # [N], likewise
    options: HeadOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As a back end's `backward`; the gradient of hidden is summed over the ranks."""
    own_targets = _own_targets(targets, weight, options)
    grads = backend.backward(
        grad_logps, grad_entropy, hidden, weight, bias, own_targets, lse, entropy, options, needs
    )
    if grads[0] is not None:  # float32 still
        dist.all_reduce(grads[0], group=_group(options))
    return grads


def slice_sizes(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks] int64 vocabulary of each rank's slice."""
    own = torch.full((1,), weight.shape[0], dtype=torch.int64, device=weight.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
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


def _own_targets(targets: Tensor, weight: Tensor, options: HeadOptions) -> Tensor:
    """Targets relative to this rank's slice; those of other slices point past its end."""
    group, size = _group(options), weight.shape[0]
    local = targets - slice_sizes(weight, group)[: dist.get_rank(group)].sum()
    outside = size + (options.ignore_index == size)
    local = local.where((local >= 0) & (local < size), outside)
    return local.where(targets != options.ignore_index, options.ignore_index)


def _combine(local: HeadForward, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor | None]:
    """logps, lse and entropy over all slices; logps is NaN where no rank owns the target."""
    target_logits = local.logps + local.lse
    target_logits = target_logits.where(~target_logits.isnan(), -torch.inf)
    entropy = torch.zeros_like(local.lse) if local.entropy is None else local.entropy
    stats = torch.stack([local.lse, target_logits, entropy])
    gathered = [torch.empty_like(stats) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, stats, group=group)
    lses, targets, entropies = torch.stack(gathered).unbind(1)  # each [ranks, N]
    lse = lses.logsumexp(0)
    share = (lses - lse).exp()
    entropy = (share * (entropies + lse - lses)).sum(0)
    target = targets.amax(0)
    return (target - lse).where(target != -torch.inf, torch.nan), lse, entropy
