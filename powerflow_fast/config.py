"""`PowerFlowConfig`: TRL's GRPOConfig with the options of the LA-TB objective."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from trl import GRPOConfig

from powerflow_fast.model_head import base_model, check_head
from powerflow_fast.packing import check_packing

# Options of GRPO's own loss, which this trainer replaces, by what takes their place. A value other
# than the default would be silently ignored; it is refused instead.
NOT_HONOURED = {
    "alpha sets the distance to the reference": "beta use_bias_correction_kl",
    "the loss is LA-TB; see balance": "loss_type multi_objective_aggregation scale_rewards",
    "importance weights are means over a sequence": "importance_sampling_level "
    "vllm_importance_sampling_mode",
    "importance weights are clipped on both sides; use clip_eps": "epsilon epsilon_high delta "
    "off_policy_mask_threshold vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "an alpha below 1 keeps entropy up": "entropy_coef use_adaptive_entropy top_entropy_quantile",
    "the reference is the fixed base model": "sync_ref_model",
    "log-probs are float32 already": "cast_lm_head_to_fp32",
}
# Options of this trainer: (what is expected, whether a value is that).
POSITIVE = ("a finite number > 0", lambda x: 0 < x < math.inf)
SHARE = ("a share in [0, 1)", lambda x: 0 <= x < 1)
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "alpha": POSITIVE,
    "alpha_start": POSITIVE,
    "alpha_warmup_steps": ("at least 0", lambda x: x >= 0),
    "log_z_lr": POSITIVE,
    "clip_eps": ("a finite number >= 0", lambda x: 0 <= x < math.inf),
    "grad_tolerance": SHARE,
    "min_length_share": SHARE,
    "min_distinct": SHARE,
    "num_generations": ("at least 2 completions per prompt, to compare", lambda x: x >= 2),
    "disable_dropout": ("True: the policy must start at the reference", bool),
}


def _option(default: Any, text: str, *choices: str) -> Any:
    metadata = {"help": text} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata)


@dataclass
class PowerFlowConfig(GRPOConfig):
    """Options of `PowerFlowTrainer`; every other one is TRL's GRPOConfig (arXiv 2603.18363).

    What supports a default is named beside it: a section of benchmarks/evidence/README.md.

    Raises:
        ValueError: for values outside the ranges given here, and for options of GRPO's loss
            that would have no effect.
    """

    # Sharpening: alpha 4 gains 27 ± 2 points, alpha 2 23 ± 9, of accuracy of a sample.
    alpha: float = _option(4.0, "Power of the base to sample from, > 0: above 1 sharpens.")
    alpha_start: float = _option(1.0, "alpha of the first step, where alpha_warmup_steps is set.")
    alpha_warmup_steps: int = _option(0, "Steps from alpha_start to alpha; 0: constant.")
    # Ablations: 'group' is ahead of 'learned' on three of four seeds (65 and 61 % right); on tables
    # groups of 4 and more end as close to the target.
    log_z: str = _option(
        "group",
        "log Z': 'group' (mean over a prompt's completions) or 'learned' (an MLP).",
        *("group", "learned"),
    )
    log_z_lr: float = _option(1e-3, "Constant learning rate of the learned log Z', > 0.")
    log_z_lr_scheduled: bool = _option(False, "Let the policy's scheduler act on log_z_lr too.")
    # Length bias: 'token' decays on both seeds, 'trajectory' is no better than 'length'.
    balance: str = _option(
        "length",
        "'length' is LA-TB (eq. 10); the others are for comparison.",
        *("length", "trajectory", "token"),
    )
    # Ablations: with and without clipping, and without weights, end within each other's spread.
    clip_eps: float = _option(0.2, "Importance weights are clipped to 1 - this .. 1 + this, >= 0.")
    offload_reference: bool = _option(
        False,
        "Full fine-tuning: the reference rests in main memory and comes to the device once per "
        "rollout, for its log-probs.",
    )
    loss_backend: str = _option(
        "auto",
        "Kernels of the head: 'auto' is triton on a GPU and torch elsewhere.",
        *("auto", "torch", "triton"),
    )
    # Ablations: up to 1e-3 the rollouts are the exact run's, token for token; it saves time on a
    # sharp policy alone (benchmarks/README.md, certified gradient).
    grad_tolerance: float = _option(
        0.0,
        "Probability mass per token that the head's gradient may leave out, in [0, 1); 1e-3 saves "
        "time once the policy is sharp. 0: exact.",
    )
    padding_free: bool = _option(
        False, "Compute real tokens only, packed into one row (best with flash-attn)."
    )
    stop_on_collapse: bool = _option(True, "End the run when completions shrink or repeat.")
    min_length_share: float = _option(
        0.2, "Of the first rollout's mean length: below it completions shrank."
    )
    min_distinct: float = _option(
        0.2, "Share of distinct 4-grams within completions: below it they repeat."
    )
    sample_completions: int = _option(
        2, "Completions of one prompt to write to samples.txt at each log; 0: no."
    )
    disable_dropout: bool = _option(True, "Always: else the policy would not start at the base.")

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        for name, (expected, holds) in RANGES.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("log_z", "balance", "loss_backend"):
            choices, value = fields[name].metadata["choices"], getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        for reason, names in NOT_HONOURED.items():
            for name in names.split():
                if getattr(self, name) != fields[name].default:
                    raise ValueError(f"{name}: has no effect ({reason}); leave it unset")
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef: no support for the MoE auxiliary loss; set 0")
        if self.log_z == "learned" and self.fp16:
            raise ValueError("log_z='learned': no support for fp16 loss scaling; use bf16=True")
        if self.bf16 is None:  # TRL's default is bf16, which a machine without accelerator refuses
            self.bf16 = torch.accelerator.is_available() and not (self.fp16 or self.use_cpu)
        super().__post_init__()

    def alpha_at(self, step: int) -> float:
        """alpha of a rollout that is drawn at `step`; it stays that rollout's own."""
        if step >= self.alpha_warmup_steps:
            return self.alpha
        return self.alpha_start + (self.alpha - self.alpha_start) * step / self.alpha_warmup_steps


