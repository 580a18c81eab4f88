"""`shared_prompt_hidden_states`: a prompt and its completions, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.logprobs.validation import check_tensor
from powerflow_fast.models.context import Context
from powerflow_fast.models.lm_head import base_model
from powerflow_fast.models.packing import lay_out
from powerflow_fast.models.packing_check import check_shared

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class CompletionStates(NamedTuple):
    """What a head needs of G completions with N tokens in all; arguments of its functions."""

    hidden: Tensor  # [N, H], in the model's dtype
    targets: Tensor  # [N] int64: the completions' tokens
    cu_seqlens: Tensor  # [G + 1] int32: where each completion begins, and the end


def shared_prompt_hidden_states(
    model: PreTrainedModel | PeftModel, prompt: Tensor, completions: Sequence[Tensor]
) -> CompletionStates:
    """The hidden states that predict the completions of one prompt, which is computed once.

    They are those of a row for each completion, within rounding, and so are their gradients::

        states = shared_prompt_hidden_states(model, prompt, completions)
        with torch.no_grad(), model.disable_adapter():
            reference = shared_prompt_hidden_states(model, prompt, completions)
        out = fused_linear_tb_loss(
            states.hidden, weight, states.targets, ref_hidden=reference.hidden,
            cu_seqlens=states.cu_seqlens, log_z=log_z, alpha=alpha,
        )

    The model is asked once whether it can (a trial on a few tokens). Under DDP or FSDP call this
    inside the wrapped model's forward.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        prompt: [P] token ids, P >= 1, without padding.
        completions: G >= 1 tensors [T_i] of token ids, without padding. T_i may be 0.

    Returns:
        `hidden` [N, H], `targets` [N] and `cu_seqlens` [G + 1], N = sum of T_i.

    Raises:
        ValueError: for token ids of another shape, type or range, a completion that ends beyond
            the model's context, or a model whose layers cannot share a prompt.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    completions = list(completions)
    if not completions:
        raise ValueError("completions: expected at least one, got none")
    _check_ids("prompt", prompt, config.vocab_size)
    if not len(prompt):
        raise ValueError("prompt: expected at least one token, got none")
    context = Context(config)
    for number, completion in enumerate(completions):
        _check_ids(f"completions[{number}]", completion, config.vocab_size)
        context.check(f"prompt with completions[{number}]", len(prompt) + len(completion))
    check_shared(base)
    lengths = torch.tensor([len(completion) for completion in completions], device=prompt.device)
    width = len(prompt) + int(lengths.max())
    ids = prompt.new_zeros(len(completions), width)
    for row, completion in zip(ids, completions, strict=True):
        whole = torch.cat([prompt, completion.to(prompt)])
        row[: len(whole)] = whole
    columns = torch.arange(width, device=prompt.device)
    real = columns < len(prompt) + lengths[:, None]
    rows = lay_out(ids, real, torch.full_like(lengths, len(prompt)), "shared")
    scored = real & (columns >= len(prompt))
    return CompletionStates(
        rows.predicting(rows.hidden_states(base), scored),
        ids[scored].long(),
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    )


def _check_ids(name: str, ids: object, vocabulary: int) -> None:
    tokens = check_tensor(name, ids)
    wrong = tokens.is_floating_point() or tokens.dtype == torch.bool
    if tokens.dim() != 1 or (wrong and len(tokens)):  # torch.tensor([]) is of floats
        raise ValueError(
            f"{name}: expected token ids [tokens], got {tokens.dtype} of {tuple(tokens.shape)}"
        )
    if len(tokens) and not (0 <= int(tokens.min()) and int(tokens.max()) < vocabulary):
        raise ValueError(
            f"{name}: expected token ids of 0 to {vocabulary - 1}, got {int(tokens.min())} to "
            f"{int(tokens.max())}"
        )
