"""`install_head()`: the trainers of TRL that score with its fused head score with this one."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

from powerflow_fast.integrations.host import check_version, replace_function

INSTALL = "install 'trl>=1.16,<1.17'"
TESTED = ("1.16",)
HOOK = "add_fused_lm_head"


def install_head(**head: Any) -> ExitStack:
    """Make GRPO, RLOO, DPO, KTO and SFT of TRL use this library's head from now on.

    Call it before the trainer is built. The head gives what TRL's gives (log-probs, entropy, the
    statistics that trainers log, the MoE auxiliary loss), in float32 and without logits
    [tokens, vocab].

    Args:
        **head: `backend`, `grad_tolerance`, `round_logits` of `linear_logprobs`.

    Returns:
        A context manager, `with install_head(): ...`, whose end or `close()` undoes this. Trainers
        built in between keep the head they got.

    Raises:
        ValueError: for a version of TRL that this was not tested with, or an unknown option. Later,
            when a trainer is built: for a model whose head `patch_head` refuses.
    """
    alone = "call powerflow_fast.integrations.transformers.patch_head on the model yourself"
    check_version("trl", TESTED, f"; pip {INSTALL}", f"; {INSTALL}, or {alone}")
    from trl.trainer import utils

    from powerflow_fast.integrations.patch_head import patch_head
    from powerflow_fast.logprobs.options import check_door_options

    check_door_options(head)
    ours = functools.partial(patch_head, **head)
    before = getattr(utils, HOOK)
    if not _installed:
        _installed.append(before)  # TRL's own
    _installed.append(ours)
    replace_function("trl", HOOK, before, ours)
    undo = ExitStack()
    undo.callback(_take_out, ours)
    return undo


_installed: list[Any] = []  # TRL's own hook, then ours in the order of installing; the last acts


def _take_out(hook: Any) -> None:
    """Whatever the order of undoing, what acts afterwards is the newest that is left."""
    acting = _installed[-1]
    _installed.remove(hook)
    replace_function("trl", HOOK, acting, _installed[-1])
    if len(_installed) == 1:
        _installed.clear()
