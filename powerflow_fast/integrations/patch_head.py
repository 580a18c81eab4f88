"""`patch_head`: a causal language model of transformers whose forward returns log-probs.

`unpatch_head` undoes it, and `FusedHeadOutput` is what such a forward returns. Only the forward of
the given model is replaced, on the instance; classes and weights stay as they are.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from powerflow_fast.head import linear_logprobs
from powerflow_fast.logprobs.options import HeadOptions, check_door_options
from powerflow_fast.models.lm_head import (
    ModelHead,
    backbone,
    base_model,
    check_head,
    read_head,
    through_head,
    with_positions,
)
from powerflow_fast.models.packing import lay_out
from powerflow_fast.models.packing_check import check_shared

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
LABELS = ("labels", "shift_labels", "num_items_in_batch")
ROWS = 256  # of full logits at a time, for the one statistic that needs them


NO_LOGITS = (
    "logits: a fused head never forms them; read log_probs or loss, ask patch_head for more by "
    "outputs=(...), or call the model with fused_lm_head=False"
)


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a patched model returns: per token [B, T - 1] ([B, T] with `shift_labels`), 0 where the
    label is -100, None where not asked for. Names and meanings are those of TRL.

    There are no `logits`. In their place transformers' Trainer gives `compute_metrics` (as
    `predictions`) and `preprocess_logits_for_metrics` the tuple of all fields that are not None but
    `loss`, in this order. The accuracy of the next token, say, with `outputs=("is_top1",)`::

        def compute_metrics(prediction):
            log_probs, is_top1, label_mask = prediction.predictions
            counted = prediction.label_ids[:, 1:] != -100
            return {"accuracy": is_top1[counted].mean()}

    The labels say what counts: where batches differ in length, Trainer pads every tensor with -100,
    which `label_mask` and `is_top1` turn into True.
    """

    loss: Tensor | None = None  # mean of -log_probs over scored tokens, + weighted aux_loss
    log_probs: Tensor | None = None  # float32 [nats]
    entropy: Tensor | None = None  # [nats], differentiable
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2, no gradient
    mean_logits: Tensor | None = None  # over the vocabulary, after the temperature, no gradient
    is_top1: Tensor | None = None  # bool: no other token is as likely as the label
    label_mask: Tensor | None = None  # bool
    aux_loss: Tensor | None = None  # MoE load balancing, where router logits are asked for

    @property
    def logits(self) -> Tensor:
        raise AttributeError(NO_LOGITS)

    def __getitem__(self, key: Any) -> Any:
        if key == "logits":
            raise KeyError(NO_LOGITS)
        return super().__getitem__(key)


def patch_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    with_labels: bool = False,
    **head: Any,
) -> None:
    """Let `model(..., labels=labels, fused_lm_head=True)` return log-probs instead of logits.

    Only hidden states that predict a label other than -100 reach the head; the logits never exist.
    With `prompt_lengths=` [B], how many real tokens of each row are its prompt, equal prompts are
    computed once, unless router logits are asked for; input_ids and attention_mask are then all
    else that is taken.
    Such a call returns a `FusedHeadOutput`, or with `return_dict=False` the tuple of its fields
    that are not None. Other calls, and so generation, are unchanged. `unpatch_head` undoes it.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        temperature: > 0; logits are divided by it.
        cast_lm_head_to_fp32: score in float32, outside autocast.
        outputs: the fields of `FusedHeadOutput` to compute, of `FIELDS`.
        with_labels: make every call with labels such a call, so that a trainer which reads
            `outputs.loss` (transformers' own, for one) needs no other change.
        **head: `backend`, `grad_tolerance`, `round_logits` of `linear_logprobs`. Options from an
            earlier call for this model stay, unless they are given anew.

    Raises:
        ValueError: for a model without a decoder, a head that is missing, adapted, quantised or
            not linear, an unknown logit transform, an unknown field or option.
    """
    unknown = [outputs] if isinstance(outputs, str) else sorted(set(outputs) - set(FIELDS))
    if unknown:
        raise ValueError(f"outputs: expected a choice of {FIELDS}, got {unknown}")
    check_door_options(head)
    model = _patchable(model)
    head = getattr(model, "_fused_head_options", {}) | head
    options = HeadOptions(temperature=temperature, **head)
    statistics = functools.partial(_statistics, options=options, outputs=outputs)
    check_head(model)
    patches = getattr(model, "_fused_head_patches", ())

    # The signature stays, at which generate() and Trainer look, not by `__wrapped__`: what takes
    # wrappers off, as unwrap_model of accelerate does, would take the patch off too.
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=None, **inputs):
        inputs = {k: v for k, v in inputs.items() if v is not None or k not in LABELS}
        has_labels = "labels" in inputs or "shift_labels" in inputs
        if not (with_labels and has_labels if fused_lm_head is None else fused_lm_head):
            return _forward_before(self, len(patches), *args, **inputs)
        if not has_labels or len(args) > 1:
            raise ValueError("fused_lm_head: expected labels, and by keyword all but input_ids")
        return _score(self, statistics, cast_lm_head_to_fp32, *args, **inputs)

    vars(forward)["__signature__"] = inspect.signature(forward)
    del vars(forward)["__wrapped__"]
    vars(model)["_fused_head_patches"] = (*patches, (forward, vars(model).get("forward")))
    model.forward = types.MethodType(forward, model)
    vars(model)["_fused_head_options"] = head


