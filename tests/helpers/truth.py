"""The head in float64 by plain PyTorch and autograd, with every option the kernels know."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from powerflow_fast.kernels import operands
from powerflow_fast.kernels.config import config_for
from powerflow_fast.logprobs.options import HeadOptions
from tests.helpers.numerics import EPS32, logps_error_bound

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Head:
    """One model's inputs, in the dtype under test."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]

    def operands(self) -> operands.Head:
        return operands.Head(self.hidden, self.weight, self.bias)

    def logits(self, options: HeadOptions) -> Tensor:  # [N, V]
        """float64 and differentiable in inputs that were made so with `double`."""
        z = self.hidden.double() @ self.weight.double().T
        if self.bias is not None:
            z = z + self.bias.double()
        if options.round_logits:
            z = z + (z.to(self.hidden.dtype).double() - z).detach()
        z = z * options.logit_scale
        if options.softcap is not None:
            z = options.softcap * torch.tanh(z / options.softcap)
        return z / options.temperature

    def double(self) -> "Head":
        """float64 leaves with gradients; rounding, if any, must have been tested without them."""
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        return Head(
            self.hidden.double().requires_grad_(), self.weight.double().requires_grad_(), bias
        )


def make_head(
    n: int, h: int, v: int, dtype: torch.dtype, device, *, bias: bool = False, spread: float = 1.0
) -> Head:
    """Random inputs whose logits have a standard deviation of about `spread`."""
    hidden = torch.randn(n, h, device=device)
    weight = torch.randn(v, h, device=device) * (spread / h**0.5)
    vector = torch.randn(v, device=device).to(dtype) if bias else None
    return Head(hidden.to(dtype), weight.to(dtype), vector)


def statistics(head: Head, targets: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor, Tensor]:
    """logps, lse and entropy [N] of valid targets."""
    z = head.logits(options)
    log_p = z.log_softmax(-1)
    logps = log_p.gather(1, targets[:, None])[:, 0]
    return logps, z.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)


def unit_gradient(head: Head, targets: Tensor, options: HeadOptions) -> Tensor:  # [N, H]
    leaves = head.double()
    logps, _, _ = statistics(leaves, targets, options)
    return torch.autograd.grad(logps.sum(), leaves.hidden)[0]


def tile_sizes(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile in use: sizes that mean several tiles, or ragged ones, follow."""
    tile = config_for(device, dtype).statistics
    return tile.rows, tile.columns


def logps_bound(head: Head, options: HeadOptions) -> float:
    """Of logps and lse; powers of two are known to 2^-22 on a GPU."""
    scale = abs(options.scale)
    extra = 0.0 if head.bias is None else head.bias.double().abs().max().item() * scale
    return logps_error_bound(head.hidden, head.weight, scale=scale) + 64 * EPS32 * (1 + extra)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Every element within `bound`; NaN anywhere fails."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g}"


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory becomes NaN, so that an element no kernel wrote shows."""

    def filled(make):
        def make_filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-7)

        return make_filled

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
