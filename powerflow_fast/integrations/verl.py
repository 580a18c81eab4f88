"""LA-TB and this library's head inside verl 0.9 (FSDP engines; any sampler that verl runs).

Importing `powerflow_fast.integrations.verl_plugin` registers both, so that is what verl is told
to load: VERL_USE_EXTERNAL_MODULES=powerflow_fast.integrations.verl_plugin everywhere. Then

    algorithm.adv_estimator=la_tb                             driver: the target of a sequence
    +algorithm.alpha=4.0                                      the power of the reference, default 4
    actor_rollout_ref.actor.policy_loss.loss_mode=la_tb       on the workers: the loss
    actor_rollout_ref.actor.use_kl_loss=True                  has verl score the reference
    actor_rollout_ref.actor.kl_loss_coef=0.0                  and adds no KL term
    actor_rollout_ref.model.use_fused_kernels=True            the head, with
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton
    POWERFLOW_HEAD='{"grad_tolerance": 1e-3}'                 its options, in the environment

The reward, summed over the tokens of a sequence, is the format term psi [nats/token].
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from powerflow_fast.head import linear_logprobs
from powerflow_fast.integrations.host import check_version, replace_function
from powerflow_fast.logprobs.options import check_door_options
from powerflow_fast.loss import tb_loss
from powerflow_fast.models.lm_head import read_head

NAME = "la_tb"
TESTED = ("0.9",)
HEAD: dict[str, Any] = {}  # options of `linear_logprobs` that every call of the head gets
METRICS = ("residual_mean", "residual_std", "policy_logp", "importance_mean", "clipped_share")


def register(**head: Any) -> None:
    """Enter the loss, its targets and the head into verl; twice is once.

    Args:
        **head: `backend`, `grad_tolerance`, `round_logits` of `linear_logprobs`; default: the JSON
            object in the environment variable POWERFLOW_HEAD, or none.

    Raises:
        ValueError: where verl is missing or of a version not in `TESTED`; for an option that the
            head does not have.
    """
    head = head or _head_of_environment()
    check_door_options(head)
    HEAD.clear()
    HEAD.update(head)
    check_version("verl", TESTED)
    from verl.models.transformers import monkey_patch
    from verl.trainer.ppo import core_algos, ray_trainer
    from verl.utils.kernel import linear_cross_entropy as kernel

    if core_algos.POLICY_LOSS_REGISTRY.get(NAME) is la_tb_policy_loss:
        return
    core_algos.register_policy_loss(NAME)(la_tb_policy_loss)
    kernel.linear_cross_entropy = linear_cross_entropy
    # verl's registry of estimators passes on neither reference nor old log-probs.
    _wrap(ray_trainer, "compute_advantage", _with_targets)
    _wrap(monkey_patch, "patch_forward_with_backends", _plain_heads_only)


def la_tb_policy_loss(
    old_log_prob: Tensor,  # [B, T]
    log_prob: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T] the target alpha (l_ref + psi) - log Z', same for all its tokens
    response_mask: Tensor,  # [B, T]
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """LA-TB as one of verl's policy losses: the mean over sequences of w (l_pi - target)^2.

    `config.clip_ratio` clips w on both sides; `loss_agg_mode` does not apply. The mean is over the
    whole batch, all micro-batches and ranks, where verl gives its size.

    Returns:
        The loss, 0-dim, and this micro-batch's METRICS.
    """
    if rollout_is_weights is not None:
        raise ValueError(
            "algorithm.rollout_correction: LA-TB has its own weights; leave it unset, or use its "
            "bypass mode, which makes the sampler's log-probs the old ones"
        )
    batch = getattr(config, "global_batch_info", {})
    size, ranks = batch.get("global_batch_size"), batch.get("dp_size") or 1
    if size is None and ranks > 1:
        raise ValueError("global_batch_size: expected a number with data parallelism, got None")
    out = tb_loss(
        log_prob,
        advantages,
        mask=response_mask,
        log_z=0.0,
        alpha=1.0,
        old_logps=old_log_prob,
        clip_eps=config.clip_ratio,
        normalizer=None if size is None else size / ranks,
        check_finite=False,
    )
    return out.loss, {f"la_tb/{name}": out.metrics[name].item() for name in METRICS}


def targets(
    old_logps: Tensor,  # [B, T] of the policy that sampled
    ref_logps: Tensor,  # [B, T]
    scores: Tensor,  # [B, T] rewards; their sum over a sequence is psi
    mask: Tensor,  # [B, T]
    prompts: Any,  # [B] a prompt's identifier for each of its completions
    alpha: float,
) -> Tensor:
    """[B, T] alpha (l_ref + psi) - log Z' on counted tokens, log Z' the mean over a prompt."""
    _, group_ids = np.unique(np.asarray(prompts), return_inverse=True)
    out = tb_loss(
        old_logps,
        ref_logps,
        mask=mask,
        log_z="group",
        group_ids=torch.as_tensor(group_ids, device=old_logps.device),
        alpha=alpha,
        psi=(scores * mask).sum(1).float(),
    )
    policy = (old_logps * mask).sum(1) / out.lengths.clamp(min=1)
    return (policy - out.residual)[:, None] * mask


def linear_cross_entropy(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H], or this rank's slice of it
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:  # log-probs and entropy, [...] float32
    """In place of verl's fused kernel of this name, with its arguments."""
    if reduction.lower() != "none":
        raise ValueError(f"reduction: expected 'none', got {reduction!r}")
    logps, entropy = linear_logprobs(
        hidden,
        weight,
        labels,
        temperature=temperature,
        return_entropy=True,
        process_group=dist_process_group,
        check_finite=False,
        **HEAD,
    )
    return logps, entropy


def _head_of_environment() -> dict[str, Any]:
    text = os.environ.get("POWERFLOW_HEAD", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"POWERFLOW_HEAD: expected a JSON object, got {text!r}") from None


def _with_targets(theirs: Any) -> Any:
    def compute_advantage(data, adv_estimator, *args, config=None, **kwargs):
        if adv_estimator != NAME:
            return theirs(data, adv_estimator, *args, config=config, **kwargs)
        batch = data.batch
        if "ref_log_prob" not in batch.keys():
            raise ValueError(
                "ref_log_prob: verl scored no reference; set actor_rollout_ref.actor."
                "use_kl_loss=True and kl_loss_coef=0.0"
            )
        batch["advantages"] = batch["returns"] = targets(
            batch["old_log_probs"],
            batch["ref_log_prob"],
            batch["token_level_scores"],
            batch["response_mask"],
            data.non_tensor_batch["uid"],
            4.0 if config is None else config.get("alpha", 4.0),
        )
        return data

    return compute_advantage


def _plain_heads_only(theirs: Any) -> Any:
    """verl's fused forward passes the weight alone: no bias, scale or cap of the model's own."""

    def patch_forward_with_backends(
        model, use_fused_kernels=False, fused_kernels_backend=None, **kwargs
    ):
        if use_fused_kernels:
            head = read_head(model)
            if head.bias is not None or head.transform != {"logit_scale": 1.0, "softcap": None}:
                raise ValueError(
                    f"use_fused_kernels: verl would drop the head's bias, scale or cap of "
                    f"{type(model).__name__}, {head.transform}; set it to False"
                )
        return theirs(model, use_fused_kernels, fused_kernels_backend, **kwargs)

    return patch_forward_with_backends


def _wrap(home: Any, name: str, wrapper: Any) -> None:
    """Replace a function of verl in its module and wherever it has been imported from there."""
    theirs = getattr(home, name)
    replace_function("verl", name, theirs, wrapper(theirs))
