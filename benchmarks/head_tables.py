"""Tables of one run of `pytest benchmarks/`, the same on the pages and on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import results_file
from benchmarks.heads import label
from benchmarks.markdown import table
from benchmarks.peers import OURS

Row = dict[str, Any]
PAGE_BYTES = 4096  # what the system counts memory in
GROUP_COLUMNS = {  # of the table that sets the groups side by side
    "forward": "log-probs",
    "pair": "policy and reference",
    "tb-frozen": "step, frozen head",
    "tb-trained": "step, trained head",
}


def of_run(measurement: str, results: dict[str, Any]) -> list[str]:
    """What a terminal shows at the end of a run."""
    if measurement == "tiny":
        cases = f"{len(results['rows'])} cases walked through in tiny sizes: right, not timed."
        return [cases, *not_measured(results)]
    return [results_file.source(results, short=True), *every_table(results)]


def every_table(results: dict[str, Any]) -> list[str]:
    """All that was measured; what was not, and why."""
    rows = results["rows"]
    blocks = [_step_table(same) for same in _by_inputs(rows, "tb-frozen")]
    blocks += [_group_table(same) for same in _side_by_side(rows)]
    blocks += [_training_table(same) for same in _by_model(rows)]
    blocks += [_certified_table(same) for same in _by_dtype(rows, "certified")]
    blocks += [_scaling_table(same) for same in _by_dtype(rows, "scaling")]
    return blocks + not_measured(results)


def short_tables(rows: list[Row]) -> list[str]:
    """The step with a frozen head on random inputs, and training steps."""
    steps = _by_inputs(rows, "tb-frozen")
    blocks = [_step_table(same) for same in steps if same[0]["source"] == "random"]
    return blocks + [_training_table(same) for same in _by_model(rows)]


def busy_tables(results: dict[str, Any]) -> list[str]:
    """A step alone and beside two programs, by how threads wait for each other."""
    rows, blocks = results["rows"], []
    for what in dict.fromkeys(row["what"] for row in rows):
        chosen = [row for row in rows if row["what"] == what]
        head = [what]
        for waiting in dict.fromkeys(row["waiting"] for row in chosen):
            head += [f"alone, {waiting}", "beside two programs"]
        lines = []
        for step in dict.fromkeys(row["step"] for row in chosen):
            cells = [_bold(step)]
            for row in (row for row in chosen if row["step"] == step):
                alone, beside = row["alone"], row["beside"]
                cells += [_seconds(alone), f"{_seconds(beside)} ({beside / alone:.1f}x)"]
            lines.append(cells)
        blocks.append(table(head, lines))
    return blocks


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
    faster: Row | None = None
    for row in sorted(rows, key=lambda row: row["seconds"]):
        extra = "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f} MB"
        ratio, error = f"{row['ratio_to_floor']:.2f}x", f"{row['error']:.0e}"
        time = f"≈ {_time(row)}" if faster and _alike(faster, row) else _time(row)
        lines.append((label(row), time, ratio, extra, error))
        faster = row
    return table((_inputs(rows[0]), "one step", floor, "extra memory", "gradient error"), lines)


def _alike(faster: Row, slower: Row) -> bool:
    """Whether the laps of one of the two are further apart than the two are."""
    apart = max(row.get("seconds_apart", 0.0) for row in (faster, slower))
    return slower["seconds"] - faster["seconds"] < apart


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
        if {row["group"] for row in same} != {"tb-frozen"}:
            yield same


def _group_table(rows: list[Row]) -> str:
    """Peers down, groups across; each cell the time and its ratio to that group's floor."""
    groups = [group for group in GROUP_COLUMNS if any(row["group"] == group for row in rows)]
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        cells = [_bold(peer)]
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


def _scaling_table(rows: list[Row]) -> str:
    """A size doubled, the others as they were: time and extra memory, and how they grow with it."""
    powers = results_file.slopes(rows)
    memory_powers = results_file.slopes(rows, "extra_bytes", PAGE_BYTES)
    factors = sorted({_factor(row) for row in rows})
    head = [f"step, frozen head, one size times ... from {_start(rows)}"]
    head += [*(f"x{factor:g}" for factor in factors), "exponent", "extra memory", "its exponent"]
    lines = []
    for axis, peer in dict.fromkeys((row["axis"], row["peer"]) for row in rows):
        found = {_factor(row): row for row in rows if (row["axis"], row["peer"]) == (axis, peer)}
        times = [_seconds(found[f]["seconds"]) if f in found else "-" for f in factors]
        extra = [found[f]["extra_bytes"] if f in found else None for f in factors]
        cells = ["-" if size is None else f"{size / 1e6:.0f}" for size in extra]
        memory = f"{', '.join(cells)} MB" if any(size is not None for size in extra) else "-"
        grows, memory_grows = (
            f"{grown[peer, axis]:.2f}" if (peer, axis) in grown else "-"
            for grown in (powers, memory_powers)
        )
        lines.append((f"{axis}: {_bold(peer)}", *times, grows, memory, memory_grows))
    return table(head, lines)


def _start(rows: list[Row]) -> str:
    """The sizes that all axes start from."""
    first = min(rows, key=_factor)["shape"]
    sizes = f"{rows[0]['dtype']}, N={first['n']}, H={first['h']}, V={first['v']}"
    sizes += f", {first['n'] // first['length']} sequences"
    groups = [row["shape"]["group"] for row in rows if row["shape"].get("group")]
    return f"{sizes}, groups of {min(groups)}" if groups else sizes


def _factor(row: Row) -> float:
    return float(row["shape_name"].rpartition("_x")[2])


def not_measured(results: dict[str, Any]) -> list[str]:
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


def _bold(peer: str) -> str:
    return f"**{peer}**" if peer == OURS else peer
