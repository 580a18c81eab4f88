"""Completions that depend on the prompt and on how often it was sampled.

Without torch, since what a Ray actor imports it imports anew.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np

EOS, WORDS = 1, 20  # of tests.helpers.tiny


def completion(prompt: list[int], index: int) -> list[int]:
    """Token ids of the `index`-th completion of a prompt."""
    draw = np.random.default_rng([index, *prompt])
    return [*draw.integers(2, WORDS, draw.integers(1, 6)).tolist(), EOS]


class Server:
    """In place of verl's handle of a vLLM server, as a Ray actor."""

    def __init__(self):
        self.sampled = Counter()

    async def generate(self, prompt_ids, **kwargs) -> SimpleNamespace:
        key = tuple(prompt_ids)
        ids = completion(list(key), self.sampled[key])
        self.sampled[key] += 1
        return SimpleNamespace(
            token_ids=ids,
            log_probs=[-1.0] * len(ids),  # which verl compares with the actor's
            num_preempted=None,
            routed_experts=None,
            extra_fields={"global_steps": 0},
        )

    async def sleep(self) -> None:
        pass