def unpatch_head(model: PreTrainedModel) -> None:
    """Undo every `patch_head` of `model`: its forward is the one from before. Twice is once.

    Args:
        model: a causal language model of transformers, or a PeftModel around one, patched or not.

    Raises:
        ValueError: where something else has wrapped the forward since.
    """
    model = _patchable(model)
    patches, forward = vars(model).get("_fused_head_patches", ()), vars(model).get("forward")
    for patch, before in reversed(patches):
        if getattr(forward, "__func__", None) is not patch:
            raise ValueError(
                f"model: the forward of {type(model).__name__} was wrapped after patch_head, by "
                "accelerate for one; undo that first (accelerator.unwrap_model(model, "
                "keep_fp32_wrapper=False))"
            )
        forward = before
    if patches:
        if forward is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = forward
        del vars(model)["_fused_head_patches"], vars(model)["_fused_head_options"]


def _patchable(model: Any) -> PreTrainedModel:
    """The model of transformers in `model`, whose forward everything around it calls."""
    inner = base_model(model)
    if not hasattr(inner, "get_output_embeddings"):
        raise ValueError(f"model: expected one of transformers, unwrapped, got {type(model)}")
    tuner = getattr(model, "base_model", model)
    if model is not inner and tuner is not inner and "forward" in vars(tuner):
        raise ValueError(
            f"model: {type(tuner).__name__} has kept the forward of the model from before; patch "
            "or unpatch the model first, then put the adapter on"
        )
    return inner


def _forward_before(model: PreTrainedModel, patch: int, *args: Any, **kwargs: Any) -> Any:
    """Run the forward that patch number `patch` covers: the model's instance holds it, no closure,
    so that a copy of the model runs the copy's."""
    patches: Any = model._fused_head_patches
    before = patches[patch][1] or functools.partial(type(model).forward, model)
    return before(*args, **kwargs)


def _score(
    model: PreTrainedModel,
    statistics: Callable[[Tensor, Tensor, ModelHead], dict[str, Tensor]],
    in_fp32: bool,
    *args: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **inputs: Any,
) -> FusedHeadOutput | tuple[Tensor, ...]:
    """The forward pass of a patched model.

    `inputs` are those of its own forward, with `labels` or `shift_labels` [B, T].
    """
    name = "shift_labels" if "shift_labels" in inputs else "labels"
    labels = inputs.pop(name)
    inputs.pop("labels", None)
    config = model.config.get_text_config()
    inputs["use_cache"] = False
    as_tuple = inputs.pop("return_dict", None) is False
    if getattr(config, "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    if inputs.get("output_router_logits"):  # the balance of experts is over every row's tokens
        inputs.pop("prompt_lengths", None)
    of_model = _shared_states if "prompt_lengths" in inputs else _states
    hidden, labels, router_logits = of_model(model, name, labels, *args, **inputs)
    # A model split over devices (`device_map`) may end on another one than its head.
    head = read_head(model)
    hidden, labels = (x.to(head.weight.device) for x in (hidden, labels))
    mask = labels != -100
    context = torch.autocast(hidden.device.type, enabled=False) if in_fp32 else nullcontext()
    with context:
        rows = hidden.float() if in_fp32 else hidden
        targets = labels[mask]
        fields = through_head(model, head, lambda rows, head: statistics(rows, targets, head), rows)
    # Scattered with a graph, so that a batch with nothing to score gives a connected zero.
    fields = {k: v.new_zeros(mask.shape).masked_scatter(mask, v) for k, v in fields.items()}
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, aux_loss = -fields["log_probs"].sum() / count, None
    if inputs.get("output_router_logits"):
        aux_loss = _aux_loss(model, router_logits, inputs.get("attention_mask"))
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
    found = FusedHeadOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)
    return found.to_tuple() if as_tuple else found


def _states(
    model: PreTrainedModel, name: str, labels: Tensor, *args: Tensor, **inputs: Any
) -> tuple[Tensor, Tensor, Any]:
    """States [N, H] that predict labels other than -100, the labels by state [B, T], and what the
    routers of experts gave."""
    inner = backbone(model)
    out = inner(*args, **with_positions(inner, inputs))
    hidden = out.last_hidden_state
    _check_labels(name, labels, hidden.shape[:-1])
    if name == "labels":
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    scored = (labels != -100).to(hidden.device)
    return hidden[scored], labels, getattr(out, "router_logits", None)


