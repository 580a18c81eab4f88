"""One micro-batch through reference and policy into the LA-TB loss; it reads no data and no disk.

A batch is TRL's dictionary of a rollout: prompts and completions, [B, P] and [B, T], with masks.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx, use_adapter

from powerflow_fast.loss import TBOutput, fused_linear_tb_loss
from powerflow_fast.models.lm_head import ModelHead, base_model, read_head, through_head
from powerflow_fast.models.packed_attention import accept_packed_rows
from powerflow_fast.models.packing import Layout, Rows, lay_out
from powerflow_fast.models.packing_check import LayoutChoice, choose_layout

if TYPE_CHECKING:
    from peft import PeftModel


def counted_mask(inputs) -> Tensor:  # [B, T] bool
    mask = inputs["completion_mask"].bool()
    return mask & inputs["tool_mask"].bool() if "tool_mask" in inputs else mask


def rows_of(inputs, layout: Layout = "padded") -> Rows:
    """Prompts and completions as rows for a model; packed ones hold no masked tokens."""
    ids, mask = (
        torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1)
        for kind in ("ids", "mask")
    )
    return lay_out(ids, mask, inputs["prompt_mask"].sum(1), layout)


class LossInForward(GRPOTrainer):
    """TRL's trainer with the LA-TB loss computed inside the wrapped model's own forward."""

    args: Any  # a PowerFlowConfig
    model: Any
    health: Any
    log_z: Any = None  # the learned log Z', a `LearnedLogZ`
    ref_model: Any  # the second copy, for full fine-tuning
    layout = LayoutChoice("padded")  # of the rows in which both models compute
    pass_tokens = (0, 0)  # of the last pass: computed, and saved by shared prompts
    _redirect = _ForwardRedirection()

    def _policy(self):
        return self.accelerator.unwrap_model(self.model)

    def choose_layout(self) -> None:
        """ValueError where the model cannot do what `shared_prompt` or `padding_free` asks for."""
        args, base = self.args, base_model(self._policy())
        self.layout = choose_layout(base, args.shared_prompt, args.padding_free)
        if self.layout.reason:
            warnings.warn(self.layout.reason, stacklevel=4)
        if self.ref_model is not None and self.layout.best != "padded":
            accept_packed_rows(base_model(self.accelerator.unwrap_model(self.ref_model)))

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
        mask = counted_mask(inputs)  # [B, T]
        base = base_model(policy)
        head = read_head(base)
        rows = rows_of(inputs, self.layout.of(inputs["prompt_ids"], inputs["completion_ids"]))
        self.pass_tokens = rows.input_ids.numel(), rows.saved
        reference = self._reference(policy, rows, inputs, mask, head)
        hidden = rows.hidden_states(base)
        states = rows.predicting(hidden, mask).to(head.weight.device)
        # A model split over devices (`device_map`) may end on another one than it starts.
        device = head.weight.device
        inputs = {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor)}
        mask = mask.to(device)
        if log_z is None:
            log_z = self._estimate_log_z(rows, hidden, inputs)
        del hidden  # of every token; the head needs those that predict
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
            loss = through_head(base, head, loss_of_head, states)
        return out._replace(loss=loss)

    def _reference(self, policy, rows, inputs, mask, policy_head: ModelHead) -> dict[str, Any]:
        """The loss's tensors of the reference, by keyword; its pass is before the policy's."""
        if "ref_per_token_logps" in inputs:
            return {"ref_logps": inputs["ref_per_token_logps"][mask]}
        with torch.no_grad(), self.health.phase("reference"):
            if self.ref_model is not None:
                base = self.accelerator.unwrap_model(self.ref_model)
                hidden = self._redirect(self.ref_model, base, rows.hidden_states, base)
                head = read_head(base)
            else:
                base = base_model(policy)
                with self.as_reference(policy):
                    hidden = rows.hidden_states(base)
                    head = read_head(base)
        tensors = {"ref_hidden": rows.predicting(hidden, mask).to(head.weight.device)}
        if head.weight is not policy_head.weight:
            tensors["ref_weight"] = head.weight
            if head.bias is not None:
                tensors["ref_bias"] = head.bias
        return tensors

    def _estimate_log_z(self, rows: Rows, hidden: Tensor, inputs) -> Tensor | str:
        if self.log_z is not None:
            mask = inputs["prompt_mask"].to(self.accelerator.device)
            states = rows.first_states(hidden.detach(), mask.shape[1])
            log_z = self.log_z.head(states.to(mask.device), mask)
            return log_z.to(inputs["prompt_mask"].device)
        return inputs.get("group_log_z", "group")

    def _old_logps(self, inputs, mask) -> Tensor | None:
        """[N] log-probs by the policy that sampled: the sampler's own, else the old policy's."""
        old = inputs.get("old_per_token_logps")
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and self.vllm_importance_sampling_correction and old is not None:
            old = torch.where(sampled.isnan(), old, sampled)  # NaN: the sampler could not say
        return None if old is None else old[mask]
