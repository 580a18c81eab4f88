"""Scalable Power Sampling (arXiv 2601.21590): p^alpha drawn token by token, without training.

Under p^alpha a next token has the probability p(token)^alpha * zeta(token), normalised; zeta, the
sum of p(rest)^alpha over everything that may follow, is the mean of p(rest)^(alpha - 1) over what
the model itself writes. It is estimated for the likeliest tokens, from a few continuations of each;
a jackknife over these takes off the first order of the ratio's bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.evidence.prefixes import Prefixes
from powerflow_fast.models.sampling import end_tokens

ROWS = 512  # continuations that are computed at once


class Drawn(NamedTuple):
    texts: list[str]  # `samples` of each prompt, one after the other
    tokens: float  # computed for one of them, prompts aside


@torch.no_grad()
def power_sample(
    model,
    tokenizer,
    prompts: Sequence[str],
    samples: int,
    max_new_tokens: int,
    seed: int,
    *,
    alpha: float,
    candidates: int,
    lookaheads: int,
) -> Drawn:
    """Completions from an estimate of p^alpha.

    Args:
        candidates: the likeliest tokens among which the next is drawn.
        lookaheads: continuations of each, sampled at T=1 up to `max_new_tokens`; 2 or more.
    """
    if lookaheads < 2:
        raise ValueError(f"lookaheads: expected 2 or more, for the jackknife, got {lookaheads}")
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    ends = torch.tensor(end_tokens(model, tokenizer))
    training = model.training
    model.eval()
    texts, computed = [], 0
    at_once = max(1, ROWS // (candidates * lookaheads))
    rows = torch.arange(len(prompts)).repeat_interleave(samples)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in rows.split(at_once):
            state = Prefixes(model, inputs["input_ids"][part], inputs["attention_mask"][part])
            ended, chosen = torch.zeros(len(part), dtype=torch.bool), []
            for left in range(max_new_tokens - 1, -1, -1):
                log_p, tokens = state.log_p().topk(candidates)
                ahead = torch.zeros(*tokens.shape, lookaheads)
                if left:
                    ahead = _continuations(state, tokens, lookaheads, left, ends)
                    computed += ahead.numel() * left
                probabilities = jackknifed(log_p, ahead, alpha)
                token = tokens.gather(1, torch.multinomial(probabilities, 1))
                chosen.append(token.masked_fill(ended[:, None], int(ends[0])))
                ended |= torch.isin(token[:, 0], ends)
                computed += len(part)
                if left:
                    state.feed(token)
            texts += tokenizer.batch_decode(torch.cat(chosen, 1), skip_special_tokens=True)
    model.train(training)
    return Drawn(texts, computed / len(rows))


def jackknifed(log_p: Tensor, ahead: Tensor, alpha: float) -> Tensor:
    """[R, K] probabilities of the candidates.

    Args:
        log_p: [R, K] of the candidates [nats].
        ahead: [R, K, M] of what was sampled after each [nats].
    """
    values = (alpha - 1) * ahead
    count = values.shape[-1]
    whole = (alpha * log_p + values.logsumexp(-1)).softmax(-1)
    itself = torch.eye(count, dtype=torch.bool)
    others = values[..., None, :].masked_fill(itself, float("-inf")).logsumexp(-1)  # without one
    parts = (alpha * log_p[..., None] + others).softmax(1)
    estimate = (count * whole - (count - 1) * parts.mean(-1)).clamp(min=0)
    return estimate / estimate.sum(-1, keepdim=True)


def _continuations(
    state: Prefixes, tokens: Tensor, lookaheads: int, length: int, ends: Tensor
) -> Tensor:
    """[R, K, M] log-probs of sampled continuations of each candidate [R, K]; 0 after an end."""
    ahead = state.repeated(tokens.shape[1] * lookaheads)
    token = tokens.repeat_interleave(lookaheads, 1).view(-1, 1)
    total, ended = torch.zeros(len(token)), torch.isin(token[:, 0], ends)
    for _ in range(length):
        ahead.feed(token)
        log_p = ahead.log_p()
        token = torch.multinomial(log_p.exp(), 1)
        total += log_p.gather(1, token)[:, 0].masked_fill(ended, 0.0)
        ended |= torch.isin(token[:, 0], ends)
    return total.view(*tokens.shape, lookaheads)
