"""`make report`: tables of the README and of this folder's page, and the plots, from results files.

Each block stands between `<!-- name -->` and `<!-- /name -->`. A test compares pages and plots with
what this would write, so they cannot drift from the measurements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import plots, results_file
from benchmarks.evidence import page as evidence_page
from benchmarks.evidence import sharpening
from benchmarks.gpu import page as gpu_page
from benchmarks.heads import label
from benchmarks.markdown import table
from benchmarks.peers import OURS

PAGE = Path(__file__).resolve().with_name("README.md")
README = PAGE.parent.parent / "README.md"
Row = dict[str, Any]
GROUP_COLUMNS = {  # of the table that sets the groups side by side
    "forward": "log-probs",
    "pair": "policy and reference",
    "tb-frozen": "step, frozen head",
    "tb-trained": "step, trained head",
}
DEMO_ROWS = {  # measure -> (title, factor, unit)
    "accuracy_sampled": ("accuracy, sampled at T=1", 100, " %"),
    "accuracy_greedy": ("accuracy, greedy", 100, " %"),
    "distinct_answers": ("distinct answers per prompt, of 4", 1, ""),
    "distinct_openings": ("distinct openings (two words), of 4", 1, ""),
    "distinct_bigrams": ("distinct word pairs", 100, " %"),
    "mean_length": ("mean length, tokens", 1, ""),
    "base_logp": ("log-prob under the base, nats/token", 1, ""),
}


def step_tables() -> str:
    """Every device: the step with a frozen head, and a training step."""
    blocks = gpu_page.step_tables()
    for results in results_file.load("head"):
        blocks.append(results_file.source(results, short=True))
        rows = results["rows"]
        steps = _by_inputs(rows, "tb-frozen")
        blocks += [_step_table(same) for same in steps if same[0]["source"] == "random"]
        blocks += [_training_table(same) for same in _by_model(rows)]
        tokens = [name for name in plots.names(results) if name.startswith("tokens")]
        blocks += [_plot(name, "benchmarks/results") for name in tokens]
    return "\n\n".join(blocks)


def every_table() -> str:
    """Every device: everything that was measured."""
    blocks = []
    for results in results_file.load("head"):
        blocks.append(results_file.source(results))
        rows = results["rows"]
        blocks += [_step_table(same) for same in _by_inputs(rows, "tb-frozen")]
        blocks += [_group_table(same) for same in _side_by_side(rows)]
        blocks += [_training_table(same) for same in _by_model(rows)]
        blocks += [_certified_table(same) for same in _by_dtype(rows, "certified")]
        blocks += _slopes(rows)
        blocks += _not_measured(results)
        blocks += [_plot(name, "results") for name in plots.names(results)]
    return "\n\n".join(blocks)


def trainer_table() -> str:
    """Every device: steps a minute of the whole trainer and of TRL's."""
    lines = []
    for results in results_file.load("trainer"):
        rates = results["steps_per_minute"]
        ratio = f"{rates['powerflow'] / rates['grpo']:.2f}x"
        cells = (results["device"], f"{rates['powerflow']:.1f}", f"{rates['grpo']:.1f}", ratio)
        lines.append((*cells, results["date"]))
    head = ("steps a minute", "`PowerFlowTrainer`", "`GRPOTrainer`, beta > 0", "ratio", "date")
    return table(head, lines)


def _plot(name: str, folder: str) -> str:
    return f"![{plots.TITLES[name.partition('-')[0]]}]({folder}/{name})"


def _by_inputs(rows: list[Row], group: str) -> Iterator[list[Row]]:
    """Rows of a group that ran on the same inputs."""
    chosen = [row for row in rows if row["group"] == group]
    for key in dict.fromkeys(_inputs(row) for row in chosen):
        yield [row for row in chosen if _inputs(row) == key]


def _by_dtype(rows: list[Row], group: str) -> Iterator[list[Row]]:
    chosen = [row for row in rows if row["group"] == group]
    for dtype in dict.fromkeys(row["dtype"] for row in chosen):
        yield [row for row in chosen if row["dtype"] == dtype]


def _inputs(row: Row) -> str:
    shape = row["shape"]
    text = " on text of SmolLM2" if row["source"] == "SmolLM2" else ""
    return f"{row['dtype']}, N={shape['n']}, H={shape['h']}, V={shape['v']}{text}"


def _step_table(rows: list[Row]) -> str:
    floor = f"over the floor ({_seconds(rows[0]['floor_seconds'])})"
    lines = []
    for row in sorted(rows, key=lambda row: row["seconds"]):
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f} MB"
        ratio, error = f"{row['ratio_to_floor']:.2f}x", f"{row['error']:.0e}"
        lines.append((label(row), _time(row), ratio, extra, error))
    return table((_inputs(rows[0]), "one step", floor, "extra memory", "gradient error"), lines)


