"""`make report`: the README's tables from the files that the benchmarks wrote.

Each table stands between `<!-- name -->` and `<!-- /name -->`; a test compares them, so the README
cannot drift from the measurements.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import results_file

README = Path(__file__).resolve().parent.parent / "README.md"
DEMO_ROWS = {  # measure -> (title, factor, unit)
    "accuracy_sampled": ("accuracy, sampled at T=1", 100, " %"),
    "accuracy_greedy": ("accuracy, greedy", 100, " %"),
    "distinct_answers": ("distinct answers per prompt, of 4", 1, ""),
    "distinct_openings": ("distinct openings (two words), of 4", 1, ""),
    "distinct_bigrams": ("distinct word pairs", 100, " %"),
    "mean_length": ("mean length, tokens", 1, ""),
    "base_logp": ("log-prob under the base, nats/token", 1, ""),
}


def head_tables() -> str:
    """Time, memory and accuracy of one LA-TB step per device and dtype, fastest first."""
    blocks = []
    for results in results_file.load("head"):
        blocks.append(_source(results))
        for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
            blocks.append(_head_table([r for r in results["rows"] if r["dtype"] == dtype]))
    return "\n\n".join(blocks)


def _source(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['device']}; {results['date']}; {versions}."


def _head_table(rows: list[dict[str, Any]]) -> str:
    shape = rows[0]["shape"]
    bare = min(row["bare_products_seconds"] for row in rows)  # one floor for all, the best seen
    lines = [
        f"| {rows[0]['dtype']}, N={shape['n']}, H={shape['h']}, V={shape['v']} | one step "
        f"| over three bare products ({_seconds(bare)}) | extra memory | gradient error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["seconds"]):
        name = f"**{row['peer']}**" if row["peer"] == "powerflow-fast" else row["peer"]
        rounds = "" if row["rounds"] > 1 else " (one run)"
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f} MB"
        lines.append(
            f"| {name} | {_seconds(row['seconds'])}{rounds} | {row['seconds'] / bare:.2f}x "
            f"| {extra} | {row['gradient_error']:.0e} |"
        )
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def demo_tables() -> str:
    """Held-out scores before and after the demo, mean over seeds, with each seed's change."""
    blocks = []
    measured = results_file.load("demo")
    for results in sorted(measured, key=lambda r: -r["runs"][0]["settings"]["alpha"]):
        settings, count = results["runs"][0]["settings"], len(results["runs"])
        minutes = ", ".join(f"{run['seconds'] / 60:.1f}" for run in results["runs"])
        seeds = f"mean of {count} seeds" if count > 1 else "one seed"
        blocks.append(
            f"| alpha = {settings['alpha']:g}, {settings['steps']} steps, {seeds} "
            "| before | after | change per seed |\n| --- | --- | --- | --- |"
        )
        for measure, (title, factor, unit) in DEMO_ROWS.items():
            if measure not in results["mean"]:
                continue
            mean = results["mean"][measure]
            cells = [f"{mean[when] * factor:.3g}{unit}" for when in ("before", "after")]
            changes = ", ".join(f"{value * factor:+.2g}" for value in mean["change_per_seed"])
            blocks[-1] += f"\n| {title} | {cells[0]} | {cells[1]} | {changes} |"
        note = f" ({results['note']})" if results["note"] else ""
        blocks.append(f"{_source(results)} Minutes: {minutes}{note}.")
    return "\n\n".join(blocks)


TABLES = {"head": head_tables, "demo": demo_tables}


def render(text: str) -> str:
    """The README with every table regenerated."""
    for name, table in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"README.md: expected a block <!-- {name} --> ... <!-- /{name} -->")
        text = block.sub(lambda match, table=table: match[1] + table() + "\n" + match[2], text)
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
