"""Per-token log-probabilities straight from hidden states and head weight, for one model or two."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import validation
from powerflow_fast.logprobs.backend import SparsityReport
from powerflow_fast.logprobs.ops import head_forward
from powerflow_fast.logprobs.options import HeadOptions, Route
from powerflow_fast.logprobs.vocab_parallel import plain_tensor, slice_sizes
from powerflow_fast.sequences import to_predictors, to_tokens, without_first


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
    shift: bool
    validate: bool
    check_finite: bool


HEAD_KEYWORDS = tuple(HeadKeywords.__annotations__)


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
    shift: bool = False,
    validate: bool = False,
    check_finite: bool = True,
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
        return_entropy: also return the entropy [nats] of each row, at little cost. `True` is
            differentiable, and a backward pass through it recomputes the logits; `"detached"` has
            no gradient.
        backend: "auto" (triton on a GPU, torch elsewhere), "torch" or "triton".
        grad_tolerance: largest probability mass per row that the gradient may leave out
            (arrangement and check: logprobs/torch_sparse.py). 0 is exact. A gradient through the
            entropy and a `process_group` are always exact, which meets any tolerance.
        process_group: the vocabulary is split over these ranks, rank by rank; `weight` and `bias`
            are this rank's slices (of any size), `hidden` and `targets` the same everywhere. A
            DTensor gives its own slice; without `process_group` it is gathered, once per call.
        round_logits: round logits to the input dtype first, as samplers without a float32 head do.
        shift: hidden and targets come as a model and its tokenizer give them, and hidden[..., t, :]
            predicts targets[..., t + 1]. The result still lies where the tokens lie: column t has
            the log-prob of targets[..., t]. Column 0, which nothing predicts, has 0 as an ignored
            token has. The last axis of targets is one sequence: of packed ones, set the first
            token of each to `ignore_index`. Hidden states are not copied. False: hidden[..., t, :]
            predicts targets[..., t].
        validate: check target values on a GPU too, which synchronises. (On a CPU it is always
            done.) Unchecked, a target outside [0, V) yields NaN for its row.
        check_finite: where values are checked, refuse NaN or inf in hidden, weight or bias that
            reaches a log-prob, at the cost of one look at those. False: NaN in, NaN out, for a
            trainer that watches for it by itself.

    Returns:
        logps [...] float32 [nats], or (logps, entropy).

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    out = head_outputs(
        Head(hidden, weight, bias),
        targets,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        backend=backend,
        grad_tolerance=grad_tolerance,
        process_group=process_group,
        round_logits=round_logits,
        shift=shift,
        validate=validate,
        check_finite=check_finite,
    )
    return out.logps if out.entropy is None else (out.logps, out.entropy)


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
        hidden: [..., H], weight: [V, H], targets: [...] int64, all as in `linear_logprobs`.
        ref_hidden: [..., H] hidden states of the reference, which gets no gradient. If it is
            `hidden` itself and shares its weight, a warning says so.
        ref_weight: [V, H]; None shares the policy's head, its bias included (LoRA). Then one tile
            of the weight serves both models.
        ref_bias: [V] bias of the reference head.
        **keywords: every keyword of `linear_logprobs`, applied to both models.

    Returns:
        (logps, ref_logps), each [...] float32 [nats], 0 where ignored; with `return_entropy` also
        the policy's entropy [...].

    Raises:
        ValueError: naming the argument, what came and what was expected.
        TypeError: for an unknown keyword, with the nearest known one.
    """
    validation.check_keywords("paired_linear_logprobs", keywords, HEAD_KEYWORDS, ("ref_bias",))
    head = Head(hidden, weight, keywords.pop("bias", None))
    ref = Reference(ref_hidden, ref_weight, ref_bias)
    out = head_outputs(head, targets, ref, **keywords)
    warn_if_same(hidden, ref)
    assert out.ref_logps is not None
    pair = (out.logps, out.ref_logps)
    return pair if out.entropy is None else (*pair, out.entropy)


class Reference(NamedTuple):
    """The frozen reference as a caller gives it."""

    hidden: Tensor  # [..., H]
    weight: Tensor | None  # [V, H]; None: it shares the policy's head
    bias: Tensor | None  # [V]


def warn_if_same(hidden: Tensor, ref: Reference) -> None:
    """A hint where the reference is the policy: most often a forgotten `disable_adapter()`."""
    if torch.compiler.is_compiling() or ref.weight is not None or ref.bias is not None:
        return
    if _place(hidden) == _place(ref.hidden):
        warnings.warn(
            "ref_hidden: it is hidden itself, with the same weight: policy and reference are one, "
            "their KL is 0 and only alpha and log_z pull; run the reference's pass inside "
            "disable_adapter(), or with the reference model",
            stacklevel=3,
        )


