"""For models and the Trainer of transformers.

`patch_head`: the model's forward returns log-probs instead of logits. `unpatch_head` undoes it.
`FusedHeadOutput`: what such a forward returns, and what Trainer's `compute_metrics` gets of it.
`LATBTrainer`: LA-TB on completions that exist already.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["FusedHeadOutput", "LATBTrainer", "patch_head", "unpatch_head"]

_HOME = {
    "FusedHeadOutput": "patch_head",
    "patch_head": "patch_head",
    "unpatch_head": "patch_head",
    "LATBTrainer": "offline_trainer",
}
if TYPE_CHECKING:
    from powerflow_fast.integrations.offline_trainer import LATBTrainer
    from powerflow_fast.integrations.patch_head import FusedHeadOutput, patch_head, unpatch_head


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"powerflow_fast.integrations.{_HOME[name]}"), name)