def check_data(dataset) -> None:
    """ValueError unless `dataset` has prompts to train on."""
    columns = getattr(dataset, "column_names", None)
    if dataset is None or (columns is not None and "prompt" not in columns):
        raise ValueError(f"train_dataset: expected a column 'prompt', got columns {columns}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("train_dataset: it is empty")


def check_lengths(dataset, model, tokenizer, args: PowerFlowConfig) -> None:
    """ValueError where a prompt and its completion do not fit into the context of `model`.

    `model` may be a path or name, of which only configuration and tokenizer are read, if needed.
    """
    source = {"trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(model, **source) if isinstance(model, str) else model.config
    limits = (getattr(config.get_text_config(), "max_position_embeddings", None),)
    context = min((n for n in (*limits, args.vllm_max_model_length) if n), default=None)
    if context is None or not hasattr(dataset, "__getitem__"):
        return
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(config._name_or_path, **source)
    for start in range(0, len(dataset), 1000):
        prompts = dataset[start : start + 1000]["prompt"]
        if isinstance(prompts[0], str):
            rows = tokenizer(prompts)["input_ids"]
        else:
            rows = tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]
        for i, row in enumerate(rows, start=start):
            if len(row) + args.max_completion_length > context:
                raise ValueError(
                    f"train_dataset: prompt {i} has {len(row)} tokens, which with "
                    f"max_completion_length={args.max_completion_length} is beyond the context of "
                    f"{context}; drop it, or lower max_completion_length"
                )


def check_reference(model, peft_config, args: PowerFlowConfig) -> None:
    """ValueError where the reference would not be the model as it was given."""
    given_adapter = hasattr(model, "get_base_model")  # a PeftModel
    if args.offload_reference and (given_adapter or peft_config is not None):
        raise ValueError(
            "offload_reference: with an adapter there is no second copy to move, the reference is "
            "the base under it; leave it off"
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
    check_head(base)
    if trainer.args.padding_free:
        check_packing(base)
    devices = set(getattr(trainer.ref_model, "hf_device_map", {}).values())
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or len(devices) > 1
    if trainer.args.offload_reference and sharded:
        raise ValueError(
            "offload_reference: expected a whole copy on one device (one process, or DDP); "
            "FSDP (fsdp_offload_params) and DeepSpeed (offload_param) offload shards"
        )
    if trainer.top_p < 1 or trainer.top_k or trainer.min_p or trainer.repetition_penalty != 1:
        warnings.warn(
            "top_p, top_k, min_p or repetition_penalty change how completions are drawn, which "
            "LA-TB does not correct: they no longer come from the policy",
            stacklevel=3,
        )
