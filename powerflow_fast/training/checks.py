"""What is refused before anything is trained: models and adapters that would go wrong.

What an adapter or a layer does is tried on a few tokens where that can be tried, and not looked up
in a list of names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import get_reporting_integration_callbacks

from powerflow_fast.models.lm_head import (
    base_model,
    check_acts,
    check_head,
    dropouts,
    last_hidden_state,
    modes_kept,
    read_head,
)
from powerflow_fast.models.packing import check_packing
from powerflow_fast.training.config import PowerFlowConfig

TOKENS = 8  # of a trial
# Between passes that must agree: rounding, of which bf16 leaves 1 part in 256.
ROUNDINGS = 32
# Of generation_kwargs: what changes the distribution that completions are drawn from.
SHAPING = (
    "top_p top_k min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty frequency_penalty "
    "presence_penalty no_repeat_ngram_size bad_words bad_words_ids suppress_tokens logit_bias "
    "sequence_bias begin_suppress_tokens min_tokens min_new_tokens forced_bos_token_id "
    "forced_eos_token_id exponential_decay_length_penalty guidance_scale watermarking_config"
).split()
TEXT = "train_dataset: prompts are plain text, though the tokenizer has a chat template"
PATCHED = (
    "forward",
    "_fused_head_options",
    "_fused_head_patches",
)  # what `patch_head` sets on a model


def check_reference(model, peft_config, args: PowerFlowConfig) -> None:
    """ValueError where the reference would not be the model as it was given."""
    given_adapter = hasattr(model, "get_base_model")  # a PeftModel
    if args.offload_reference and (given_adapter or peft_config is not None):
        raise ValueError(
            "offload_reference: with an adapter there is no second copy to move, the reference is "
            "the base under it; leave it off"
        )
    given = dict(getattr(model, "peft_config", {})) if given_adapter else {"": peft_config}
    for adapter in given.values():
        check_adapter(adapter)
    files = set(os.listdir(model)) if isinstance(model, str) and os.path.isdir(model) else set()
    if "adapter_config.json" in files and "config.json" not in files:
        raise ValueError(
            f"model: {model} holds an adapter alone; pass the PeftModel, "
            "AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)"
        )
    if given_adapter and model.active_adapters != ["default"]:
        raise ValueError(
            "model: the reference is a copy of the PeftModel's adapter 'default', which must be "
            f"the active one; active are {model.active_adapters}, of {sorted(given)}. Load it with "
            "adapter_name='default', and merge what belongs to the base"
        )
    if isinstance(model, str) or given_adapter:
        return
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"model: {name} carries an adapter, but the model is no PeftModel, so the base "
                "cannot be told from it; pass the PeftModel, or the model without it"
            )
    if peft_config is None and not getattr(model.config, "_name_or_path", ""):
        raise ValueError(
            "model: full fine-tuning loads the reference from the model's path, and this model has "
            "none; save it and pass the path, or pass peft_config="
        )


def check_adapter(config) -> None:
    """ValueError for an adapter that would not act on what is scored, or moves the reference."""
    check_acts(config)
    if getattr(config, "bias", "none") not in ("none", None, False):
        raise ValueError(
            f"peft_config: bias={config.bias!r} trains biases of the base, so the reference would "
            "move with the policy; use bias='none'"
        )


Trial = Callable[[], Tensor]  # what a model makes of a few tokens


def check_pair(
    policy: nn.Module,
    reference: Callable[[], AbstractContextManager] | None = None,
    trial: Trial | None = None,
) -> None:
    """Whether one model can be the policy and, without its adapter, the reference.

    Passes in training and in evaluation mode must agree. With an adapter, every trainable parameter
    is moved for a moment, which must show in the policy and not in the reference.

    Args:
        policy: the PeftModel, or a model that is trained whole.
        reference: for a PeftModel, the context in which it is the reference; default: the base.
        trial: a pass over a few tokens, without a gradient; default: to the last hidden states.

    Raises:
        ValueError: which says what was tried, what came of it, and the parameter it comes from.
    """
    if any(p.is_meta or p.numel() == 0 for p in policy.parameters()):  # sharded: not tried
        return
    trial = trial or partial(hidden_trial, base_model(policy))
    _check_modes(policy, trial)
    if not hasattr(policy, "peft_config"):
        return
    reference = reference or policy.disable_adapter
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with reference():
        head = read_head(base_model(policy))  # which a trial may not reach
        culprit = next((n for n, p in trained.items() if p is head.weight or p is head.bias), None)
        fixed = trial()
        noise = _distance(fixed, trial())  # of experts whose sums have no fixed order, on a GPU
    start = trial()
    with _moved(trained.values()):
        moved = trial()
        with reference():
            after = trial()
    if not _distance(moved, start) > 8 * noise:
        raise ValueError(
            "model: none of its trainable parameters acts on what is scored (tried by moving all "
            f"{len(trained)}), so nothing would be trained"
        )
    if culprit is None and _distance(after, fixed) > 8 * noise:
        culprit = _culprit(trained, reference, lambda: _distance(trial(), fixed) > 8 * noise)
    if culprit is not None:
        raise ValueError(
            f"model: {culprit} is trained but is no part of the "
            "adapter that the reference does without, so the reference would move with the policy; "
            "freeze it, or name its layer in the adapter's modules_to_save"
        )


@torch.no_grad()
def hidden_trial(base: PreTrainedModel) -> Tensor:  # [1, TOKENS, H]
    ids = trial_ids(base)
    return last_hidden_state(base, ids, torch.ones_like(ids))


def trial_ids(base: PreTrainedModel) -> Tensor:  # [1, TOKENS]
    size = base.config.get_text_config().vocab_size
    return torch.arange(1, TOKENS + 1, device=base.device)[None] % size


def _check_modes(model: nn.Module, trial: Trial) -> None:
    device = next(model.parameters()).device
    with modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        first, second = trial(), trial()
        model.eval()
        still = trial()
    for other, what in ((second, "two passes differ"), (still, "training and evaluation differ")):
        error = (first.float() - other.float()).abs().max()
        limit = ROUNDINGS * torch.finfo(first.dtype).eps * first.float().abs().max().clamp(min=1)
        if not error <= limit:
            raise ValueError(
                f"model: {what} by {error:.2g} ({type(base_model(model)).__name__}, every dropout "
                "that is a layer or a module's own number off): the policy would not start at the "
                "reference, nor be trained on what it samples. Set to 0 what its configuration "
                "names dropout, jitter or the like"
            )


@contextmanager
def _moved(parameters) -> Iterator[None]:
    """Every parameter a little off, for the time inside; bit by bit as it was afterwards.

    Not all by the same: of that a layer norm, or the softmax behind a head, would see nothing.
    """
    kept = [(p, p.detach().clone()) for p in parameters]
    try:
        with torch.no_grad():
            for parameter, _ in kept:
                draw = torch.Generator(parameter.device).manual_seed(0)
                parameter.add_(torch.empty_like(parameter).uniform_(-1, 1, generator=draw))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def _culprit(trained: dict[str, nn.Parameter], reference, moves: Callable[[], bool]) -> str:
    """The name of a trained parameter that moves the reference."""
    for name, parameter in trained.items():
        with _moved([parameter]), reference():
            if moves():
                return name
    return "one of its parameters"


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN, as of a model that overflows when moved, counts as large."""
    return float((one.float() - other.float()).abs().max().nan_to_num(torch.inf))


