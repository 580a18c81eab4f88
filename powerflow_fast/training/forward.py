"""One micro-batch through reference and policy into the LA-TB loss; it reads no data and no disk.

A batch is TRL's dictionary of a rollout: prompts and completions, [B, P] and [B, T], with masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx, use_adapter

from powerflow_fast.loss import TBOutput, fused_linear_tb_loss
from powerflow_fast.models.lm_head import (
    ModelHead,
    base_model,
    last_hidden_state,
    read_head,
    through_head,
)
from powerflow_fast.models.packing import packed_hidden_state

if TYPE_CHECKING:
    from peft import PeftModel


def counted_mask(inputs) -> Tensor:  # [B, T] bool
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def completion_states(hidden: Tensor, mask: Tensor, head: ModelHead) -> Tensor:
    """[N, H]: the states that predict the counted completion tokens, on the device of the head.

    `hidden` is [B, P + T, H], and `mask` [B, T] says which completion tokens count.
    """
    hidden = hidden[:, -mask.shape[1] - 1 : -1]
    return hidden[mask.to(hidden.device)].to(head.weight.device)


class LossInForward(GRPOTrainer):
    """TRL's trainer with the LA-TB loss computed inside the wrapped model's own forward."""

    args: Any  # a PowerFlowConfig
    model: Any
    health: Any
    log_z: Any = None  # the learned log Z', a `LearnedLogZ`
    ref_model: Any  # the second copy, for full fine-tuning
    _redirect = _ForwardRedirection()

    def _policy(self):
        return self.accelerator.unwrap_model(self.model)

    @staticmethod
    def as_reference(policy: PeftModel):
        """The context in which `policy` is the reference: a frozen copy of its adapter, or none."""
        return use_adapter(policy, "ref" if "ref" in policy.peft_config else None)

    def _run(self, model, inputs, **options: Any) -> TBOutput:
        """The loss of one micro-batch, entered through the wrapped model's own forward."""
        policy = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            return self._redirect(model, policy, self._loss_in_forward, policy, inputs, **options)

    def _loss_in_forward(self, policy, inputs, *, log_z=None, normalizer=None) -> TBOutput:
        args = self.args
        prompt_length = inputs["prompt_ids"].shape[1]
        mask = counted_mask(inputs)  # [B, T]
        base = base_model(policy)
        head = read_head(base)
        reference = self._reference(policy, inputs, mask, head)
        hidden = self._hidden(base, inputs)
        # A model split over devices (`device_map`) may end on another one than it starts.
        device = head.weight.device
        inputs = {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor)}
        mask = mask.to(device)
        if log_z is None:
            log_z = self._estimate_log_z(hidden[:, :prompt_length], inputs)
        out: TBOutput

        def loss_of_head(hidden, head) -> Tensor:
            nonlocal out
            out = fused_linear_tb_loss(
                hidden,
                head.weight,
                inputs["completion_ids"][mask],
                **{name: value.to(device) for name, value in reference.items()},
                cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(),
                alpha=inputs.get("alpha", args.alpha),
                psi=inputs.get("psi"),
                old_logps=self._old_logps(inputs, mask),
                clip_eps=args.clip_eps,
                balance=args.balance,
                normalizer=normalizer,
                bias=head.bias,
                temperature=self.temperature,
                return_entropy="detached",
                backend=args.loss_backend,
                grad_tolerance=args.grad_tolerance,
                round_logits=args.round_logits,
                check_finite=False,  # SoundSteps stops on all ranks together
                log_z=log_z,
                group_ids=inputs["group"] if isinstance(log_z, str) else None,
                **head.transform,
            )
            return out.loss

        ref_head = [reference[name] for name in ("ref_weight", "ref_bias") if name in reference]
        with maybe_gather_lm_head_ctx(*ref_head):
            rows = completion_states(hidden, mask, head)
            loss = through_head(base, head, loss_of_head, rows)
        return out._replace(loss=loss)

    def _hidden(self, base, inputs) -> Tensor:  # [B, P + T, H]
        forward = packed_hidden_state if self.args.padding_free else last_hidden_state
        pairs = (("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask"))
        return forward(base, *(torch.cat([inputs[a], inputs[b]], dim=1) for a, b in pairs))

    def _reference(self, policy, inputs, mask, policy_head: ModelHead) -> dict[str, Any]:
        """The loss's tensors of the reference, by keyword; its pass is before the policy's."""
        if "ref_per_token_logps" in inputs:
            return {"ref_logps": inputs["ref_per_token_logps"][mask]}
        with torch.no_grad(), self.health.phase("reference"):
            if self.ref_model is not None:
                base = self.accelerator.unwrap_model(self.ref_model)
                hidden = self._redirect(self.ref_model, base, self._hidden, base, inputs)
                head = read_head(base)
            else:
                base = base_model(policy)
                with self.as_reference(policy):
                    hidden = self._hidden(base, inputs)
                    head = read_head(base)
        tensors = {"ref_hidden": completion_states(hidden, mask, head)}
        if head.weight is not policy_head.weight:
            tensors["ref_weight"] = head.weight
            if head.bias is not None:
                tensors["ref_bias"] = head.bias
        return tensors

    def _estimate_log_z(self, prompt_hidden: Tensor, inputs) -> Tensor | str:
        if self.log_z is not None:
            mask = inputs["prompt_mask"].to(self.accelerator.device)
            log_z = self.log_z.head(prompt_hidden.detach().to(mask.device), mask)
            return log_z.to(inputs["prompt_mask"].device)
        return inputs.get("group_log_z", "group")

    def _old_logps(self, inputs, mask) -> Tensor | None:
        """[N] log-probs by the policy that sampled: the sampler's own, else the old policy's."""
        old = inputs.get("old_per_token_logps")
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and self.vllm_importance_sampling_correction and old is not None:
            old = torch.where(sampled.isnan(), old, sampled)  # NaN: the sampler could not say
        return None if old is None else old[mask]
