"""Rewards of the methods that PowerFlow is compared with, for TRL's GRPOTrainer.

Each is the paper's reward and nothing else: GRPO around it (advantages normalised in a group, no KL
term, constant learning rate) is the same for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.evidence.language import answer_of, majority
from powerflow_fast.evaluation.scores import is_correct
from powerflow_fast.models.lm_head import last_hidden_state


@dataclass
class TrueAnswer:
    """1 for a right completion: supervised GRPO (arXiv 2402.03300), the one that sees answers."""

    answers: dict[str, Sequence[str]]  # by prompt
    __name__: str = "true_answer"

    def __call__(self, prompts, completions, **_: Any) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        return [float(is_correct(text, self.answers[prompt])) for prompt, text in pairs]


def majority_vote(prompts, completions, **_: Any) -> list[float]:
    """TTRL (arXiv 2504.16084): 1 for the answer that most completions of the prompt give.

    The vote is among the completions trained on; the paper samples more of them to vote.
    """

    def rewards(answers: list[str]) -> list[float]:
        voted = majority(answers)
        return [float(answer == voted != "") for answer in answers]

    return _by_prompt(rewards, prompts, completions)


def semantic_entropy(prompts, completions, **_: Any) -> list[float]:
    """EMPO (arXiv 2504.05812): the share of the prompt's completions that mean the same.

    Same answer, same meaning, as the paper does where answers are short. Its thresholds on the
    prompt's entropy are left out: at its two ends, one cluster or as many as completions, equal
    rewards give no advantage anyway. A completion without an answer is a cluster of its own.
    """

    def rewards(answers: list[str]) -> list[float]:
        counts = Counter(answers)
        return [(counts[answer] if answer else 1) / len(answers) for answer in answers]

    return _by_prompt(rewards, prompts, completions)


def _by_prompt(
    rewards: Callable[[list[str]], list[float]], prompts: Sequence[str], completions: Sequence[str]
) -> list[float]:
    """`rewards` of each prompt's answers, in the order of the completions."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    result = [0.0] * len(prompts)
    for rows in places.values():
        values = rewards([answer_of(completions[i]) for i in rows])
        for i, value in zip(rows, values, strict=True):
            result[i] = value
    return result


@dataclass
class SelfCertainty:
    """Intuitor (arXiv 2505.19590): mean over tokens of KL(uniform || policy) [nats], online.

    KL(U || p) = -log V - mean_v log p_v, over the whole vocabulary. `model` is the one that PEFT
    puts the trained adapter into, so that its forward is the current policy's; the reward costs one
    forward pass more than others do, without gradient.
    """

    model: Any
    tokenizer: Any
    rows: int = 32  # whose logits [rows, V] exist at once
    __name__: str = "self_certainty"

    @torch.no_grad()
    def __call__(self, prompts, completion_ids, **_: Any) -> list[float]:
        starts = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        pairs = list(zip(starts, completion_ids, strict=True))
        width = max(len(start) + len(ids) for start, ids in pairs)
        tokens = torch.full((len(pairs), width), self.tokenizer.pad_token_id)
        attended, predicting = torch.zeros_like(tokens), torch.zeros_like(tokens).bool()
        for i, (start, ids) in enumerate(pairs):  # padded on the right
            length = len(start) + len(ids)
            tokens[i, :length] = torch.tensor([*start, *ids])
            attended[i, :length] = 1
            predicting[i, len(start) - 1 : length - 1] = True
        hidden = last_hidden_state(self.model, tokens, attended)[predicting]  # [N, H]
        certainty = torch.cat([self._of(part) for part in hidden.split(self.rows)])
        parts = certainty.split([len(ids) for ids in completion_ids])
        return [float(part.mean()) for part in parts]

    def _of(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N] KL(uniform || p) of hidden states [N, H]."""
        logps = self.model.get_output_embeddings()(hidden).float().log_softmax(-1)
        return -math.log(logps.shape[-1]) - logps.mean(-1)
