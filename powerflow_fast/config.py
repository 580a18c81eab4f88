"""`PowerFlowConfig`: TRL's GRPOConfig with the options of the LA-TB objective."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

# Options of GRPO's own loss, which this trainer replaces. A value other than the default would be
# silently ignored; it is refused instead.
NOT_HONOURED = {
    "beta": "alpha sets the distance to the reference, there is no KL term",
    "loss_type": "the loss is LA-TB; see balance",
    "epsilon": "use clip_eps",
    "epsilon_high": "clipping is two-sided; use clip_eps",
    "delta": "clipping is two-sided; use clip_eps",
    "importance_sampling_level": "weights are per sequence; see importance",
    "scale_rewards": "there are no advantages",
    "multi_objective_aggregation": "psi is the weighted sum of psi_funcs",
    "top_entropy_quantile": "every token of a sequence has the same weight",
    "entropy_coef": "an alpha below 1 keeps entropy up",
    "use_adaptive_entropy": "an alpha below 1 keeps entropy up",
    "off_policy_mask_threshold": "use clip_eps",
    "use_bias_correction_kl": "there is no KL term",
    "sync_ref_model": "the reference is the fixed base model",
    "use_liger_kernel": "the loss brings its own head",
    "cast_lm_head_to_fp32": "log-probs are float32 already",
    "vllm_importance_sampling_mode": "the sampler's log-probs enter as old_logps; see importance",
    "vllm_importance_sampling_clip_max": "use clip_eps",
    "vllm_importance_sampling_clip_min": "use clip_eps",
}


@dataclass
class PowerFlowConfig(GRPOConfig):
    """Options of `PowerFlowTrainer`; every other one is TRL's GRPOConfig (arXiv 2603.18363).

    Raises:
        ValueError: for values outside the ranges given here, and for options of GRPO's loss
            that would have no effect.
    """

    alpha: float = field(
        default=4.0,
        metadata={"help": "Power of the base model to sample from, > 0: above 1 sharpens."},
    )
    alpha_start: float = field(
        default=1.0,
        metadata={"help": "alpha of the first step, > 0, where alpha_warmup_steps is set."},
    )
    alpha_warmup_steps: int = field(
        default=0,
        metadata={"help": "Steps over which alpha goes from alpha_start to alpha; 0: constant."},
    )
    log_z: str = field(
        default="group",
        metadata={
            "help": "log Z': 'group' (mean over a prompt's completions) or 'learned' (an MLP).",
            "choices": ["group", "learned"],
        },
    )
    log_z_lr: float = field(
        default=1e-3, metadata={"help": "Constant learning rate of the learned log Z', > 0."}
    )
    log_z_lr_scheduled: bool = field(
        default=False,
        metadata={"help": "Let the policy's scheduler act on the learning rate of log Z' too."},
    )
    log_z_layers: int = field(
        default=3, metadata={"help": "Linear layers of the learned log Z', at least 1."}
    )
    balance: str = field(
        default="length",
        metadata={
            "help": "'length' is LA-TB (eq. 10); the others are for comparison.",
            "choices": ["length", "trajectory", "token"],
        },
    )
    importance: str = field(
        default="mean",
        metadata={
            "help": "Importance weight: ratio of mean (per token) or of whole-sequence log-probs.",
            "choices": ["mean", "sum"],
        },
    )
    clip_eps: float = field(
        default=0.2,
        metadata={"help": "Importance weights are clipped to [1 - clip_eps, 1 + clip_eps], >= 0."},
    )
    loss_backend: str = field(
        default="auto",
        metadata={
            "help": "Kernels of the head: 'auto' is triton on a GPU and torch elsewhere.",
            "choices": ["auto", "torch", "triton"],
        },
    )
    grad_tolerance: float = field(
        default=0.0,
        metadata={
            "help": "Probability mass per token that the head's gradient may leave out, in [0, 1); "
            "1e-3 saves time once the policy is sharp. 0: exact."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Compute real tokens only, packed into one row (best with flash-attn)."},
    )
    stop_on_collapse: bool = field(
        default=True,
        metadata={"help": "End the run when completions shrink or repeat, with a message."},
    )
    min_length_share: float = field(
        default=0.2,
        metadata={"help": "Of the first rollout's mean length: below it completions shrank."},
    )
    min_distinct: float = field(
        default=0.2,
        metadata={"help": "Share of distinct 4-grams within completions: below it they repeat."},
    )
    sample_completions: int = field(
        default=2,
        metadata={"help": "Completions of one prompt to write to samples.txt at each log; 0: no."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Always true: with dropout the policy would not start at the reference."},
    )

    def __post_init__(self) -> None:
        _positive("alpha", self.alpha)
        _positive("alpha_start", self.alpha_start)
        _positive("log_z_lr", self.log_z_lr)
        for name, least in (("log_z_layers", 1), ("alpha_warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("min_length_share", "min_distinct", "grad_tolerance"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if not (math.isfinite(self.clip_eps) and self.clip_eps >= 0):
            raise ValueError(f"clip_eps: expected a finite number >= 0, got {self.clip_eps!r}")
        fields = type(self).__dataclass_fields__
        for name in ("log_z", "balance", "importance", "loss_backend"):
            choices, value = fields[name].metadata["choices"], getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        if self.num_generations < 2:
            raise ValueError(
                "num_generations: expected at least 2 completions per prompt (log_z='group' "
                f"compares them, and so does TRL), got {self.num_generations}"
            )
        for name, reason in NOT_HONOURED.items():
            if name in fields and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: has no effect in PowerFlow ({reason}); leave it unset")
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef: no support for the MoE auxiliary loss; set 0")
        if not self.disable_dropout:
            raise ValueError("disable_dropout: the policy must start at the reference; leave it on")
        if self.log_z == "learned" and self.fp16:
            raise ValueError("log_z='learned': no support for fp16 loss scaling; use bf16=True")
        if self.bf16 is None:  # TRL's default is bf16, which a machine without accelerator refuses
            self.bf16 = torch.accelerator.is_available() and not (self.fp16 or self.use_cpu)
        super().__post_init__()


def check_data(dataset) -> None:
    """ValueError unless `dataset` has prompts to train on."""
    if dataset is None:
        raise ValueError("train_dataset: expected a dataset with a column 'prompt', got None")
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"train_dataset: expected a column 'prompt', got columns {columns}")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("train_dataset: it is empty")


def check_lengths(dataset, tokenizer, config, args: PowerFlowConfig) -> None:
    """ValueError where a prompt and its completion do not fit into the model's context."""
    limits = (getattr(config.get_text_config(), "max_position_embeddings", None),)
    context = min((n for n in (*limits, args.vllm_max_model_length) if n), default=None)
    if context is None or not hasattr(dataset, "__getitem__"):
        return
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


def check_reference(model, peft_config) -> None:
    """ValueError where the reference would not be the model as it was given."""
    if isinstance(model, str):
        return
    if hasattr(model, "get_base_model"):  # a PeftModel
        if peft_config is not None:
            raise ValueError(
                "peft_config: the model already carries an adapter; leave peft_config out to go on "
                "training it, or merge_and_unload() it first to train a new one on top"
            )
        return
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            raise ValueError(
                f"model: {name} carries an adapter, but the model is no PeftModel, so the base "
                "cannot be told from it; pass the PeftModel, or the model without it"
            )
    if peft_config is not None:
        return
    if not getattr(model.config, "_name_or_path", ""):
        raise ValueError(
            "model: full fine-tuning loads the reference from the model's path, and this model has "
            "none; save it and pass the path, or pass peft_config="
        )


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
