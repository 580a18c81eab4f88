"""How a causal language model turns its last hidden states into logits, read in one place.

Known forms are `softcap(scale * (hidden @ weight.T + bias))`, with the scale and the cap named
differently by each family (below, read from transformers 5.23). A head that carries an adapter, is
quantised, or does anything else first is refused: the loss would silently be another model's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from powerflow_fast.logprobs.vocab_parallel import plain_tensor
from powerflow_fast.models.parameters import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
# The plain formula is known to be wrong here: a layer before the head, or sliced logits.
REFUSED_CONFIG = ("logits_mup_width_multiplier", "unpadded_vocab_size")
REFUSED_MODELS = (
    "bert big_bird camembert data2vec-text electra ernie megatron-bert modernbert-decoder "
    "prophetnet rembert roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl "
    "xmod"
).split()
TOKENS = 8  # of a trial
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TYPES = (Tensor, nn.Parameter, DTensor)  # quantised tensors claim a plain dtype


class ModelHead(NamedTuple):
    """The language-model head; `transform` holds keywords of `linear_logprobs`."""

    weight: Tensor  # [V, H], a parameter where nothing is merged into it
    bias: Tensor | None  # [V]
    transform: dict[str, Any]  # logit_scale, softcap


def read_head(model: PreTrainedModel) -> ModelHead:
    """Weight, bias and logit transform of `model`'s output layer (for PEFT: of the base model).

    Inside `disable_adapter()`, a head listed in `modules_to_save` is read as the base's own.

    Raises:
        ValueError: where the head is missing, adapted, quantised, or of an unknown form.
    """
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model: expected one of transformers, unwrapped, got {type(model)}")
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    # ZeRO-3 leaves an empty tensor that remembers its shape.
    if not isinstance(weight, torch.Tensor) or len(getattr(weight, "ds_shape", weight.shape)) != 2:
        raise ValueError(
            f"{type(model).__name__}: expected a linear output layer with weight [V, H], got "
            f"{type(layer).__name__}; a quantised head must be excluded from quantisation "
            "(llm_int8_skip_modules=['lm_head'])"
        )
    if hasattr(layer, "base_layer"):  # PEFT's BaseTunerLayer
        raise ValueError(
            "the head (lm_head) carries an adapter, which reading its weight would ignore: remove "
            "it from target_modules, or train the whole head with modules_to_save"
        )
    if weight.dtype not in PLAIN_DTYPES or type(weight) not in PLAIN_TYPES:
        raise ValueError(
            f"the head's weight is a {type(weight).__name__} of {weight.dtype}: exclude the head "
            "from quantisation (llm_int8_skip_modules=['lm_head'])"
        )
    if weight.is_meta and hasattr(layer, "_hf_hook"):
        raise ValueError(
            "the head (lm_head) is offloaded by device_map: give it a device, "
            "device_map={..., 'lm_head': 0}, or more memory"
        )
    # Read once: PEFT's trainable tokens form a merged [V, H] at every look.
    return ModelHead(weight, getattr(layer, "bias", None), logit_transform(model.config))


def _whole(head: ModelHead) -> ModelHead:
    """Gathered where it is an FSDP2 unit of its own (else FSDP2 has done that)."""
    weight, bias = (plain_tensor("lm_head", x, None) for x in (head.weight, head.bias))
    return head._replace(weight=weight, bias=bias)


def through_head(
    model: PreTrainedModel,
    head: ModelHead,
    compute: Callable[[Tensor, ModelHead], Any],
    hidden: Tensor,
) -> Any:
    """`compute(hidden, head)`; where ZeRO-3 shards the head, in place of the head's own forward.

    Then the head's hooks gather its weight, for its backward too, and reduce its gradient. `head`
    is what `read_head(model)` gave; `compute` returns tensors: one, or a tuple or dict of them.
    """
    if not hasattr(head.weight, "ds_id"):
        return compute(hidden, _whole(head))
    layer = model.get_output_embeddings()
    before = vars(layer).get("forward")
    layer.forward = lambda hidden: compute(hidden, _whole(read_head(model)))
    try:
        return layer(hidden)
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def logit_transform(config) -> dict[str, Any]:
    """Keywords `logit_scale` and `softcap` of `linear_logprobs` from a model's configuration."""
    config = config.get_text_config()
    if config.model_type in REFUSED_MODELS:
        raise ValueError(f"{config.model_type}: its head transforms the hidden states first")
    for name in REFUSED_CONFIG:
        if getattr(config, name, None) is not None:
            raise ValueError(f"{config.model_type}: no support for logits with {name}")
    scale = 1.0
    for name in MULTIPLIERS:
        value = getattr(config, name, None)
        scale *= 1.0 if value is None else value
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        scale *= scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    caps = [getattr(config, name) for name in SOFTCAPS if getattr(config, name, None)]
    if not math.isfinite(scale) or len(caps) > 1:
        raise ValueError(f"{config.model_type}: logit scale {scale}, soft caps {caps}")
    return {"logit_scale": scale, "softcap": caps[0] if caps else None}


