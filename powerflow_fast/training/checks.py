"""Models, adapters and options that a trainer refuses before anything is trained.

Only reads. `trials.py` tries on a few tokens what a model does; `data_checks.py` refuses data.
"""

from __future__ import annotations

import os
import warnings

from transformers.integrations import get_reporting_integration_callbacks

from powerflow_fast.models.lm_head import base_model, check_acts, check_head
from powerflow_fast.models.parameters import trained_parameters
from powerflow_fast.training.config import PowerFlowConfig
from powerflow_fast.training.trials import check_copy, check_pair

# Names in generation_kwargs that change the distribution that completions are drawn from.
SHAPING = (
    "top_p top_k min_p typical_p epsilon_cutoff eta_cutoff repetition_penalty frequency_penalty "
    "presence_penalty no_repeat_ngram_size bad_words bad_words_ids suppress_tokens logit_bias "
    "sequence_bias begin_suppress_tokens min_tokens min_new_tokens forced_bos_token_id "
    "forced_eos_token_id exponential_decay_length_penalty guidance_scale watermarking_config"
).split()
TEXT = "train_dataset: prompts are plain text, though the tokenizer has a chat template"


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
    if not trained_parameters(policy):
        raise ValueError(
            "model: nothing to train, every parameter is frozen; pass peft_config=, or load "
            "the adapter with is_trainable=True"
        )
    base = base_model(policy)
    _check_engine(trainer, base)
    check_head(base)
    _warn_of_text(trainer)
    check_pair(policy, lambda: trainer.as_reference(policy))
    if trainer.ref_model is not None:
        check_copy(policy, trainer.accelerator.unwrap_model(trainer.ref_model))
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