def _place(x: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors of the same numbers in memory, on any device and without reading it."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


class HeadOutputs(NamedTuple):
    """What one call of the head gives; tensors of tokens are shaped as `targets`."""

    logps: Tensor
    ref_logps: Tensor | None
    entropy: Tensor | None
    sparsity: SparsityReport


def head_outputs(
    head: Head,
    targets: Tensor,
    ref: Reference | None = None,
    *,
    process_group: ProcessGroup | None = None,
    shift: bool = False,
    validate: bool = False,
    check_finite: bool = True,
    **keywords: Any,
) -> HeadOutputs:
    """Check, shift, flatten and call the operator, for all public functions."""
    for name, flag in (("shift", shift), ("validate", validate), ("check_finite", check_finite)):
        validation.check_flag(name, flag)
    options = _options(process_group, **keywords)
    hidden, weight, bias = head
    weight = plain_tensor("weight", weight, process_group)
    bias = plain_tensor("bias", bias, process_group)
    policy, reference = Head(hidden, weight, bias), None
    validation.check_operands(policy, targets, "")
    if ref is not None:
        reference = _checked_reference(ref, policy, targets, process_group)
    if shift:
        validation.check_time_axis(targets)
        targets = to_predictors(without_first(targets, None, options.ignore_index))
    reads = validation.wants_values(targets, validate)
    if reads:
        vocab = weight.shape[0]
        if process_group is not None:
            vocab = int(slice_sizes(weight, process_group).sum())
        validation.check_targets(targets, vocab, options.ignore_index)

    logps, ref_logps, entropy, sparsity = _call(policy, targets.reshape(-1), reference, options)
    if reads and check_finite:
        counted = targets != options.ignore_index
        validation.check_result(logps, policy, counted, "")
        if reference is not None:
            validation.check_result(ref_logps, reference, counted, "ref_")

    def in_place(values: Tensor) -> Tensor:
        values = values.reshape(targets.shape)
        return to_tokens(values) if shift else values

    return HeadOutputs(
        in_place(logps),
        None if reference is None else in_place(ref_logps),
        in_place(entropy) if options.entropy else None,
        SparsityReport(*sparsity.unbind()),
    )


def _options(
    process_group: ProcessGroup | None, return_entropy: bool | str = False, **transform: Any
) -> HeadOptions:
    if not isinstance(process_group, (ProcessGroup, type(None))):
        got = type(process_group).__name__
        raise ValueError(f"process_group: expected a ProcessGroup or None, got {got}")
    if return_entropy not in (True, False, "detached"):
        raise ValueError(
            f"return_entropy: expected True, False or 'detached', got {return_entropy!r}"
        )
    return HeadOptions(
        entropy=bool(return_entropy),
        detach_entropy=return_entropy == "detached",
        group_name=None if process_group is None else process_group.group_name,
        **transform,
    )


def _checked_reference(
    ref: Reference, policy: Head, targets: Tensor, process_group: ProcessGroup | None
) -> Head:
    """The reference's head in plain tensors: the policy's own weight and bias where it shares."""
    ref_hidden, ref_weight, ref_bias = ref
    ref_weight = plain_tensor("ref_weight", ref_weight, process_group)
    ref_bias = plain_tensor("ref_bias", ref_bias, process_group)
    if ref_weight is None and ref_bias is None:
        ref_bias = policy.bias
    ref_weight = policy.weight if ref_weight is None else ref_weight
    reference = Head(ref_hidden, ref_weight, ref_bias)
    validation.check_operands(reference, targets, "ref_")
    if ref_weight.shape[0] != policy.weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected the policy's vocabulary, {policy.weight.shape[0]} rows, "
            f"got {ref_weight.shape[0]}"
        )
    return reference


def _call(
    policy: Head, targets: Tensor, reference: Head | None, options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> logps, ref_logps, entropy, each [N], and the sparsity report [3] of the operator."""
    dtype = _product_dtype(policy.hidden, policy.weight)
    options = replace(options, route=_route(policy, options))
    flat_ref: tuple[Tensor | None, ...] = (None, None, None)
    if reference is not None:
        hidden, weight, bias = _flat(reference, dtype)
        shared = weight is policy.weight
        flat_ref = (
            hidden.detach(),
            None if shared else weight.detach(),
            None if bias is None else bias.detach(),
        )
    logps, ref_logps, entropy, _, _, sparsity, *_ = head_forward(
        *_flat(policy, dtype), targets, *flat_ref, options.encode()
    )
    return logps, ref_logps, entropy, sparsity


def _route(policy: Head, options: HeadOptions) -> Route:
    """How the gradients come about that this call may be asked for."""
    hidden, weight, bias = policy
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (hidden.requires_grad or trains_head):
        return "none"
    whole = options.group_name is None
    if not trains_head:
        return "unit_gradient"
    if whole and options.grad_tolerance > 0:
        return "sparse" if hidden.requires_grad else "recompute"
    return "cache" if whole and options.reads_entropy_only else "recompute"


def _flat(head: Head, dtype: torch.dtype) -> Head:
    """hidden [..., H] -> [N, H] in the product's type; weight [V, H] and bias [V] in their own.

    A back end converts the rows of a weight that it multiplies: no [V, H] copy is kept. A
    bias is added to a product in float32: a rounding to bf16 would move logits by up to 1 in 256.
    """
    hidden, weight, bias = head
    hidden = hidden.to(dtype)
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype if dtype == torch.float64 else torch.float32)
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The autocast type under autocast (never for float64), else the wider of the two."""
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype
