"""How well the forecast predicts: accuracy of p^alpha from the base's samples, and of training.

`powerflow-fast forecast` weights samples of the base into the optimum of LA-TB. Training for some
steps need not get there, nor stop there: practice on one prompt changes others.
"""

from __future__ import annotations

import statistics

from benchmarks.markdown import table

BySeed = dict[str, list[float]]  # task -> accuracy, a number a seed


def tables(base: BySeed, forecast: dict[str, BySeed], trained: dict[str, BySeed]) -> str:
    """A row an alpha; the gain over the base is what is predicted."""
    rows, pairs = [], []
    for alpha, by_task in forecast.items():
        gains = [
            (expected - before, after - before)
            for task, values in by_task.items()
            for expected, after, before in zip(
                values, trained[alpha][task], base[task], strict=True
            )
        ]
        pairs += gains
        rows.append([f"alpha {alpha}", *_cells(gains)])
    rows.append(["all", *_cells(pairs)])
    head = [
        "gain over the base, points",
        "forecast",
        "trained",
        "mean difference of a task and seed",
        "correlation",
        "same sign",
    ]
    return table(head, rows)


def _cells(gains: list[tuple[float, float]]) -> list[str]:
    expected, found = zip(*gains, strict=True)
    apart = statistics.fmean(abs(a - b) for a, b in gains)
    same = statistics.fmean((a > 0) == (b > 0) for a, b in gains)
    varies = min(map(statistics.pstdev, (expected, found))) > 1e-9
    return [
        f"{100 * statistics.fmean(expected):+.0f}",
        f"{100 * statistics.fmean(found):+.0f}",
        f"{100 * apart:.0f}",
        f"{statistics.correlation(expected, found):.2f}" if varies else "-",
        f"{100 * same:.0f} %",
    ]
