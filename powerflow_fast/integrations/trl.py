"""`install_head()`: the trainers of TRL that score with its fused head score with this one."""

from __future__ import annotations

import functools
import sys
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TESTED = ("1.16",)
HOOK = "add_fused_lm_head"


def install_head(**head: Any) -> ExitStack:
    """Make GRPO, RLOO, DPO, KTO and SFT of TRL use this library's head from now on.

    Call it before the trainer is built. As a context manager, `with install_head(): ...`, or by
    `close()` on what it returns, it is undone; trainers built in between keep the head they got.
    What they read is what TRL's head gives (log-probs, entropy, the statistics they log, the MoE
    auxiliary loss), in float32 and without the [tokens, vocab] logits.

    Args:
        **head: `backend`, `grad_tolerance`, `round_logits` of `linear_logprobs`.

    Raises:
        ValueError: for a version of TRL that this was not tested with, or an unknown option. Later,
            when a trainer is built: for a model whose head `patch_head` refuses.
    """
    try:
        found = version("trl")
    except PackageNotFoundError:
        raise ValueError("trl: not installed; pip install 'trl>=1.16,<1.17'") from None
    if ".".join(found.split(".")[:2]) not in TESTED:
        raise ValueError(
            f"trl: tested with {', '.join(TESTED)}, found {found}; install 'trl>=1.16,<1.17', or "
            "call powerflow_fast.integrations.transformers.patch_head on the model yourself"
        )
    from trl.trainer import utils

    from powerflow_fast.integrations.patch_head import patch_head
    from powerflow_fast.logprobs.options import check_door_options

    check_door_options(head)
    ours = functools.partial(patch_head, **head)
    before = getattr(utils, HOOK)
    if not _installed:
        _installed.append(before)  # TRL's own
    _installed.append(ours)
    _replace(before, ours)
    undo = ExitStack()
    undo.callback(_take_out, ours)
    return undo


_installed: list[Any] = []  # TRL's own hook, then ours in the order of installing; the last acts


def _take_out(hook: Any) -> None:
    """Whatever the order of undoing, what acts afterwards is the newest that is left."""
    acting = _installed[-1]
    _installed.remove(hook)
    _replace(acting, _installed[-1])
    if len(_installed) == 1:
        _installed.clear()


def _replace(old: Any, new: Any) -> None:
    """In every module of TRL that has imported the hook; later ones import the new one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl.") and vars(module).get(HOOK) is old:
            setattr(module, HOOK, new)