def _shared_states(
    model: PreTrainedModel,
    name: str,
    labels: Tensor,
    input_ids: Tensor,
    *,
    prompt_lengths: Tensor,
    attention_mask: Tensor | None = None,
    use_cache: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor, None]:
    """As `_states`, with equal prompts computed once."""
    if others:
        raise ValueError(f"prompt_lengths: expected no {', '.join(sorted(others))} beside it")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    _check_labels(name, labels, input_ids.shape)
    real = mask.sum(1)
    fits = prompt_lengths.shape == real.shape and bool((prompt_lengths <= real).all())
    if not fits or bool((prompt_lengths < 1).any()):
        raise ValueError(
            "prompt_lengths: expected a number for each row, 1 to its real tokens "
            f"{real.tolist()}, got {prompt_lengths.tolist()}"
        )
    check_shared(model)
    rows = lay_out(input_ids, mask, prompt_lengths, "shared")
    hidden = rows.hidden_states(model)
    if name == "labels":
        labels = labels[:, 1:]
        return rows.predicting(hidden, labels != -100), labels, None
    return hidden[rows.index[labels != -100].to(hidden.device)], labels, None


def _check_labels(name: str, labels: Tensor, expected: Sequence[int]) -> None:
    if labels.shape != expected:
        raise ValueError(f"{name}: expected [B, T] = {tuple(expected)}, got {tuple(labels.shape)}")


def _statistics(
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    head: ModelHead,
    options: HeadOptions,
    outputs: tuple[str, ...],
) -> dict[str, Tensor]:  # each [N]
    """The fields of `FusedHeadOutput` in `outputs`, and always log_probs."""
    temperature = options.temperature
    keywords: dict[str, Any] = {"backend": options.backend, "round_logits": options.round_logits}
    # As the model's own forward, it gives NaN for NaN: to stop is the trainer's business.
    keywords |= {"bias": head.bias, "check_finite": False, **head.transform}

    def logprobs(temperature: float, rows: Any = slice(None), **more: Any) -> Any:
        more |= {"temperature": temperature, **keywords}
        return linear_logprobs(hidden[rows], head.weight, targets[rows], **more)

    entropy = "entropy" in outputs or ("is_top1" in outputs and "detached")
    out = logprobs(temperature, return_entropy=entropy, grad_tolerance=options.grad_tolerance)
    fields = dict(zip(("log_probs", "entropy"), out if entropy else (out,), strict=False))
    logps = fields["log_probs"].detach()
    with torch.no_grad():
        if "log_sum_sq_probs" in outputs:
            # At half the temperature log p becomes 2 z - logsumexp(2 z).
            fields["log_sum_sq_probs"] = 2 * logps - logprobs(temperature / 2)
        if "mean_logits" in outputs:
            fields["mean_logits"] = _mean_logits(hidden, head) / temperature
        if "is_top1" in outputs:
            # More than half of the mass decides it, and so does less than exp(-entropy), which the
            # largest probability always reaches. For the rest, near temperature 0 only the most
            # likely token keeps more than half.
            top1 = logps > -math.log(2)
            rows = (~top1 & (logps > -fields["entropy"] - 1e-3)).nonzero()[:, 0]
            top1[rows] = logprobs(1e-5 * temperature, rows) > -math.log(2)
            fields["is_top1"] = top1
    return {name: fields[name] for name in FIELDS if name in (*outputs, "log_probs")}


def _mean_logits(hidden: Tensor, head: ModelHead) -> Tensor:  # [N]
    """Mean over the vocabulary: one product with the mean row of the weight, if nothing bends."""
    scale, cap = head.transform["logit_scale"], head.transform["softcap"]
    if cap is None:
        mean = (hidden.float() * head.weight.mean(0, dtype=torch.float32)).sum(-1)
        return scale * (mean if head.bias is None else mean + head.bias.float().mean())
    means = []
    for rows in hidden.to(head.weight.dtype).split(ROWS):
        z = scale * torch.nn.functional.linear(rows, head.weight, head.bias).float()
        means.append(cap * torch.tanh(z / cap).mean(-1))
    return torch.cat(means) if means else hidden.new_zeros(0, dtype=torch.float32)


def _aux_loss(model: PreTrainedModel, router_logits, attention_mask: Tensor | None) -> Any:
    """The load-balancing loss of the model's own family; Mixtral's where it defines none."""
    from transformers.models.mixtral import modeling_mixtral

    family = sys.modules[type(model).__module__]
    balance = getattr(family, "load_balancing_loss_func", modeling_mixtral.load_balancing_loss_func)
    config = model.config.get_text_config()
    return balance(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
