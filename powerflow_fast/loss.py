"""The length-aware Trajectory-Balance objective: the one place where the loss maths lives.

For a completion y of |y| counted tokens, with means over those tokens (arXiv 2603.18363, eq. 10):

    residual = log Z' + mean log pi(y) - alpha * (mean log p_ref(y) + psi)        [nats/token]
    loss     = sum over sequences of  w * residual^2  / number of sequences
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from powerflow_fast.head import HEAD_KEYWORDS, HeadKeywords, Reference, head_outputs, warn_if_same
from powerflow_fast.kernels.operands import BALANCES, Head
from powerflow_fast.logprobs import validation
from powerflow_fast.logprobs.choice import choose_backend
from powerflow_fast.logprobs.ops import sequence_residual
from powerflow_fast.logprobs.options import BACKENDS
from powerflow_fast.sequences import Sequences, without_first

IMPORTANCES = ("mean", "sum")


class TBKeywords(TypedDict, total=False):
    """The keywords that `tb_loss` and the fused loss share, beside `log_z` and `alpha`."""

    cu_seqlens: Tensor | None
    mask: Tensor | None
    psi: Tensor | float | None
    old_logps: Tensor | None
    clip_eps: float
    balance: str
    importance: str
    normalizer: Tensor | float | None
    group_size: int | None
    group_ids: Tensor | None


class FusedKeywords(HeadKeywords, TBKeywords, total=False):
    """The head's keywords, and the objective's."""


TB_KEYWORDS = ("log_z", "alpha", "ref_logps", "ref_bias", *TBKeywords.__annotations__)


class TBOutput(NamedTuple):
    """What the loss returns. Tokens have the layout of the input, sequences are counted S."""

    loss: Tensor  # scalar
    logps: Tensor  # [B, T] or [N] policy log-probs, 0 where not counted
    ref_logps: Tensor  # likewise, of the reference
    residual: Tensor  # [S] nats/token, 0 for an empty sequence
    importance: Tensor  # [S] detached, clipped
    lengths: Tensor  # [S] counted tokens, int64
    metrics: dict[str, Tensor]  # detached 0-dim tensors; only reading them synchronises
    entropy: Tensor | None = None  # as logps, only with `return_entropy`


def tb_loss(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    log_z: Tensor | float | str,
    alpha: Tensor | float,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    psi: Tensor | float | None = None,
    old_logps: Tensor | None = None,
    clip_eps: float = 0.2,
    balance: str = "length",
    importance: str = "mean",
    normalizer: Tensor | float | None = None,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
    check_finite: bool = True,
) -> TBOutput:
    """LA-TB loss of token log-probs (arXiv 2603.18363, eq. 10).

    Args:
        logps: policy log-probs [nats], padded [B, T] or packed [N]. Half-precision ones are
            summed in float32.
        ref_logps: log-probs of the frozen reference, same shape; gets no gradient.
        log_z: log Z' [nats/token]: a number or float32 [S] (it may require a gradient), or
            "group": the detached mean of alpha * (l_ref + psi) - l_pi over the completions of one
            prompt (VarGrad form), given by `group_size` or `group_ids`.
        alpha: power of the reference to match, > 0; a number or [S]; gets no gradient.
        cu_seqlens: [S + 1] int32 offsets of packed sequences, as flash-attn's. Padded: S = B.
        mask: same shape as logps, true or 1 where a token counts. Default: all.
        psi: format term [nats/token] added to the reference's mean log-prob; a number or [S]; gets
            no gradient.
        old_logps: log-probs by the policy that sampled, same shape as logps. They give the detached
            weight w = exp(mean over tokens of logps - old_logps), clipped to 1 -+ clip_eps.
        balance: "length" (LA-TB); "trajectory": sums instead of means (plain TB); "token": a sum
            for the policy, a mean for the reference. The latter two are for comparison.
        importance: "mean" as above; "sum" takes the ratio of whole sequences.
        normalizer: sequences over all micro-batches and ranks. Default: this call's non-empty ones.
        group_size: completions of one prompt are consecutive, this many each.
        group_ids: [S] integers, equal for completions of one prompt.
        backend: as in `linear_logprobs`; the triton one forms the residuals in one kernel.
        validate: check values on a GPU too, which synchronises. On a CPU it is always done.
        check_finite: where values are checked, refuse logps that are not finite.

    An empty sequence counts for nothing. With no counted token the loss is 0 and still has a graph.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    validation.check_choice("balance", balance, tuple(BALANCES))
    validation.check_choice("importance", importance, IMPORTANCES)
    validation.check_choice("backend", backend, BACKENDS)
    validation.check_number("clip_eps", clip_eps)
    psi = 0.0 if psi is None else psi
    logps, ref_logps = _wide("logps", logps), _wide("ref_logps", ref_logps)
    old_logps = None if old_logps is None else _wide("old_logps", old_logps)
    alpha, psi = (x.detach() if isinstance(x, Tensor) else x for x in (alpha, psi))
    sequences = Sequences.of(logps, cu_seqlens, mask, validate)
    for name, values in (("logps", logps), ("ref_logps", ref_logps), ("old_logps", old_logps)):
        if values is not None:
            sequences.check_tokens(name, values)
            if check_finite or name != "logps":
                validation.check_finite(name, sequences.counted_only(values), validate)
    count = sequences.count
    validation.check_per_sequence("alpha", alpha, count, validate, positive=True)
    validation.check_per_sequence("psi", psi, count, validate)
    validation.check_log_z(log_z, count, group_size, group_ids, validate)

    delta0 = _residual_without_log_z(sequences, logps, ref_logps, alpha, psi, balance, backend)
    counted = sequences.lengths > 0
    if isinstance(log_z, str):
        log_z = _group_mean(-delta0.detach(), counted, group_size, group_ids)
    residual = (log_z + delta0).where(counted, 0.0)

    raw, weight = _importance(sequences, logps, old_logps, clip_eps, importance)
    if normalizer is None:
        normalizer = counted.sum().clamp(min=1)
    elif not isinstance(normalizer, Tensor):
        validation.check_number("normalizer", normalizer, positive=True)
    elif normalizer.dim() or (validation.wants_values(normalizer, validate) and not normalizer > 0):
        raise ValueError(f"normalizer: expected a number of sequences > 0, got {normalizer}")
    loss = (weight * residual.square()).sum() / normalizer

    logps, ref_logps = sequences.counted_only(logps), sequences.counted_only(ref_logps)
    old = logps if old_logps is None else sequences.counted_only(old_logps)
    lengths, metrics = sequences.lengths, {"loss": loss.detach()}
    metrics |= _metrics(lengths, logps, ref_logps, old, residual, log_z, raw, weight)
    return TBOutput(loss, logps, ref_logps, residual, weight, lengths, metrics)


