"""The parameters of a model and the numbers its modules keep: which are trained, which drop out."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over ranks (ZeRO-3) or on the meta device: no pass is tried."""
    return any(p.is_meta or p.numel() == 0 for p in model.parameters())


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Module, attribute and value of every dropout: layers, and numbers that modules keep.

    A model that reads its configuration in the forward pass (Falcon) has more of them.
    """
    from torch.nn.modules.dropout import _DropoutNd

    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = "drop" in name or (name == "p" and isinstance(module, _DropoutNd))
            if is_rate and isinstance(value, float):
                yield module, name, value


def disable_dropout(model: nn.Module) -> None:
    """Set all of `dropouts` to 0."""
    for module, name, _ in dropouts(model):
        setattr(module, name, 0.0)


def keep_gradient(model) -> None:
    """Have bitsandbytes' 4-bit layers stay as they are in evaluation.

    On CPUs with bf16 units they repack themselves in the first forward pass without a gradient
    (bitsandbytes 0.50); from then on no gradient comes through them.

    Raises:
        ValueError: for a layer that has been repacked already.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError(
                    f"model: {name} was repacked for inference by a forward pass in evaluation, "
                    "and no gradient comes through it; load the model anew"
                )
