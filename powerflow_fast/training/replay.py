"""Earlier rollouts, for updates that need no new one (TBA, arXiv 2503.18929, by recency)."""

from __future__ import annotations

import random
from collections import deque
from typing import Any, NamedTuple

from powerflow_fast.training.sampler import seed_of


class Kept(NamedTuple):
    step: int  # updates that had been made when it came
    rollout: dict[str, Any]  # TRL's, with log-probs of the policy that drew it, and the reference's


class Replay:
    """The last rollouts of a run, and which of them an update trains on.

    Args:
        size: rollouts to keep.
        seed: of the run.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.kept: deque[Kept] = deque(maxlen=size)
        self.seed = seed

    def choose(self, number: int) -> Kept:
        """The rollout for the `number`-th reuse of a run: the newest is as likely as the oldest
        times how many there are, and those between in a line. All ranks choose alike."""
        weights = range(1, len(self.kept) + 1)
        draw = random.Random(seed_of(self.seed, "replay", number))
        return draw.choices(self.kept, weights)[0]

    def state_dict(self) -> list[tuple[int, dict[str, Any]]]:
        return [(kept.step, kept.rollout) for kept in self.kept]

    def load_state_dict(self, state: list[tuple[int, dict[str, Any]]]) -> None:
        self.kept.clear()
        self.kept.extend(Kept(*kept) for kept in state)
