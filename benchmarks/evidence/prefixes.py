"""Texts that a model goes on with, token by token: their cache and the next token's logits."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from powerflow_fast.models.lm_head import positions


class Prefixes:
    """R prefixes, read once, and `logits` [R, V] of what follows."""

    def __init__(self, model, input_ids: Tensor, attention_mask: Tensor) -> None:
        self.model, self.mask = model, attention_mask
        places = positions(attention_mask)
        given = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=places)
        out = model(**given, use_cache=True, logits_to_keep=1)
        self.cache, self.place = out.past_key_values, places[:, -1:]
        self.logits = out.logits[:, -1]

    def log_p(self) -> Tensor:  # [R, V], float32
        return self.logits.float().log_softmax(-1)

    def feed(self, token: Tensor) -> None:  # [R, 1]
        self.mask = torch.cat([self.mask, torch.ones_like(token)], 1)
        self.place = self.place + 1
        given = dict(attention_mask=self.mask, position_ids=self.place, use_cache=True)
        out = self.model(input_ids=token, past_key_values=self.cache, **given)
        self.logits = out.logits[:, -1]

    def repeated(self, times: int) -> Prefixes:
        """A copy with each row `times` times, one after the other; it goes on by itself."""
        new = copy.copy(self)
        new.cache = copy.deepcopy(self.cache)
        new.cache.batch_repeat_interleave(times)
        for name in ("mask", "place", "logits"):
            setattr(new, name, getattr(self, name).repeat_interleave(times, 0))
        return new