def check_head(model: PreTrainedModel) -> None:
    """Compare the head as read with the model's own logits on a few tokens, in two passes.

    Where parameters are sharded (ZeRO-3) or on the meta device the head is only read.

    Raises:
        ValueError: where they differ by more than the rounding of the model's dtype.
    """
    head = read_head(model)
    if is_sharded(model):
        return
    ids = trial_ids(model)
    with modes_kept(model), torch.no_grad():
        model.eval()
        logits = model(input_ids=ids, use_cache=False).logits.float()
        hidden = last_hidden_state(model, ids, torch.ones_like(ids))
    hidden = hidden.to(head.weight.device, head.weight.dtype)
    ours = nn.functional.linear(hidden, head.weight.detach(), head.bias).float()
    ours *= head.transform["logit_scale"]
    if cap := head.transform["softcap"]:
        ours = cap * torch.tanh(ours / cap)
    eps = torch.finfo(head.weight.dtype).eps
    logits = logits.to(ours.device)
    error = (ours - logits).abs().max() if ours.shape == logits.shape else math.inf
    if not error <= 32 * eps * max(1.0, float(logits.abs().max())):
        raise ValueError(
            f"{type(model).__name__}: its logits {tuple(logits.shape)} are not the softcap(scale "
            "* (hidden @ weight.T + bias)) read from its configuration (largest difference "
            f"{error:.2g})"
        )


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is in training or in evaluation afterwards as it was before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_acts(config) -> None:
    """ValueError for a kind of adapter that takes effect in PeftModel's own forward only.

    `config` is a PeftConfig, or None.
    """
    kind = type(config).__name__
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"peft_config: a {kind} adds tokens before the prompt, which the fused head does not "
            "see: it would not act; use an adapter of the layers, LoraConfig for one"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "peft_config: an activated LoRA (alora_invocation_tokens) acts behind its tokens "
            "alone, which the fused head does not see: it would not act; use plain LoRA"
        )


def base_model(policy):
    """The transformers model inside a PeftModel, or the model itself."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of `model` that ends in the hidden states which its head reads.

    Raises:
        ValueError: where the model has no such part.
    """
    # Llama 4 and Mllama name a base that they do not have, and the first two are the model itself.
    for inner in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
        if inner is not None and inner is not model:
            return inner
    raise ValueError(f"{type(model).__name__} has no decoder apart from its head")


def positions(attention_mask: Tensor) -> Tensor:
    """[B, L] place of every token among the real ones of its row; 0 before the first."""
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def with_positions(inner: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of a forward pass, with the position ids that follow from the mask.

    Most models count from the first column unless told: on a left-padded row that is another model
    wherever positions are learned or set the scale of rotations. Positions that are given stay, and
    a model that takes none gets none.
    """
    mask = inputs.get("attention_mask")
    known = inputs.get("position_ids") is not None or inputs.get("past_key_values") is not None
    takes = "position_ids" in inspect.signature(type(inner).forward).parameters
    if known or mask is None or mask.ndim != 2 or not takes:
        return inputs
    return inputs | {"position_ids": positions(mask)}


def last_hidden_state(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, L, H] final hidden states of the backbone; the head is not run.

    Rows [B, L] may be padded on either side, where `attention_mask` [B, L] is 0.
    """
    return backbone_states(model, {"input_ids": input_ids, "attention_mask": attention_mask})


def backbone_states(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """[B, L, H] final hidden states of the backbone for keywords of its forward pass."""
    inner = backbone(model)
    return inner(**with_positions(inner, inputs), use_cache=False).last_hidden_state


def trial_ids(model: PreTrainedModel, rows: int = 1) -> Tensor:
    """[rows, TOKENS] a few tokens, all different where the vocabulary has enough."""
    ids = torch.arange(1, rows * TOKENS + 1, device=model.device).view(rows, TOKENS)
    return ids % model.config.get_text_config().vocab_size