def fused_linear_tb_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    *,
    log_z: Tensor | float | str,
    alpha: Tensor | float,
    ref_logps: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **keywords: Unpack[FusedKeywords],
) -> TBOutput:
    """The LA-TB loss from hidden states: `tb_loss(*paired_linear_logprobs(...))` in one call.

    Args:
        hidden: [B, T, H] padded or [N, H] packed, fp32/bf16/fp16. hidden[t] predicts targets[t]:
            both are shifted already. As a model and its tokenizer give them, pass `shift=True`.
        weight: [V, H] head weight. Frozen (LoRA), it costs no [V, H] buffer.
        targets: [B, T] or [N] int64. A token counts where `mask` is true and its target is not
            `ignore_index`.
        ref_hidden, ref_weight, ref_bias: the frozen reference, as in `paired_linear_logprobs`.
        ref_logps: the reference's log-probs [B, T] or [N] float, instead of `ref_hidden`.
        log_z, alpha: as in `tb_loss`.
        **keywords: every other keyword of `tb_loss`, and every keyword of `linear_logprobs`. With
            `shift=True` hidden[t] predicts targets[t + 1] of the same sequence. Everything else,
            `mask`, `old_logps` and `ref_logps` as well as the result, lies where the tokens lie:
            place t belongs to targets[t]. The first token of a sequence (`cu_seqlens`) has no
            prediction and never counts, whatever the mask says.

    Returns:
        `TBOutput` as `tb_loss` gives, with the policy's entropy where `return_entropy` asks for it.

    Raises:
        ValueError: naming the argument, what came and what was expected.
        TypeError: for an unknown keyword, with the nearest known one.
    """
    validation.check_keywords("fused_linear_tb_loss", keywords, HEAD_KEYWORDS, TB_KEYWORDS)
    head: Any = keywords  # less the objective's
    objective = {name: head.pop(name) for name in TBKeywords.__annotations__ if name in head}
    if (ref_hidden is None) == (ref_logps is None):
        raise ValueError("ref_hidden, ref_logps: expected exactly one of the two")
    validation.check_tensor("targets", targets)
    ignore_index, validate = head.get("ignore_index", -100), head.get("validate", False)
    mask, cu_seqlens = objective.pop("mask", None), objective.get("cu_seqlens")
    if mask is not None:
        mask = validation.check_mask("mask", mask, targets.shape, "targets", validate)
        targets = targets.where(mask, ignore_index)
    if head.get("shift"):
        if cu_seqlens is not None:
            validation.check_packed("targets", targets, cu_seqlens, validate)
        validation.check_time_axis(targets)
        targets = without_first(targets, cu_seqlens, ignore_index)
    ref = None
    if ref_hidden is not None:
        ref = Reference(ref_hidden, ref_weight, ref_bias)
    elif ref_weight is not None or ref_bias is not None:
        raise ValueError("ref_weight, ref_bias: expected only together with ref_hidden")
    out = head_outputs(Head(hidden, weight, head.pop("bias", None)), targets, ref, **head)
    if ref is not None:
        warn_if_same(hidden, ref)
    ref_logps = out.ref_logps if ref_logps is None else ref_logps
    assert ref_logps is not None
    result = tb_loss(
        out.logps,
        ref_logps,
        log_z=log_z,
        alpha=alpha,
        mask=targets != ignore_index,
        backend=head.get("backend", "auto"),
        validate=validate,
        check_finite=head.get("check_finite", True),
        **objective,
    )
    metrics = dict(result.metrics)
    if out.entropy is not None:
        metrics["entropy"] = out.entropy.detach().sum() / result.lengths.sum().clamp(min=1)
    if head.get("grad_tolerance", 0.0) > 0:
        metrics |= out.sparsity._asdict()
    return result._replace(entropy=out.entropy, metrics=metrics)


