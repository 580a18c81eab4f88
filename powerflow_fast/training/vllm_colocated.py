"""vLLM in the trainer's process, started by TRL, in the type that the trainer computes in.

TRL names no type. vLLM then takes the checkpoint's, and bfloat16 for a float32 checkpoint: a run in
float32 would be sampled 0.03 nats a token off its policy, where float32 on both sides gives 2e-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl.generation import vllm_generation

from powerflow_fast.models.lm_head import base_model

MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def in_own_type(trainer: Any) -> Iterator[None]:
    """Within the block, the vLLM that TRL starts for `trainer` is given its type."""
    start = getattr(vllm_generation, "LLM", None)
    if start is None:  # not installed: TRL says so where it is asked for
        yield
        return

    def start_in_own_type(**options: Any) -> Any:
        return start(**{"dtype": computing_type(trainer)} | options)

    vllm_generation.LLM = start_in_own_type
    try:
        yield
    finally:
        vllm_generation.LLM = start


def computing_type(trainer: Any) -> torch.dtype | str:
    """The type of the policy's activations; "auto", vLLM's own choice, under quantised weights."""
    mixed = MIXED.get(trainer.accelerator.mixed_precision)
    base = base_model(trainer._policy())
    own = "auto" if getattr(base, "is_quantized", False) else base.dtype
    return mixed or own
