"""The learned log Z' in training: its head, its own optimizer, its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from powerflow_fast.log_z import LogZHead
from powerflow_fast.training.config import PowerFlowConfig


class LearnedLogZ(TrainerCallback):
    """The log Z' head and its own optimizer: outside DDP, clipping and (unless asked) schedules.

    It steps whenever the policy's optimizer does, with gradients averaged over ranks as DDP's are.
    """

    def __init__(self, hidden_size: int, args: PowerFlowConfig, accelerator) -> None:
        self.accelerator, self.started = accelerator, False
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # the same start on every rank
            head = LogZHead(hidden_size)
        self.head = head.to(accelerator.device)
        parameters = self.head.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=args.log_z_lr, weight_decay=0.0)

    def start(self, estimate: Tensor) -> None:
        """Start the head at the mean over all ranks of the group estimate [B] of a rollout."""
        self.head.warm_start(self.accelerator.gather(estimate))
        self.started = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        for parameter in self.head.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        for group in self.optimizer.param_groups:
            group["lr"] = args.log_z_lr
            if args.log_z_lr_scheduled:  # the factor by which the scheduler changed the policy's
                group["lr"] *= kwargs["lr_scheduler"].get_last_lr()[0] / args.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.started = True
