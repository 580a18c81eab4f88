"""Merging an adapter for the sampler and taking it out again, without a trace in the base.

TRL sends merged weights to vLLM: `merge_adapter`, send, `unmerge_adapter`. In bf16 W + BA - BA is
not W, so the base, which is PowerFlow's reference, would drift with every rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


def keep_base_exact(model: PeftModel | Any) -> None:
    """Make `unmerge_adapter` put back the very weights that `merge_adapter` changed.

    Between the two, a copy of the adapted layers' weights lies in main memory (of a rank's shards,
    under FSDP). Quantised layers get a new weight when merged; there the old one is kept instead.
    """
    merge, unmerge = model.merge_adapter, model.unmerge_adapter
    kept: list[tuple[nn.Module, Any, Tensor | None]] = []  # layer, its weight, a copy of that

    def merge_adapter(*args, **kwargs) -> None:
        module: Any
        for module in model.modules():
            if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
                layer = module.get_base_layer()
                weight = layer.weight
                copy = weight.detach().cpu().clone() if weight.is_floating_point() else None
                kept.append((layer, weight, copy))
        merge(*args, **kwargs)

    def unmerge_adapter() -> None:
        unmerge()
        for layer, weight, copy in kept:
            layer.weight = weight
            if copy is not None:
                weight.data.copy_(copy)
        kept.clear()

    vars(model).update(merge_adapter=merge_adapter, unmerge_adapter=unmerge_adapter)
