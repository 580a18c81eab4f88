"""The fastest heads of a group once more, in turn: whether their order holds.

Peers are timed one after the other, minutes apart where they compile, so a change of the machine's
load meets some of them alone. The second lap meets all that it times.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks import method

Row = dict[str, Any]
FASTEST = 4  # of a group on the same inputs
ROUNDS = 8  # of each, at most


class SecondLap:
    """Collects what was timed on one set of inputs, and times the fastest again when they end."""

    def __init__(self, clock: method.Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds  # of a peer's rounds
        self.timed: list[tuple[Row, Callable[[], object], list[float]]] = []

    def enter(self, row: Row, call: Callable[[], object], times: list[float]) -> None:
        self.timed.append((row, call, times))

    def run(self) -> None:
        """The rows get the quartiles of both laps, and how far apart the laps' medians are."""
        fastest = sorted(self.timed, key=lambda one: one[0]["seconds"])[:FASTEST]
        self.timed = []
        if len(fastest) < 2:
            return
        slowest = fastest[-1][0]["seconds"]
        rounds = min(ROUNDS, max(3, method.rounds_within(self.seconds, slowest)))
        again: list[list[float]] = [[] for _ in fastest]
        for _ in range(rounds):
            for (_, call, _), times in zip(fastest, again, strict=True):
                times.append(self.clock.seconds(call))
        for (row, _, first), second in zip(fastest, again, strict=True):
            row["seconds_apart"] = abs(statistics.median(first) - statistics.median(second))
            row |= method.quartiles([*first, *second])
            row["tflops"] = row["floor_flops"] / row["seconds"] / 1e12
