"""Tables and plot of whole steps, from a results file of `test_whole_step.py`."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks import plots, results_file
from benchmarks.head_tables import not_measured
from benchmarks.markdown import table
from benchmarks.whole_step import OURS, PHASES, TRL

Row = dict[str, Any]
TITLE = "Seconds of a whole step by phase"
ANCHOR = (256, 64)  # tokens of the prompt, of a completion


def tables(measured: list[dict[str, Any]]) -> list[str]:
    """Every device: all sizes and trainers, a table for each model and sampler."""
    blocks = []
    for results in measured:
        blocks.append(results_file.source(results))
        for key in dict.fromkeys((row["model"], row["sampler"]) for row in results["rows"]):
            same = [row for row in results["rows"] if (row["model"], row["sampler"]) == key]
            blocks.append(_table(f"{key[0]}, sampled by {key[1]}", "trainer", same))
        blocks += not_measured(results)
    return blocks


def short_tables(measured: list[dict[str, Any]]) -> list[str]:
    """Every device: ours and TRL's at the anchor, with each sampler."""
    blocks = []
    for results in measured:
        rows = [row for row in results["rows"] if row["trainer"] in (OURS, TRL)]
        rows = [row for row in rows if (row["prompt"], row["completion"]) == ANCHOR]
        if rows:
            blocks.append(results_file.source(results, short=True))
        for model in dict.fromkeys(row["model"] for row in rows):
            same = [row for row in rows if row["model"] == model]
            blocks.append(_table(f"whole step, {model}, {_size(same[0])}", "sampled by", same))
    return blocks


def _table(title: str, second: str, rows: list[Row]) -> str:
    lines = []
    for row in rows:
        seconds = statistics.median(row["seconds"])
        name = row["trainer"].replace(OURS, f"**{OURS}**")
        first = [_size(row), name] if second == "trainer" else [name, row["sampler"]]
        rate = f"{60 / seconds:.2f} ({len(row['seconds'])})"
        phases = [_phase(row, name) for name in PHASES]
        peak = f"{row['peak_bytes'] / 1e9:.2f} GB"
        lines.append([*first, rate, f"{row['tokens'] / seconds:.0f}", *phases, peak])
    head = (title, second, "steps a minute (steps)", "tokens/s", *PHASES, "peak memory")
    return table(head, lines)


def _size(row: Row) -> str:
    return f"{row['prompt']} + {row['group']} x {row['completion']} tokens"


def _phase(row: Row, name: str) -> str:
    """Seconds, and their share of the step."""
    seconds, whole = statistics.median(row["phases"][name]), statistics.median(row["seconds"])
    return f"{seconds:.2f} s ({100 * seconds / whole:.0f} %)"


def plot_name(results: dict[str, Any]) -> str:
    return f"whole-step-{results['slug']}.svg"


def draw(results: dict[str, Any]) -> str:
    """A panel for each size, in it a bar for each trainer and sampler, a colour for each phase."""
    rows = results["rows"]
    sizes = sorted({(row["model"], row["completion"], row["prompt"]) for row in rows})
    across = min(3, len(sizes))
    down = -(-len(sizes) // across)

    def panels(figure) -> None:
        places = list(figure.subplots(down, across, squeeze=False).flat)
        for place, size in zip(places, sizes, strict=False):
            keys = ("model", "completion", "prompt")
            _panel(place, [row for row in rows if tuple(row[key] for key in keys) == size])
        for place in places[len(sizes) :]:
            place.set_axis_off()
        handles, labels = places[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES))

    return plots.svg(panels, (4 * across, 0.5 + 2.2 * down))


def _panel(place, rows: list[Row]) -> None:
    vllm = {"transformers": "", "vLLM": ", vLLM"}
    labels = [row["trainer"] + vllm[row["sampler"]] for row in rows]
    left = [0.0] * len(rows)
    for phase in PHASES:
        seconds = [statistics.median(row["phases"][phase]) for row in rows]
        place.barh(labels, seconds, left=left, label=phase)
        left = [before + own for before, own in zip(left, seconds, strict=True)]
    place.set(title=f"{rows[0]['model']}\n{_size(rows[0])}", xlabel="seconds a step")
    place.tick_params(axis="y", labelsize=7)
    place.invert_yaxis()
    place.grid(axis="y", visible=False)
