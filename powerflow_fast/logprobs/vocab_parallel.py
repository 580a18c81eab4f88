"""Heads that are spread over ranks: used as the slices that they are, or gathered.

* `process_group=`: the vocabulary is split over the group's ranks, in slices of any size by rank,
  and hidden is the same everywhere (tensor parallel). Each rank computes over its own slice as if
  it were a whole head; one all-gather of [3, N] statistics turns the local results into those of
  the whole vocabulary, and one all-reduce sums, in float32, the direction of a frozen head or the
  gradient of hidden of a trained one.
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

from powerflow_fast.logprobs.options import HeadForward, HeadOptions
from powerflow_fast.logprobs.torch_tiles import softcap_slope

IGNORED = -1  # among the targets of a slice
ROWS = 1024  # of the weight that are gathered at a time


def forward(
    backend: ModuleType,
    hidden: Tensor,  # [N, H], the same on every rank
    weight: Tensor,  # [own V, H]
    bias: Tensor | None,  # [own V]
    targets: Tensor,  # [N] int64, in the whole vocabulary
    ref: tuple[Tensor, Tensor, Tensor | None] | None,
    options: HeadOptions,
    want_direction: bool,
) -> HeadForward:
    """As a back end's `forward`."""
    group, own_options = _group(options), _own_options(options)
    own_targets, inside, counted = _own_targets(targets, weight, options)
    # Any column does for the targets of other slices: what belongs to it is taken out again.
    own_targets = own_targets.where(inside, 0).where(counted, IGNORED)
    arguments = (hidden, weight, bias, own_targets, None, own_options, want_direction)
    local = backend.forward(*arguments)
    logps, lse, entropy = _combine(local, inside, group)
    direction = None
    if want_direction:
        own = (local, weight, own_targets, inside, logps, lse, options)
        direction = _own_direction(*own, hidden.dtype)
        dist.all_reduce(direction, group=group)
        direction.masked_fill_((logps.isnan() & counted)[:, None], torch.nan)
    ref_logps = None
    if ref is not None:
        no_entropy = replace(own_options, entropy=False)
        local = backend.forward(*ref, own_targets, None, no_entropy, False)
        ref_logps, _, _ = _combine(local, inside, group)
    return HeadForward(logps, lse, entropy if options.entropy else None, direction, ref_logps)


def backward(
    backend: ModuleType,
    grad_logps: Tensor,  # [N]
    grad_entropy: Tensor | None,  # [N]
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [own V, H]
    bias: Tensor | None,  # [own V]
    targets: Tensor,  # [N], in the whole vocabulary
    logps: Tensor,  # [N], of the whole vocabulary
    lse: Tensor,  # [N], likewise
    entropy: Tensor | None,  # [N], likewise
    options: HeadOptions,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As a back end's `backward`; the gradient of hidden is summed over the ranks."""
    own_targets, inside, counted = _own_targets(targets, weight, options)
    own_targets = own_targets.where(inside, len(weight)).where(counted, IGNORED)
    head = (hidden, weight, bias, own_targets, logps, lse, entropy)
    grads = backend.backward(grad_logps, grad_entropy, *head, _own_options(options), needs)
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


def _own_options(options: HeadOptions) -> HeadOptions:
    """Of a slice, whose targets are relative; always exact."""
    return replace(options, ignore_index=IGNORED, grad_tolerance=0.0)


def _own_targets(
    targets: Tensor, weight: Tensor, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Targets relative to this rank's slice, which of them lie in it, and which of them count."""
    group = _group(options)
    own = targets - slice_sizes(weight, group)[: dist.get_rank(group)].sum()
    counted = targets != options.ignore_index
    return own, counted & (own >= 0) & (own < len(weight)), counted


def _own_direction(
    local: HeadForward,  # its direction is overwritten
    weight: Tensor,  # [own V, H]
    own_targets: Tensor,  # [N]
    inside: Tensor,  # [N] bool
    logps: Tensor,  # [N], of the whole vocabulary
    lse: Tensor,  # [N], likewise
    options: HeadOptions,
    hidden_dtype: torch.dtype,
) -> Tensor:  # [N, H]
    """What this slice adds to the direction over the whole vocabulary.

    That of the slice alone is scale * ((1 - q_y) J_y W[y] - sum over v != y of q_v J_v W_v), with
    q = p / share and share the slice's part of the mass. Here q becomes p, and y stays only where
    it is the target; in other slices it was any column, which then counts like the rest.
    """
    share = (local.lse - lse).exp()
    own = torch.where(inside, -logps.expm1(), 0.0)
    own -= (share * torch.where(inside, -local.logps.expm1(), 1.0)).where(share > 0, 0.0)
    if options.softcap is not None:
        own *= softcap_slope(local.logps + local.lse, options)
    direction = local.direction
    for r in torch.arange(len(own), device=own.device).split(ROWS):
        rows = weight[own_targets[r].clamp_min(0)].to(hidden_dtype).to(direction.dtype)
        # Where the slice has no mass its own direction is no number.
        scaled = (direction[r] * share[r, None]).where(share[r, None] > 0, 0.0)
        direction[r] = scaled + rows * (options.scale * own[r, None])
    return direction


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
    """Of a distribution without its target; 0 where the target has everything."""
    log_others = (-logps.expm1()).log()
    others = log_others.exp()
    rest = (entropy + logps.exp() * logps + others * log_others.clamp_min(-1e30)) / others
    return rest.where(others > 0, 0.0)
