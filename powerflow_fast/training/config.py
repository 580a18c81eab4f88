"""`PowerFlowConfig`: TRL's GRPOConfig with the options of the LA-TB objective, all checked."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig

from powerflow_fast.logprobs.options import BACKENDS
from powerflow_fast.loss import BALANCES
from powerflow_fast.models.packing_check import SHARED_PROMPT

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
# Keys of generation_kwargs that are options themselves; completions are scored by the options.
OWN_OPTIONS = {
    "temperature": "temperature",
    "do_sample": "temperature",
    "num_beams": "temperature",
    "n": "num_generations",
    "num_return_sequences": "num_generations",
}


def _number(low: float, *, above: bool = False, high: float = math.inf, most: bool = False):
    """What an error says is expected, and its test: a finite number from `low` to `high`."""
    words = f"{'>' if above else '>='} {low:g}"
    words += f" and {'<=' if most else '<'} {high:g}" if high < math.inf else ""

    def holds(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (
            number
            and (low < value if above else low <= value)
            and (value <= high if most else value < high)
        )

    return f"a finite number {words}", holds


def _count(low: int):
    return f"a whole number >= {low}", lambda x: type(x) is int and x >= low


# Learning rates of the policy where none is given. LoRA: `make evidence`, sharpening, is best at
# 3e-4 and 1e-3 on a model of 135M; larger ones want less. All parameters: TRL's default for GRPO.
LORA_RATE, FULL_RATE = 2e-4, 1e-6
POSITIVE, NOT_NEGATIVE, SHARE = _number(0, above=True), _number(0), _number(0, high=1)
SWITCH = ("True or False", lambda x: isinstance(x, bool))
# Options of this trainer, and those of TRL and transformers that would fail late or do nothing.
RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "alpha": POSITIVE,
    "alpha_start": POSITIVE,
    "alpha_warmup_steps": _count(0),
    "log_z_lr": POSITIVE,
    "log_z_lr_scheduled": SWITCH,
    "clip_eps": NOT_NEGATIVE,
    "offload_reference": SWITCH,
    "grad_tolerance": SHARE,
    "round_logits": SWITCH,
    "padding_free": SWITCH,
    "stop_on_collapse": SWITCH,
    "min_length_share": SHARE,
    "min_distinct": SHARE,
    "sample_completions": _count(0),
    "rollout_ahead": _count(0),
    "replay": _count(0),
    "max_sampler_gap": POSITIVE,
    "draw_curves": SWITCH,
    "disable_dropout": ("True: the policy must start at the reference", lambda x: x is True),
    "num_generations": _count(2),
    "num_generations_eval": _count(2),
    "max_completion_length": _count(1),
    "num_iterations": _count(1),
    "steps_per_generation": _count(1),
    "per_device_train_batch_size": _count(1),
    "per_device_eval_batch_size": _count(1),
    "gradient_accumulation_steps": _count(1),
    "temperature": POSITIVE,
    "top_p": _number(0, above=True, high=1, most=True),
    "top_k": _count(-1),
    "min_p": _number(0, high=1, most=True),
    "repetition_penalty": POSITIVE,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "max_grad_norm": NOT_NEGATIVE,
}


def _option(default: Any, text: str, *choices: str) -> Any:
    metadata = {"help": text} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata)


@dataclass
class PowerFlowConfig(GRPOConfig):
    """Options of `PowerFlowTrainer` (arXiv 2603.18363); all others are TRL's GRPOConfig.

    The help text of each option says what it does. A comment beside a default names the section of
    benchmarks/evidence/README.md that supports it.

    Raises:
        ValueError: when made, for values outside `RANGES` or the choices given here, and for
            options of GRPO's loss that would have no effect (`NOT_HONOURED`).
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
        *BALANCES,
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
        *BACKENDS,
    )
    # Ablations: up to 1e-3 the rollouts are the exact run's, token for token; it saves time on a
    # sharp policy alone (benchmarks/README.md, certified gradient).
    grad_tolerance: float = _option(
        0.0,
        "Probability mass per token that the head's gradient may leave out, in [0, 1); 1e-3 saves "
        "time once the policy is sharp. 0: exact.",
    )
    round_logits: bool = _option(
        False,
        "Round logits to the model's type before they are scored, as a sampler without a float32 "
        "head does.",
    )
    shared_prompt: str = _option(
        "auto",
        "Compute a prompt once for all of its completions in a micro-batch: 'auto' where the model "
        "can and it pays, 'on' or an error, 'off'.",
        *SHARED_PROMPT,
    )
    padding_free: bool = _option(
        False, "Compute real tokens only, packed into one row; shared_prompt does so anyway."
    )
    # Off policy: 1, 2, 4 and 8 updates ahead end within the spread of on policy.
    rollout_ahead: int = _option(
        0,
        "Updates that a rollout may be drawn before the one that it serves, by a sampler of its "
        "own (adapter_server): sampler and trainer run side by side. 0: on policy.",
    )
    # Off policy: within 14 updates no better than the same rollout again.
    replay: int = _option(
        0,
        "Rollouts to keep: with num_iterations, the updates after a rollout's first train on one "
        "of the last of these, the newest most often. 0: on the same again.",
    )
    max_sampler_gap: float = _option(
        0.1,
        "Mean nats a token by which log-probs of sampler and policy may differ, for rounding; "
        "beyond it the run ends.",
    )
    learning_rate: float | None = _option(  # type: ignore[assignment]  # until `for_run`
        None,
        f"Of the policy. Default: {LORA_RATE:g} with an adapter, {FULL_RATE:g} for all parameters.",
    )
    stop_on_collapse: bool = _option(
        True,
        "End the run when completions shrink, repeat, are empty or all alike, or gradients 0.",
    )
    min_length_share: float = _option(
        0.2, "Of the first rollout's mean length: below it completions shrank."
    )
    min_distinct: float = _option(
        0.2, "Share of distinct 4-grams within completions: below it they repeat."
    )
    sample_completions: int = _option(
        2, "Completions of one prompt to write to samples.txt at each log; 0: no."
    )
    draw_curves: bool = _option(True, "At the end, draw curves.png in the run's folder.")
    logging_steps: float = _option(1, "Steps between two lines of figures.")
    project: str = _option("powerflow-fast", "Name of the project in Trackio.")
    disable_dropout: bool = _option(True, "Always: else the policy would not start at the base.")

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        for name, (expected, holds) in RANGES.items():
            value = getattr(self, name)
            if value is None and fields[name].default is None:
                continue
            if not holds(value):
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        if isinstance(self.shared_prompt, bool):  # YAML reads on and off so
            self.shared_prompt = "on" if self.shared_prompt else "off"
        for name in ("log_z", "balance", "loss_backend", "shared_prompt"):
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
        if self.log_z_lr_scheduled and self.learning_rate == 0:
            raise ValueError("learning_rate: expected > 0 beside log_z_lr_scheduled, got 0")
        older = "rollout_ahead" if self.rollout_ahead else "replay" if self.replay else None
        if older and not self.vllm_importance_sampling_correction:
            raise ValueError(
                f"vllm_importance_sampling_correction: expected True beside {older}, whose weights "
                "come from the log-probs of the policy that drew"
            )
        if self.replay and self.num_iterations < 2:
            raise ValueError(
                f"replay: expected 0 where a rollout serves one update, got {self.replay}; set "
                "num_iterations to the updates that are made for every new rollout"
            )
        if self.bf16 is None:  # TRL's default is bf16, which a machine without accelerator refuses
            self.bf16 = torch.accelerator.is_available() and not (self.fp16 or self.use_cpu)
        self._check_json()
        super().__post_init__()
        drawn: Any = self.generation_kwargs or {}  # JSON has been read by now
        for name, option in OWN_OPTIONS.items():
            if name in drawn:
                raise ValueError(
                    f"generation_kwargs: expected no {name!r}, by which completions would be drawn "
                    f"otherwise than they are scored; see {option}"
                )

    def _check_json(self) -> None:
        """A dict may come as JSON from a command line; the base class reads it."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise ValueError(f"{name}: expected JSON, got {value!r} ({error})") from None

    def for_run(self, adapted: bool) -> PowerFlowConfig:
        """A copy for one trainer, its learning rate resolved; `adapted`: an adapter is trained."""
        resolved = copy.copy(self)
        if resolved.learning_rate is None:
            resolved.learning_rate = LORA_RATE if adapted else FULL_RATE
        return resolved

    def alpha_at(self, step: int) -> float:
        """alpha of a rollout drawn at `step`; every update on that rollout uses it."""
        if step >= self.alpha_warmup_steps:
            return self.alpha
        return self.alpha_start + (self.alpha - self.alpha_start) * step / self.alpha_warmup_steps
