"""The learned log-partition estimate log Z'_phi(q) of PowerFlow (arXiv 2603.18363, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from powerflow_fast.logprobs import validation


class LogZHead(nn.Module):
    """log Z'(q) [nats/token] from the mean final hidden state of a prompt, by a small float32 MLP.

    The output layer starts at zero, so log Z' starts at its bias: 0, or what `warm_start` sets.
    A start at 0 is off by (alpha - 1) |l_ref| for every sequence and makes the first steps push
    all log-probs the same way; warm-start it with the group estimate of the first batch.

    Parameters and arithmetic stay float32 under autocast and for bf16 hidden states. These are used
    as they come: pass detached ones to keep log Z' from training the backbone.

    Args:
        hidden_size: H.
        num_layers: linear layers, at least 1.
    """

    def __init__(self, hidden_size: int, num_layers: int = 3) -> None:
        super().__init__()
        if hidden_size < 1 or num_layers < 1:
            raise ValueError(
                "hidden_size and num_layers: expected at least 1, "
                f"got {hidden_size} and {num_layers}"
            )
        self.hidden_size = hidden_size
        layers: list[nn.Module] = [nn.LayerNorm(hidden_size)]
        for _ in range(num_layers - 1):
            layers += [nn.Linear(hidden_size, hidden_size), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """log Z' [S] float32 [nats/token].

        Args:
            hidden: [S, T, H] final hidden states, or pooled over the prompts [S, H]; any float.
            mask: [S, T], true or 1 on the tokens of the prompt; with [S, T, H] only.

        Raises:
            ValueError: naming the argument, what came and what was expected.
        """
        validation.check_tensor("hidden", hidden)
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden: expected [S, T, {self.hidden_size}] with mask [S, T], or pooled "
                f"[S, {self.hidden_size}], got {tuple(hidden.shape)}"
            )
        kept = None
        if hidden.dim() == 3:
            shape = hidden.shape[:2]
            kept = validation.check_mask("mask", mask, shape, "hidden [S, T]", False)[..., None]
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = hidden.float()
            if kept is not None:
                pooled = pooled.where(kept, 0.0).sum(1) / kept.sum(1).clamp(min=1)
            return self.out(self.body(pooled))[:, 0]

    @torch.no_grad()
    def warm_start(self, estimate: Tensor | float) -> None:
        """Start log Z' at the mean of `estimate` (a number, or [S] as `log_z="group"` gives)."""
        value = torch.as_tensor(estimate, dtype=torch.float32).mean()
        if not value.isfinite():
            raise ValueError(f"estimate: expected finite values, got {estimate!r}")
        self.out.bias.fill_(value.item())
