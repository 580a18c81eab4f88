"""What a model does, tried on a few tokens rather than looked up in a list of names.

A trial may change a model's parameters and modes for a moment; afterwards all is as before, bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from powerflow_fast.models.lm_head import (
    base_model,
    last_hidden_state,
    modes_kept,
    read_head,
    trial_ids,
)
from powerflow_fast.models.parameters import is_sharded, trained_parameters

# How far passes that must agree may differ, in roundings of their type; bf16's is 1 part in 256.
ROUNDINGS = 32
Trial = Callable[[], Tensor]  # what a model makes of a few tokens


def check_pair(
    policy: Any,
    reference: Callable[[], AbstractContextManager] | None = None,
    trial: Trial | None = None,
) -> None:
    """Whether one model can be the policy and, without its adapter, the reference.

    Passes in training and in evaluation mode must agree. With an adapter, every trainable parameter
    is moved for a moment, which must show in the policy and not in the reference.

    Args:
        policy: the PeftModel, or a model that is trained whole.
        reference: for a PeftModel, the context in which it is the reference; default: the base.
        trial: a pass over a few tokens, without a gradient; default: to the last hidden states.

    Raises:
        ValueError: says what was tried, the result, and the parameter at fault.
    """
    if is_sharded(policy):
        return
    run = trial or partial(hidden_trial, base_model(policy))
    _check_modes(policy, run)
    if not hasattr(policy, "peft_config"):
        return
    as_reference = reference or policy.disable_adapter
    trained = trained_parameters(policy)
    with as_reference():
        head = read_head(base_model(policy))  # which a trial may not reach
        culprit = next((n for n, p in trained.items() if p is head.weight or p is head.bias), None)
        fixed = run()
        noise = _distance(fixed, run())  # experts sum in no fixed order on a GPU
    start = run()
    with _moved(trained.values()):
        moved = run()
        with as_reference():
            after = run()
    if not _distance(moved, start) > 8 * noise:
        raise ValueError(
            "model: none of its trainable parameters acts on what is scored (tried by moving all "
            f"{len(trained)}), so nothing would be trained"
        )
    if culprit is None and _distance(after, fixed) > 8 * noise:
        culprit = _culprit(trained, as_reference, lambda: _distance(run(), fixed) > 8 * noise)
    if culprit is not None:
        raise ValueError(
            f"model: {culprit} is trained but is no part of the "
            "adapter that the reference does without, so the reference would move with the policy; "
            "freeze it, or name its layer in the adapter's modules_to_save"
        )


@torch.no_grad()
def hidden_trial(base: PreTrainedModel) -> Tensor:  # [1, TOKENS, H]
    ids = trial_ids(base)
    return last_hidden_state(base, ids, torch.ones_like(ids))


def _check_modes(model: nn.Module, trial: Trial) -> None:
    device = next(model.parameters()).device
    with modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.train()
        first, second = trial(), trial()
        model.eval()
        still = trial()
    for other, what in ((second, "two passes differ"), (still, "training and evaluation differ")):
        error = (first.float() - other.float()).abs().max()
        limit = ROUNDINGS * torch.finfo(first.dtype).eps * first.float().abs().max().clamp(min=1)
        if not error <= limit:
            raise ValueError(
                f"model: {what} by {error:.2g} ({type(base_model(model)).__name__}, every dropout "
                "that is a layer or a module's own number off): the policy would not start at the "
                "reference, nor be trained on what it samples. Set to 0 what its configuration "
                "names dropout, jitter or the like"
            )


@contextmanager
def _moved(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Every parameter a little off, for the time inside; bit for bit as it was afterwards.

    Each entry moves by another amount: a layer norm, or the softmax behind a head, would not notice
    a common one.
    """
    saved = [(p, p.detach().clone()) for p in parameters]
    try:
        with torch.no_grad():
            for parameter, _ in saved:
                draw = torch.Generator(parameter.device).manual_seed(0)
                parameter.add_(torch.empty_like(parameter).uniform_(-1, 1, generator=draw))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _culprit(trained: dict[str, nn.Parameter], reference, moves: Callable[[], bool]) -> str:
    """The name of a trained parameter that moves the reference."""
    for name, parameter in trained.items():
        with _moved([parameter]), reference():
            if moves():
                return name
    return "one of its parameters"


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; NaN, where a model overflows when moved, counts as infinite."""
    return float((one.float() - other.float()).abs().max().nan_to_num(torch.inf))


def check_copy(policy: nn.Module, copy: Any) -> None:
    """ValueError where the reference that was loaded is not the model that was given."""
    others = dict(copy.named_parameters())
    for name, parameter in policy.named_parameters():
        other = others.get(name)
        if any(p.is_meta or not p.numel() for p in (parameter, other) if p is not None):
            return  # sharded or offloaded: the first step's KL tells
        if (
            other is None
            or parameter.shape != other.shape
            or not torch.equal(parameter, other.to(parameter))
        ):
            raise ValueError(
                f"model: its {name} is not that of {copy.config._name_or_path!r}, from where the "
                "reference is loaded (an adapter merged in? a weight changed?): the reference "
                "would be another model; save the model and pass the folder's path"
            )
