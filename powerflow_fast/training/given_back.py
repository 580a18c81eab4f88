"""A model that a trainer refuses is given back as it came, so that a refusal costs no reload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from powerflow_fast.models.lm_head import base_model
from powerflow_fast.models.parameters import dropouts

# What `patch_head` sets on a model.
PATCHED = ("forward", "_fused_head_options", "_fused_head_patches")


@contextmanager
def given_back(model: Any) -> Iterator[None]:
    """Undo what was done to `model` if the block raises.

    Adapters that were added go; modes, dropouts, hooks and what requires a gradient are as before.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    adapters = set(getattr(model, "peft_config", {}))
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    base, off = base_model(model), list(dropouts(model))
    patch = {name: vars(base)[name] for name in PATCHED if name in vars(base)}
    checkpointing = getattr(base, "is_activation_checkpointing", False)
    hooked = hasattr(base, "_require_grads_hooks")
    try:
        yield
    except BaseException:
        _take_off(model, adapters)
        for name in PATCHED:
            vars(base).pop(name, None)
        vars(base).update(patch)
        if not hooked and hasattr(base, "_require_grads_hooks"):
            base.disable_input_require_grads()
        for module, name, value in off:
            setattr(module, name, value)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        if not checkpointing and getattr(base, "is_activation_checkpointing", False):
            base.activation_checkpointing_disable()
        raise


def _take_off(model: Any, adapters: set[str]) -> None:
    """Remove all adapters but those named; from the layers where `model` is no PeftModel."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if hasattr(model, "get_base_model"):  # a PeftModel
        for name in set(model.peft_config) - adapters:
            model.delete_adapter(name)
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
            elif isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.original_module)
    if not adapters and "peft_config" in vars(model):
        del model.peft_config
