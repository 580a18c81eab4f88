"""Merging an adapter for the sampler and taking it out again, without a trace in the base.

TRL sends merged weights to vLLM: `merge_adapter`, send, `unmerge_adapter`. In bf16 W + BA - BA is
not W, so the base, which is PowerFlow's reference, would drift with every rollout. Only these two
methods of the given PeftModel are replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


def keep_base_exact(model: PeftModel | Any) -> None:
    """Make `unmerge_adapter` put back the very weights that `merge_adapter` changed.

    Between the two, a copy of the adapted layers' weights lies in main memory (of a rank's shards,
    under FSDP). Merging gives a quantised layer a new weight; there the old weight is put back.
    """
    merge, unmerge = model.merge_adapter, model.unmerge_adapter
    # Layer, name of a parameter, the parameter, a copy of it.
    before_merge: list[tuple[nn.Module, str, Any, Tensor | None]] = []

    def merge_adapter(*args, **kwargs) -> None:
        adapted: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A")]
        # An expert layer has several parameters, each with an adapter around it.
        layers = {id(layer): layer for layer in (m.get_base_layer() for m in adapted)}
        for layer in layers.values():
            for name, weight in layer.named_parameters(recurse=False):
                copy = weight.detach().cpu().clone() if weight.is_floating_point() else None
                before_merge.append((layer, name, weight, copy))
        merge(*args, **kwargs)

    def unmerge_adapter() -> None:
        unmerge()
        for layer, name, weight, copy in before_merge:
            setattr(layer, name, weight)
            if copy is not None:
                weight.data.copy_(copy)
        before_merge.clear()

    vars(model).update(merge_adapter=merge_adapter, unmerge_adapter=unmerge_adapter)