def check_copy(policy: nn.Module, copy: Any) -> None:
    """ValueError where the reference that was loaded is not the model that was given."""
    others = dict(copy.named_parameters())
    for name, parameter in policy.named_parameters():
        other = others.get(name)
        if parameter.is_meta or not parameter.numel() or (other is not None and other.is_meta):
            return  # sharded or offloaded: the first step's KL tells
        same = other is not None and parameter.shape == other.shape
        if not same or not torch.equal(parameter, other.to(parameter)):
            raise ValueError(
                f"model: its {name} is not that of {copy.config._name_or_path!r}, from where the "
                "reference is loaded (an adapter merged in? a weight changed?): the reference "
                "would be another model; save the model and pass the folder's path"
            )


@contextmanager
def given_back(model: Any) -> Iterator[None]:
    """Takes off again what was put on `model`, where an error comes out of the time inside.

    A refusal costs no second loading: adapters that were added go, and parameters, modes and hooks
    are as they were.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    adapters = set(getattr(model, "peft_config", {}))
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    base, off = base_model(model), list(dropouts(model))
    patch = {name: vars(base)[name] for name in PATCHED if name in vars(base)}
    checkpointing = getattr(base, "is_activation_checkpointing", False)
    hooked = hasattr(base, "_require_grads_hooks")
    try:
        yield
    except BaseException:
        _take_off(model, adapters)
        for name in PATCHED:
            vars(base).pop(name, None)
        vars(base).update(patch)
        if not hooked and hasattr(base, "_require_grads_hooks"):
            base.disable_input_require_grads()
        for module, name, value in off:
            setattr(module, name, value)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        if not checkpointing and getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()
        raise


def _take_off(model: Any, adapters: set[str]) -> None:
    """All adapters of `model` but those named, from its layers too where it is no PeftModel."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if hasattr(model, "get_base_model"):  # a PeftModel
        for name in set(model.peft_config) - adapters:
            model.delete_adapter(name)
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    if not adapters and "peft_config" in vars(model):
        del model.peft_config


