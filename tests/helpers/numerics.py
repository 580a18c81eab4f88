"""Error bounds that follow from dtypes and shapes, and comparisons that never pass on NaN."""

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def logit_error_bound(hidden: Tensor, weight: Tensor, *, scale: float = 1.0) -> float:
    """Bound on |z_float32 - z| for float32 sums of H exact products: H eps sum_h |x_h w_h|."""
    magnitude = (hidden.double().abs() @ weight.double().abs().T).max().item()
    return hidden.shape[-1] * EPS32 * magnitude * scale


def logps_error_bound(hidden: Tensor, weight: Tensor, *, scale: float = 1.0) -> float:
    """Twice the error of a logit (target, log-sum-exp) and the softmax's own float32 rounding."""
    largest = (hidden.double() @ weight.double().T).abs().max().item() * scale
    return 2 * logit_error_bound(hidden, weight, scale=scale) + 32 * EPS32 * (1 + largest)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives inf."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return float("inf") if error.isnan() else error.item()


def gradient_tolerance(dtype: torch.dtype) -> float:
    """Relative error of a gradient: float32 sums, a product in the input's type, one cast."""
    return {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