def _time(row: Row) -> str:
    """Median, how many runs it is from, and their spread where there are enough."""
    median, spread, runs = row["seconds"], row["seconds_iqr"], row["rounds"]
    said = "one run" if runs == 1 else f"{runs} runs"
    if spread is not None:
        said += f", IQR {100 * spread / median:.0f} %"
    return f"{_seconds(median)} ({said})"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def _side_by_side(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of the groups that share inputs, where there is more than the frozen step."""
    chosen = [row for row in rows if row["group"] in GROUP_COLUMNS]
    for key in dict.fromkeys(_inputs(row) for row in chosen):
        same = [row for row in chosen if _inputs(row) == key]
        if len({row["group"] for row in same}) > 1:
            yield same


def _group_table(rows: list[Row]) -> str:
    """Peers down, groups across; each cell the time and its ratio to that group's floor."""
    groups = [group for group in GROUP_COLUMNS if any(row["group"] == group for row in rows)]
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        cells = [f"**{peer}**" if peer == OURS else peer]
        for group in groups:
            found = [row for row in rows if (row["peer"], row["group"]) == (peer, group)]
            cell = "-"
            if found:
                cell = f"{_seconds(found[0]['seconds'])} ({found[0]['ratio_to_floor']:.2f}x)"
            cells.append(cell)
        lines.append(cells)
    return table([_inputs(rows[0]), *(GROUP_COLUMNS[group] for group in groups)], lines)


def _by_model(rows: list[Row]) -> Iterator[list[Row]]:
    chosen = [row for row in rows if row["group"] == "training-step"]
    for model in dict.fromkeys(row["model"] for row in chosen):
        yield [row for row in chosen if row["model"] == model]


def _training_table(rows: list[Row]) -> str:
    first = rows[0]
    what = f"training step, LoRA, {first['model']}, {first['dtype']}, {first['tokens']} tokens"
    lines = []
    for row in sorted(rows, key=lambda row: row["seconds"]):
        rate, peak = f"{row['tokens_per_second']:.0f}", f"{row['peak_bytes'] / 1e9:.2f} GB"
        lines.append((label(row), _time(row), rate, peak))
    return table((what, "one step", "tokens/s", "peak memory"), lines)


def _certified_table(rows: list[Row]) -> str:
    shape = rows[0]["shape"]
    head = [
        f"certified gradient, {rows[0]['dtype']}, N={shape['n']}: policy's entropy",
        "tolerance",
        "exact step over three bare products",
        "certified over exact step",
        "columns kept",
        "worst mass left out",
    ]
    with_memory = all(row.get("extra_bytes") is not None for row in rows)
    if with_memory:
        head.append("extra memory, exact and certified")
    lines = []
    for row in sorted(rows, key=lambda row: (-row["entropy"], row["grad_tolerance"])):
        cells = [
            f"{row['entropy']:.2f} nats ({row['source']})",
            f"{row['grad_tolerance']:.0e}",
            f"{row['exact_seconds'] / row['products_seconds']:.2f}x",
            f"{row['seconds'] / row['exact_seconds']:.2f}x",
            f"{100 * row['columns_kept']:.1f} %",
            f"{row['skipped_mass']:.0e}",
        ]
        if with_memory:
            exact, certified = row["exact_extra_bytes"] / 1e6, row["extra_bytes"] / 1e6
            cells.append(f"{exact:.0f} MB, {certified:.0f} MB")
        lines.append(cells)
    return table(head, lines)


def _slopes(rows: list[Row]) -> list[str]:
    ours = {axis: b for (peer, axis), b in results_file.slopes(rows).items() if peer == OURS}
    if not ours:
        return []
    listed = ", ".join(f"{axis} {exponent:.2f}" for axis, exponent in ours.items())
    return [f"Doubling one size at a time, the step's time grows with the exponent: {listed}."]


def _not_measured(results: dict[str, Any]) -> list[str]:
    """Each peer once, with its reason; what the time budget dropped."""
    reasons: dict[str, str] = {}
    for what, reason in results.get("unavailable", {}).items():
        reasons.setdefault(what.partition(": ")[2], reason)
    lines = []
    if reasons:
        listed = "; ".join(f"{peer} ({reason})" for peer, reason in reasons.items())
        lines.append(f"Not measured here: {listed}.")
    if dropped := results.get("dropped"):
        lines.append(f"Dropped for lack of time: {len(dropped)} cases, named in the results file.")
    return lines


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
        blocks.append(f"{results_file.source(results, short=True)} Minutes: {minutes}{note}.")
    return "\n\n".join(blocks)


def evidence_table() -> str:
    """Accuracy of PowerFlow and its rivals."""
    every = results_file.load("evidence-sharpening")
    return "\n\n".join(f"{sharpening.accuracy_table(r)}\n\n{r['device']}." for r in every)


TABLES = {
    README: {"step": step_tables, "demo": demo_tables, "evidence": evidence_table},
    PAGE: {"gpu": gpu_page.tables, "head": every_table, "trainer": trainer_table},
}


def render(path: Path) -> str:
    """A page with every table regenerated."""
    text = path.read_text(encoding="utf-8")
    for name, tables in TABLES[path].items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"{path}: expected a block <!-- {name} --> ... <!-- /{name} -->")
        text = block.sub(lambda match, tables=tables: match[1] + tables() + "\n" + match[2], text)
    return text


def files() -> dict[Path, str]:
    """Every file that the report owns, with its text."""
    drawn = {}
    for results in results_file.load("head"):
        for name in plots.names(results):
            drawn[results_file.FOLDER / name] = plots.draw(name, results)
    return {path: render(path) for path in TABLES} | drawn | evidence_page.files()


def main() -> None:
    wanted = files()
    for stale in set(results_file.FOLDER.glob("*.svg")) - set(wanted):
        stale.unlink()
    for path, text in wanted.items():
        if not is_current(path, text):
            path.write_text(text, encoding="utf-8")


def is_current(path: Path, text: str) -> bool:
    """Whether the file holds `text`; of a plot, what looks the same."""
    if not path.exists():
        return False
    held = path.read_text(encoding="utf-8")
    return plots.same(held, text) if path.suffix == ".svg" else held == text


if __name__ == "__main__":
    main()
