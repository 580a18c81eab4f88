"""Which back end computes, and why."""

from __future__ import annotations

import torch

from powerflow_fast.kernels.config import compilers_name, is_interpreted, table_row


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """(name, reason) of the back end that `backend` means; "auto" is triton on a GPU."""
    if backend == "auto":
        return _automatic(device, dtype)
    if backend == "triton" and device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"backend: 'triton' needs a CUDA or ROCm device, got tensors on {device}; "
            "use backend='auto' (or TRITON_INTERPRET=1 to run the kernels in the interpreter)"
        )
    return backend, "asked for"


def _automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    from importlib.util import find_spec

    if device.type != "cuda":
        return "torch", f"no Triton kernels for device type {device.type!r}"
    if dtype == torch.float64:
        return "torch", "the kernels have no float64"
    if find_spec("triton") is None:
        return "torch", "triton is not installed"
    try:
        table_row(compilers_name(device))
    except ValueError as refusal:
        return "torch", str(refusal)
    return "triton", "a GPU, and triton is installed"


# Dynamo cannot trace it, nor has to. This is what torch.compiler.assume_constant_result sets, which
# would import Dynamo with this module.
_automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]