def check_arguments(args) -> None:
    """ValueError for TrainingArguments that would act on a side, or not at all, without a word."""
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha: expected None, got {args.neftune_noise_alpha}: noise in "
            "training parts the policy from its reference, and from what it samples"
        )
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor: expected 0, got {args.label_smoothing_factor}: the LA-TB "
            "loss has no labels to smooth"
        )
    _check_reporters(args.report_to)
    parallel = getattr(args, "parallelism_config", None)
    for name in ("cp_size", "sp_size"):
        size = getattr(parallel, name, None) or 1
        if size > 1:
            raise ValueError(
                f"parallelism_config: {name}={size} splits each sequence over ranks, which the "
                "LA-TB loss does not follow; set it to 1 (tp_size and dp_shard_size are fine)"
            )


def _check_reporters(names: list[str]) -> None:
    """ValueError where a package that figures are reported to is unknown, or not installed."""
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (RuntimeError, ImportError, ValueError) as error:
            raise ValueError(f"report_to: {name!r} cannot be used ({error})") from error


def _check_engine(trainer, base) -> None:
    """ValueError for ways of running that fail late, or train wrongly."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 1 and getattr(base, "is_quantized", False):
        raise ValueError(
            "model: FSDP1 does not shard quantised layers beside an adapter in another type; set "
            "fsdp_version: 2"
        )
    args = trainer.args
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    shared = getattr(base.config.get_text_config(), "num_kv_shared_layers", 0)
    if args.gradient_checkpointing and reentrant and shared:
        raise ValueError(
            f"gradient_checkpointing_kwargs: {type(base).__name__} shares keys and values between "
            "layers, of which use_reentrant=True loses gradients; set use_reentrant to False"
        )


def _warn_of_text(trainer) -> None:
    """Warns where an instruct model is to be given bare text, which it may answer with nothing."""
    tokenizer, data = trainer._tokenizer, trainer.train_dataset
    if not getattr(tokenizer, "chat_template", None) or not hasattr(data, "__len__"):
        return
    prompt = data[0]["prompt"]
    if isinstance(prompt, str) and not any(t in prompt for t in tokenizer.all_special_tokens):
        warnings.warn(
            f"{TEXT}: an instruct model then often writes nothing, and learns to. Give messages, "
            "[{'role': 'user', 'content': ...}], if it is one",
            stacklevel=5,
        )


def check_policy(trainer, policy) -> None:
    """ValueError where the built `trainer` cannot train `policy`, its model unwrapped."""
    if trainer._is_vlm:
        raise ValueError("vision models are not supported: pass a tokenizer, not a processor")
    if trainer.aux_loss_enabled:
        raise ValueError("no support for the MoE auxiliary loss: set router_aux_loss_coef=0.0")
    if not any(p.requires_grad for p in policy.parameters()):
        raise ValueError(
            "model: nothing to train, every parameter is frozen; pass peft_config=, or load "
            "the adapter with is_trainable=True"
        )
    base = base_model(policy)
    _check_engine(trainer, base)
    check_head(base)
    if trainer.args.padding_free:
        check_packing(base)
        kernel = base.config._attn_implementation or ""
        if "flash" not in kernel:
            warnings.warn(
                f"padding_free: with attn_implementation={kernel!r} every packed batch builds a "
                "mask of tokens x tokens (1 GB at 32k), slower than padding; load the model with "
                "flash_attention_2, or leave padding_free off",
                stacklevel=4,
            )
    _warn_of_text(trainer)
    check_pair(policy, lambda: trainer.as_reference(policy))
    if trainer.ref_model is not None:
        check_copy(policy, trainer.ref_model)
    devices = set(getattr(trainer.ref_model, "hf_device_map", {}).values())
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or len(devices) > 1
    if trainer.args.offload_reference and sharded:
        raise ValueError(
            "offload_reference: expected a whole copy on one device (one process, or DDP); "
            "FSDP (fsdp_offload_params) and DeepSpeed (offload_param) offload shards"
        )
    shaped = [name for name in SHAPING if (trainer.args.generation_kwargs or {}).get(name)]
    penalised = trainer.repetition_penalty != 1
    if trainer.top_p < 1 or trainer.top_k or trainer.min_p or penalised or shaped:
        warnings.warn(
            f"{', '.join(shaped) or 'top_p, top_k, min_p or repetition_penalty'} change how "
            "completions are drawn, which LA-TB does not correct: they no longer come from the "
            "policy",
            stacklevel=3,
        )
