"""Products whose sums and results are float32, on any device (float64 for float64)."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_ONEDNN = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, in `out` where PyTorch's own product forms it; oneDNN ignores `out`."""
    if uses_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b, out=out)
    if a.is_cuda:  # elsewhere PyTorch has no float32 result of 16-bit operands
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return matmul(a.float(), b.float(), out)


def add_product_(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b, by the product itself where it can."""
    if a.dtype == sums.dtype and not uses_onednn(a):
        sums.addmm_(a, b)
    elif a.is_cuda and a.dtype != sums.dtype:
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
    else:
        sums += matmul(a, b)


def has_bf16_units(device: torch.device) -> bool:
    """Whether this is a CPU that multiplies bfloat16 at more than float32's speed."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def uses_onednn(a: Tensor) -> bool:
    """Whether oneDNN multiplies instead of MKL, torch's choice for float32 on a CPU.

    On CPUs of another maker MKL leaves AVX-512 idle: 225 against 510 GFLOP/s on two cores of EPYC.
    On Intel's it is the faster one, but for copies of bfloat16 that oneDNN may multiply as such.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu" or not _ONEDNN:
        return False
    return not is_intel() or torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]


@cache
def is_intel() -> bool:
    """Whether this machine's CPU is Intel's."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else platform.processor()
    return "GenuineIntel" in text
