"""Per-token log-probabilities straight from hidden states and head weight, for one model or two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from powerflow_fast import validation
from powerflow_fast.ops import head_forward
from powerflow_fast.options import HeadOptions
from powerflow_fast.vocab_parallel import resolve_group


class HeadKeywords(TypedDict, total=False):
    """The keywords that `linear_logprobs`, `paired_linear_logprobs` and the fused loss share."""

    bias: Tensor | None
    temperature: float
    logit_scale: float
    softcap: float | None
    ignore_index: int
    return_entropy: bool | str
    backend: str
    grad_tolerance: float
    process_group: ProcessGroup | None
    round_logits: bool
    validate: bool


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool | str = False,
    backend: str = "auto",
    grad_tolerance: float = 0.0,
    process_group: ProcessGroup | None = None,
    round_logits: bool = False,
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, in float32, without ever holding the [tokens, vocab] logits.

    Equal to, and differentiable like::

        z = logit_scale * (hidden.float() @ weight.float().T + bias)
        z = softcap * torch.tanh(z / softcap) / temperature
        logps = z.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        logps[targets == ignore_index] = 0

    Args:
        hidden: [..., H] final hidden states, fp32/bf16/fp16 (float64 is computed in float64).
        weight: [V, H] head weight; under autocast both are cast to the autocast type.
        targets: [...] int64 token ids in [0, V) or `ignore_index`.
        bias: [V].
        temperature, logit_scale, softcap: the logit transform above; temperature > 0, softcap > 0.
        return_entropy: also return the entropy [nats] of each row. `True` is differentiable and
            takes the recompute route in backward; `"detached"` has no gradient and costs little.
        backend: "auto" (triton on a GPU, torch elsewhere), "torch" or "triton".
        grad_tolerance: largest probability mass per row that the gradient may leave out. Every
            route in this version is exact, which meets any tolerance.
        process_group: the vocabulary is split over these ranks in equal slices, rank by rank;
            `weight` and `bias` are this rank's slices, `hidden` and `targets` the same everywhere.
        round_logits: round logits to the input dtype first, as samplers without a float32 head do.
        validate: check target values on a GPU too, which synchronises. (On a CPU it is always
            done.) Unchecked, a target outside [0, V) yields NaN for its row.

    Returns:
        logps [...] float32 [nats], or (logps, entropy).

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    options = HeadOptions(
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        round_logits=round_logits,
        entropy=_wants_entropy(return_entropy),
        backend=backend,
        group_name=_group_name(process_group),
    )
    validation.check_grad_tolerance(grad_tolerance)
    logps, _, entropy = _head(
        (hidden, weight, bias), targets, None, options, return_entropy == "detached", validate
    )
    return (logps, entropy) if options.entropy else logps


def paired_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None = None,
    *,
    ref_bias: Tensor | None = None,
    **keywords: Unpack[HeadKeywords],
) -> tuple[Tensor, ...]:
    """Log-probs of policy and frozen reference for the same targets, computed together.

    Args:
        hidden, weight, targets: the policy's, as in `linear_logprobs`.
        ref_hidden: [..., H] hidden states of the reference, which gets no gradient.
        ref_weight: [V, H]; None shares the policy's head, its bias included (LoRA). Then one tile
            of the weight serves both models.
        ref_bias: [V] bias of the reference head.
        **keywords: every keyword of `linear_logprobs`, applied to both models.

    Returns:
        (logps, ref_logps), each [...] float32, 0 where ignored; with `return_entropy` also the
        policy's entropy.
    """
    rest: dict[str, Any] = dict(keywords)
    bias = rest.pop("bias", None)
    return_entropy = rest.pop("return_entropy", False)
    validate = rest.pop("validate", False)
    validation.check_grad_tolerance(rest.pop("grad_tolerance", 0.0))
    options = HeadOptions(
        entropy=_wants_entropy(return_entropy),
        group_name=_group_name(rest.pop("process_group", None)),
        **rest,
    )
    ref = (ref_hidden, ref_weight, bias if ref_weight is None and ref_bias is None else ref_bias)
    logps, ref_logps, entropy = _head(
        (hidden, weight, bias), targets, ref, options, return_entropy == "detached", validate
    )
    return (logps, ref_logps, entropy) if options.entropy else (logps, ref_logps)


def _head(
    policy: tuple[Tensor, Tensor, Tensor | None],
    targets: Tensor,
    ref: tuple[Tensor, Tensor | None, Tensor | None] | None,
    options: HeadOptions,
    detach_entropy: bool,
    validate: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check, flatten, choose the route and call the operator; results are shaped as `targets`."""
    hidden, weight, bias = policy
    validation.check_head(hidden, weight, bias, targets, "")
    if ref is not None:
        ref_weight = weight if ref[1] is None else ref[1]
        validation.check_head(ref[0], ref_weight, ref[2], targets, "ref_")
        if ref_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"ref_weight: expected the policy's vocabulary, {weight.shape[0]} rows, "
                f"got {ref_weight.shape[0]}"
            )
    if validation.wants_values(targets, validate):
        slices = 1 if options.group_name is None else resolve_group(options.group_name).size()
        validation.check_targets(targets, weight.shape[0] * slices, options.ignore_index)

    dtype = _product_dtype(hidden, weight)
    flat = _flat(policy, dtype)
    flat_ref: tuple[Tensor | None, ...] = (None, None, None)
    if ref is not None:
        flat_ref = _flat([None if x is None else x.detach() for x in ref], dtype)
    # The exact route needs nothing but the upstream gradient of logps; a trained head, bias or
    # entropy needs the logits once more anyway, and so does a vocabulary split over ranks.
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    differentiable_entropy = options.entropy and not detach_entropy
    exact = not (trains_head or differentiable_entropy or options.group_name)
    want_direction = torch.is_grad_enabled() and hidden.requires_grad and exact
    logps, ref_logps, entropy, _, _ = head_forward(
        *flat, targets.reshape(-1), *flat_ref, options.encode(), want_direction
    )
    shape = targets.shape
    if options.entropy:
        entropy = (entropy.detach() if detach_entropy else entropy).reshape(shape)
    return (
        logps.reshape(shape),
        ref_logps.reshape(shape) if ref is not None else None,
        entropy if options.entropy else None,
    )


def _flat(
    model: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden [..., H] -> [N, H], weight [V, H] and bias [V], in the product's type."""
    hidden, weight, bias = (x if x is None else x.to(dtype) for x in model)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The autocast type under autocast (never for float64), else the wider of the two."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _wants_entropy(return_entropy: bool | str) -> bool:
    if return_entropy not in (True, False, "detached"):
        raise ValueError(
            f"return_entropy: expected True, False or 'detached', got {return_entropy!r}"
        )
    return bool(return_entropy)


def _group_name(process_group: ProcessGroup | None) -> str | None:
    return None if process_group is None else process_group.group_name
