"""Plots of a results file as SVG text that is the same whenever it is drawn.

The last digit of a coordinate depends on the CPU's vector units; `same` looks past it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

TITLES = {
    "tokens": "Time and extra memory of one LA-TB step against tokens",
    "roofline": "Operations per second against operations per byte, with this machine's ceilings",
    "certified": "Cost of the certified gradient against the policy's entropy",
}


def names(results: dict[str, Any]) -> list[str]:
    """File names of the plots for which there are data."""
    rows = results["rows"]
    has = {
        "tokens": any(row.get("axis") == "tokens" for row in rows),
        "roofline": bool(results.get("ceilings")),
        "certified": any(row["group"] == "certified" for row in rows),
    }
    return [f"{kind}-{results['slug']}.svg" for kind in TITLES if has[kind]]


def draw(name: str, results: dict[str, Any]) -> str:
    """The SVG of one of `names`."""
    kind = {"tokens": _tokens, "roofline": _roofline, "certified": _certified}[
        name.partition("-")[0]
    ]
    return svg(lambda figure: kind(figure, results))


def svg(draw_on: Callable[[Any], None], size: tuple[float, float] = (8, 3.4)) -> str:
    """What `draw_on` draws on a figure of `size` inches, in the style that all plots share."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "powerflow-fast",  # otherwise ids are random
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 9,
        "legend.frameon": False,
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw_on(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    lines = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    hashes = re.findall(r'id="([mp][0-9a-f]{10})"', lines)  # of coordinates, among others
    names = {found: f"{found[0]}{number}" for number, found in enumerate(dict.fromkeys(hashes))}
    return re.sub(r"\b[mp][0-9a-f]{10}\b", lambda match: names[match[0]], lines)


def same(first: str, second: str) -> bool:
    """Whether two SVG texts differ in nothing but the last digits of numbers with a point."""
    number = re.compile(r"-?\d+\.\d+")
    if number.sub("", first) != number.sub("", second):
        return False
    pairs = zip(number.findall(first), number.findall(second), strict=True)
    return all(abs(float(a) - float(b)) < 1e-3 for a, b in pairs)


def _tokens(figure, results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row.get("axis") == "tokens"]
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    left, right = figure.subplots(1, 2)
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = [row for row in rows if row["peer"] == peer]
        tokens = [row["shape"]["n"] for row in points]
        left.plot(tokens, [row["seconds"] for row in points], "o-", label=peer)
        # A logarithmic axis has no 0: what is below a page reads as one.
        extra = [max(row["extra_bytes"] or 0, 4096) / 1e6 for row in points]
        right.plot(tokens, extra, "o-", label=peer)
    floors = {row["shape"]["n"]: row["floor_seconds"] for row in rows}
    left.plot(floors.keys(), floors.values(), "k--", linewidth=1, label="floor")
    shape = rows[0]["shape"]
    for axes, label in ((left, "seconds"), (right, "extra memory, MB")):
        axes.set(xscale="log", yscale="log", ylabel=label)
        axes.set_xlabel(f"tokens (H={shape['h']}, V={shape['v']}, {rows[0]['dtype']})")
        axes.set_xticks(list(floors), [str(n) for n in floors])
        axes.minorticks_off()
    left.legend()


def _roofline(figure, results: dict[str, Any]) -> None:
    """Operations that no way can do without, over the bytes that must move at least."""
    dtype, ceiling = next(iter(results["ceilings"].items()))
    rows = [row for row in results["rows"] if row.get("floor_flops") and row["dtype"] == dtype]
    axes = figure.subplots()
    for peer in dict.fromkeys(row["peer"] for row in rows):
        points = [row for row in rows if row["peer"] == peer]
        intensity = [row["floor_flops"] / row["floor_bytes"] for row in points]
        rate = [row["floor_flops"] / row["seconds"] / 1e12 for row in points]
        axes.plot(intensity, rate, "o", markersize=4, label=peer)
    knee = ceiling["flops"] / ceiling["bandwidth"]
    xs = [row["floor_flops"] / row["floor_bytes"] for row in rows]
    edges = [min([knee, *xs]) / 2, knee, 2 * max([knee, *xs])]
    roof = [min(x * ceiling["bandwidth"], ceiling["flops"]) / 1e12 for x in edges]
    axes.plot(edges, roof, "k--", linewidth=1, label="ceilings measured in this run")
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel(f"operations per byte that must move ({dtype})")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _certified(figure, results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["group"] == "certified"]
    axes = figure.subplots()
    for dtype, tolerance in sorted({(row["dtype"], row["grad_tolerance"]) for row in rows}):
        points = [
            row for row in rows if (row["dtype"], row["grad_tolerance"]) == (dtype, tolerance)
        ]
        points.sort(key=lambda row: row["entropy"])
        ratio = [row["seconds"] / row["exact_seconds"] for row in points]
        entropy = [row["entropy"] for row in points]
        axes.plot(entropy, ratio, "o-", label=f"{tolerance:.0e}, {dtype}")
    axes.axhline(1.0, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="mean entropy of the policy, nats", ylabel="time over the exact step")
    axes.set_ylim(bottom=0)
    axes.legend(title="mass left out, at most")