class FusedLinearTBLoss(nn.Module):
    """`fused_linear_tb_loss` as an object: options here, tensors in the call.

    Called as `loss_fn(hidden, weight, targets, ref_hidden, ...)`, or with the weight first as
    Liger's modules are: the tensor whose leading shape is that of `targets` is the hidden states.
    (Where both are, pass them by keyword, or hidden first.) The result is that of the function.

    Args:
        alpha, log_z: as in `fused_linear_tb_loss`, which has no default for them either: give
            each here or in the call. "group" needs `group_size` or `group_ids`.
        **options: any other keyword of `fused_linear_tb_loss`, `shift` for one. The call may give
            options too, which count instead of those given here.

    Raises:
        ValueError: here for an unknown balance or importance; in the call as the function does,
            and without an alpha or a log_z.
        TypeError: for an unknown keyword, with the nearest known one.
    """

    def __init__(
        self,
        alpha: Tensor | float | None = None,
        log_z: Tensor | float | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        validation.check_keywords("FusedLinearTBLoss", options, HEAD_KEYWORDS, TB_KEYWORDS)
        validation.check_choice("balance", options.get("balance", "length"), tuple(BALANCES))
        validation.check_choice("importance", options.get("importance", "mean"), IMPORTANCES)
        given = {"alpha": alpha, "log_z": log_z}
        self.options = {name: value for name, value in given.items() if value is not None}
        self.options |= options

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        **options: Any,
    ) -> TBOutput:
        for name, value in (("hidden", hidden), ("weight", weight), ("targets", targets)):
            validation.check_tensor(name, value)
        if hidden.shape[:-1] != targets.shape and weight.shape[:-1] == targets.shape:
            hidden, weight = weight, hidden
        options = {**self.options, **options}
        for name in ("alpha", "log_z"):
            if name not in options:
                raise ValueError(f"{name}: expected in FusedLinearTBLoss(...) or in its call")
        return fused_linear_tb_loss(hidden, weight, targets, ref_hidden, ref_weight, **options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _residual_without_log_z(
    sequences: Sequences,
    logps: Tensor,
    ref_logps: Tensor,
    alpha: Tensor | float,
    psi: Tensor | float,
    balance: str,
    backend: str,
) -> Tensor:  # [S]
    """l_pi - alpha (l_ref + psi), with means or sums by `balance`; differentiable in logps."""
    ref_logps = ref_logps.detach()
    if choose_backend(backend, logps.device, logps.dtype)[0] == "triton":
        mask = None if sequences.mask is None else sequences.mask.reshape(-1)
        per_sequence = [_on_device(x, logps) for x in (alpha, psi)]
        delta0, _ = sequence_residual(
            logps.reshape(-1).float(),
            ref_logps.reshape(-1).float(),
            *sequences.bounds(),
            mask,
            *(x.float().expand(sequences.count).contiguous() for x in per_sequence),
            balance,
        )
        return delta0
    policy_term, ref_term = sequences.sum(logps), sequences.sum(ref_logps)
    length = sequences.lengths.clamp(min=1)
    mean_policy, mean_reference = BALANCES[balance]
    policy_term = policy_term / length if mean_policy else policy_term
    ref_term = ref_term / length if mean_reference else ref_term
    return policy_term - alpha * (ref_term + psi)


def _wide(name: str, values: Tensor) -> Tensor:
    """In float32 at least: a sum of thousands of log-probs has no digits left in a 16-bit type."""
    validation.check_tensor(name, values)
    if not values.is_floating_point():
        raise ValueError(f"{name}: expected a tensor of floating-point numbers, got {values.dtype}")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _on_device(value: Tensor | float, like: Tensor) -> Tensor:
    """A number is filled in, not copied from the host: a copy could not be captured in a graph."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), value)


def _group_mean(
    estimate: Tensor,  # [S]
    counted: Tensor,  # [S] bool
    group_size: int | None,
    group_ids: Tensor | None,
) -> Tensor:  # [S]
    """Mean over the non-empty sequences of each group, given to all of its members."""
    if group_ids is None:
        assert group_size is not None
        group_ids = torch.arange(len(estimate), device=estimate.device) // group_size
    # [S, S] instead of a scatter: no atomics and no need to know the number of groups.
    same = (group_ids[:, None] == group_ids) & counted
    total = estimate.where(same, 0.0).sum(1)
    return total / same.sum(1).clamp(min=1)


def _importance(
    sequences: Sequences, logps: Tensor, old_logps: Tensor | None, clip_eps: float, importance: str
) -> tuple[Tensor, Tensor]:
    """Detached sequence weights [S], as they are and clipped."""
    if old_logps is None:
        ones = logps.new_ones(sequences.count)
        return ones, ones
    log_ratio = sequences.sum((logps - old_logps).detach())
    if importance == "mean":
        log_ratio = log_ratio / sequences.lengths.clamp(min=1)
    raw = log_ratio.exp()
    return raw, raw.clamp(1.0 - clip_eps, 1.0 + clip_eps)


@torch.no_grad()
def _metrics(
    lengths: Tensor,  # [S]
    logps: Tensor,  # tokens, 0 where not counted
    ref_logps: Tensor,  # likewise
    old: Tensor,  # likewise, of the policy that drew
    residual: Tensor,  # [S]
    log_z: Tensor | float,
    raw_weight: Tensor,  # [S] before clipping
    weight: Tensor,  # [S]
) -> dict[str, Tensor]:
    """Health of the run: means over non-empty sequences, or over counted tokens; all 0-dim."""
    counted = lengths > 0
    sequences, tokens = counted.sum().clamp(min=1), lengths.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.where(counted, 0.0).sum() / sequences

    residual_mean = mean(residual)
    return {
        "residual_mean": residual_mean,
        "residual_std": mean((residual - residual_mean).square()).sqrt(),
        "policy_logp": logps.sum() / tokens,
        "ref_logp": ref_logps.sum() / tokens,
        "log_z": mean(_on_device(log_z, residual).expand(len(residual))),
        # Schulman's k3 estimator of KL(policy || reference), each token weighed by who drew it.
        "kl": ((logps - old).exp() * ((ref_logps - logps).expm1() - ref_logps + logps)).sum()
        / tokens,
        "importance_mean": mean(weight),
        "clipped_share": mean((raw_weight != weight).to(residual.dtype)),
        "length_mean": mean(lengths.to(residual.dtype)),
        "length_min": lengths.min() if len(lengths) else lengths.sum(),
        "length_max": lengths.max() if len(lengths) else lengths.sum(),
        "zero_length_count": (~counted).sum(),
    }
