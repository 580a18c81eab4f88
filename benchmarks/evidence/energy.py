"""PowerFlow's target as a reward, for policy gradients: alpha * log p - log pi of a completion.

Its expectation under pi is minus the KL divergence to p^alpha / Z, up to a constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from powerflow_fast import linear_logprobs
from powerflow_fast.models.lm_head import read_head
from powerflow_fast.training.forward import rows_of


@dataclass
class Energy:
    """The reward alpha * log p - log pi, summed over a completion's tokens or their mean [nats].

    `model` is the base with the trainer's adapter in it, which is switched off for log p. `log_p`
    keeps the mean of a token's, a number a rollout.
    """

    model: Any
    tokenizer: Any
    alpha: float
    reduction: str  # "sum" or "mean"
    __name__: str = "energy"
    log_p: list[float] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, prompts, completion_ids, **_: Any) -> list[float]:
        rollout = padded(self.tokenizer, prompts, completion_ids)
        policy = token_logps(self.model, rollout)
        with adapters_off(self.model):
            reference = token_logps(self.model, rollout)
        total = (self.alpha * reference - policy).sum(1)
        lengths = rollout["completion_mask"].sum(1)
        self.log_p.append((reference.sum() / lengths.sum().clamp(min=1)).item())
        if self.reduction == "mean":
            total /= lengths.clamp(min=1)
        return total.tolist()


def padded(tokenizer, prompts: Sequence[str], completion_ids) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right: ids and masks [B, T]."""
    encoded = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(list(ids), dtype=torch.long) for ids in completion_ids], batch_first=True
    )
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {
        "prompt_ids": encoded["input_ids"],
        "prompt_mask": encoded["attention_mask"],
        "completion_ids": ids,
        "completion_mask": mask.long(),
    }


def token_logps(model, rollout: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, T] log-probs of the completions' tokens, 0 where there is none."""
    mask, head, rows = rollout["completion_mask"].bool(), read_head(model), rows_of(rollout)
    hidden = rows.predicting(rows.hidden_states(model), mask)
    targets = rollout["completion_ids"][mask]
    logps = torch.zeros(mask.shape)
    logps[mask] = linear_logprobs(hidden, head.weight, targets, bias=head.bias, **head.transform)
    return logps


@contextmanager
def adapters_off(model) -> Iterator[None]:
    """The base alone, where PEFT has put its layers into `model`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
