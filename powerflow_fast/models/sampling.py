"""Completions drawn from a model: every one of them a sample of the distribution that is trained.

A model's own `generation_config` sets temperatures, cuts and penalties for chatting. LA-TB scores
the plain distribution, so none of them may act here. The model is as before afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from powerflow_fast.logprobs.validation import check_number
from powerflow_fast.models.context import Context
from powerflow_fast.models.lm_head import base_model, check_acts, modes_kept, positions
from powerflow_fast.models.prefill import prompts_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Sample(NamedTuple):
    """Prompts with their completions, [B, P + T] each: a model's inputs, by their names.

    Completions begin at column P, the width of the prompts. `model(**sample._asdict(),
    fused_lm_head=True)` scores them with a model that `patch_head` has patched.
    """

    input_ids: Tensor  # int64
    attention_mask: Tensor  # int64: 1 on prompts, and on completions up to their end token
    position_ids: Tensor  # int64: place among the real tokens of the row
    labels: Tensor  # int64: ids of counted completion tokens, end token included; -100 elsewhere

    def completion(self, prompt_width: int) -> tuple[Tensor, Tensor]:
        """ids [B, T] of the completions, and mask [B, T] bool of their counted tokens."""
        ids, labels = self.input_ids[:, prompt_width:], self.labels[:, prompt_width:]
        return ids, labels != -100

    @classmethod
    def of(cls, ids: Tensor, prompts: Tensor, ends: list[int]) -> Sample:
        """From generated `ids` [B, P + T], the mask [B, P] bool of prompts, and end tokens."""
        width = prompts.shape[1]
        ended = torch.isin(ids[:, width:], torch.tensor(ends, device=ids.device))
        mask = torch.cat([prompts, (ended.cumsum(1) - ended.long()) == 0], 1)
        labels = ids.masked_fill(~mask, -100)
        labels[:, :width] = -100
        return cls(ids, mask.long(), positions(mask), labels)


def end_tokens(model: PreTrainedModel, tokenizer=None) -> list[int]:
    """Every token that ends a text: by the model's two configurations, and by its tokenizer."""
    base = base_model(model)
    found: set[int | None] = set()
    for source in (getattr(base, "generation_config", None), base.config, tokenizer):
        ends = getattr(source, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return sorted(end for end in found if end is not None)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    num_return_sequences: int = 1,
    temperature: float = 1.0,
    greedy: bool = False,
    end_token_ids: Iterable[int] | None = None,
) -> Sample:
    """Draw completions from the distribution of `model` itself, at `temperature`.

    The model's `generation_config` (top_p, penalties and the like) has no effect. A completion ends
    with the first end token; a model may have several. A prompt of several completions is computed
    once, where the model can.

    Args:
        model: a causal language model of transformers, or a PeftModel around one, unwrapped.
        input_ids: prompts [B, P] int64, padded on the left.
        attention_mask: [B, P], 0 on padding.
        max_new_tokens: the longest completion, in tokens.
        num_return_sequences: completions of each prompt, in consecutive rows of the result.
        temperature: > 0; logits are divided by it.
        greedy: the likeliest token at every step instead of a sample.
        end_token_ids: instead of `end_tokens(model)`; empty: no completion ends early.

    Returns:
        `Sample` of B * num_return_sequences rows. Random numbers come from torch's global
        generator.

    Raises:
        ValueError: for a temperature or sizes out of range, a prompt too long for the model, a row
            that is padded on the right, masks that do not fit, and adapters that act in PeftModel's
            own forward alone.
    """
    _check(input_ids, attention_mask, max_new_tokens, num_return_sequences, temperature)
    base = base_model(model)
    for config in getattr(model, "peft_config", {}).values() if base is not model else ():
        check_acts(config)
    context = Context(base.config)
    for i, tokens in enumerate(attention_mask.sum(1).tolist()):
        context.check(f"input_ids: prompt {i}", tokens, max_new_tokens)
    ends = sorted(end_tokens(model) if end_token_ids is None else set(end_token_ids))
    drawn: dict[str, Any] = dict(do_sample=False)
    if not greedy:
        drawn = dict(do_sample=True, temperature=temperature, top_k=0)
    options = dict(
        **drawn,
        max_new_tokens=max_new_tokens,
        num_return_sequences=num_return_sequences,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # masked out
        use_cache=True,
    )
    with modes_kept(base), generation_config(base, **options), prompts_once(base):
        base.eval()
        ids = base.generate(input_ids=input_ids, attention_mask=attention_mask.long())
    prompts = attention_mask.bool().repeat_interleave(num_return_sequences, 0)
    return Sample.of(ids, prompts, ends)


@contextmanager
def generation_config(base: PreTrainedModel, **options: Any) -> Iterator[None]:
    """The model's `generation_config` is `options` and nothing else, for the time inside.

    Passing `options` to `generate` is not enough: it fills gaps from the model's configuration.
    """
    from transformers import GenerationConfig

    before = base.generation_config
    base.generation_config = GenerationConfig(**options)
    try:
        yield
    finally:
        base.generation_config = before


def _check(ids: Tensor, mask: Tensor, tokens: int, completions: int, temperature: float) -> None:
    if ids.ndim != 2 or ids.shape != mask.shape or 0 in ids.shape:
        raise ValueError(
            "attention_mask: expected the shape of input_ids, [B, P] and not empty, got "
            f"{tuple(mask.shape)} for {tuple(ids.shape)}"
        )
    if not mask[:, -1].all():
        raise ValueError(
            "attention_mask: expected prompts that end in the last column, got padding there; "
            "tokenize with padding_side='left'"
        )
    if tokens < 1 or completions < 1:
        raise ValueError(
            "max_new_tokens, num_return_sequences: expected at least 1, "
            f"got {tokens} and {completions}"
        )
    check_number("temperature", temperature, positive=True)
