"""Tables of what was measured on a GPU, from the lines of benchmarks/results/gpu-*.jsonl."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import results_file
from benchmarks.gpu import lines
from benchmarks.gpu.lines import Line
from benchmarks.heads import label
from benchmarks.markdown import table
from benchmarks.method import Ceilings
from benchmarks.whole_step import PHASES


def tables() -> str:
    """Every device: everything that was measured."""
    runs = [run for run in lines.load() if not run[0]["dry_run"]]
    return "\n\n".join(_one(*run) for run in runs) or "No GPU was measured yet."


def step_tables() -> list[str]:
    """Every device: the step with a frozen head at the first shape, as its newest run has it."""
    runs = [(header, found) for header, found in lines.load() if _stage(found, "heads")]
    newest = {header["device"]: header["date"] for header, _ in sorted(runs, key=_date)}
    blocks = []
    for header, found in runs:
        if header["date"] != newest[header["device"]]:
            continue
        rows = _stage(found, "heads")
        for shape in _shapes(rows, "tb-frozen")[:1] if not header["dry_run"] else ():
            blocks += [results_file.source(header, short=True), _steps(rows, found, shape)]
    return blocks


def _date(run: tuple[Line, list[Line]]) -> str:
    return run[0]["date"]


def _one(header: Line, found: list[Line]) -> str:
    blocks = [results_file.source(header)]
    for stage, write in TABLES.items():
        if rows := _stage(found, stage):
            blocks += write(rows, found)
    return "\n\n".join([*blocks, *_compiled(found), *_missing(found)])


def _stage(found: Iterable[Line], stage: str) -> list[Line]:
    """Lines of a stage that hold figures."""
    without = ("skipped", "failed", "ended", "compiled")
    return [
        line for line in found if line["stage"] == stage and not any(k in line for k in without)
    ]


def _ceilings(rows: list[Line], found: list[Line]) -> list[str]:
    cells = []
    for row in rows:
        rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else _bandwidth(row)
        cells.append((row["case"], _seconds(row["seconds"]), rate))
    return [table(("bare", "time", "rate"), cells)]


def _correct(rows: list[Line], found: list[Line]) -> list[str]:
    checked = [row for row in rows if "bound" in row]
    passed = sum(row.get("outcome") == "passed" for row in rows)
    text = f"Kernels against float64: {len(checked)} checks within their bounds"
    if checked:
        worst = max(checked, key=lambda row: row["error"] / row["bound"])
        share = worst["error"] / worst["bound"]
        text += f", the nearest at {100 * share:.0f} % of its bound ({worst['case']})"
    return [f"{text}; {passed} tests of CUDA pass."]


def _kernels(rows: list[Line], found: list[Line]) -> list[str]:
    cells = []
    for row in rows:
        rate = f"{row['tflops']:.0f}" if "tflops" in row else "-"
        vendor = f"{row['vendor_tflops']:.0f}" if "vendor_tflops" in row else "-"
        cells.append((row["case"], _seconds(row["seconds"]), rate, vendor, _bandwidth(row)))
    return [table(("kernel, shape", "time", "TFLOP/s", "vendor's product", "bytes"), cells)]


def _heads(rows: list[Line], found: list[Line]) -> list[str]:
    blocks = [_steps(rows, found, shape) for shape in _shapes(rows, "tb-frozen")]
    cells = [
        (
            row["case"],
            _seconds(row["exact_seconds"]),
            _seconds(row["seconds"]),
            f"{100 * row['columns_kept']:.1f} %",
            f"{row['skipped_mass']:.0e}",
            f"{row['error']:.0e}",
        )
        for row in rows
        if row["group"] == "certified"
    ]
    head = ("logits multiplied, shape", "exact step", "certified", "columns kept")
    return [*blocks, table((*head, "worst mass left out", "gradient error"), cells)]


def _shapes(rows: list[Line], group: str) -> list[str]:
    names = (row["case"].partition(", ")[2] for row in rows if row["group"] == group)
    return list(dict.fromkeys(names))


def _steps(rows: list[Line], found: list[Line], shape: str) -> str:
    """Peers at one shape, the fastest step first."""
    steps = [row for row in rows if row["case"] == f"tb-frozen, {shape}"]
    pairs = {row["peer"]: row for row in rows if row["case"] == f"pair, {shape}"}
    floor = _floor(steps[0], found)
    cells = []
    for row in sorted(steps, key=lambda row: row["seconds"]):
        pair = pairs.get(row["peer"])
        over = "-" if floor is None else f"{row['seconds'] / floor:.2f}x"
        both = "-" if pair is None else _seconds(pair["seconds"])
        error = f"{row['error']:.0e}"
        cells.append((label(row), both, _seconds(row["seconds"]), over, _extra(row), error))
    size = steps[0]["shape"]
    where = f"{shape}: {steps[0]['dtype']}, N={size['n']}, H={size['h']}, V={size['v']}"
    bare = "over three bare products" + ("" if floor is None else f" ({_seconds(floor)})")
    return table((where, "pair", "LA-TB step", bare, "extra memory", "gradient error"), cells)


def _trained(rows: list[Line], found: list[Line]) -> list[str]:
    cells = []
    for row in sorted(rows, key=lambda row: (row["shape_name"], row["seconds"])):
        floor = _floor(row, found)
        over = "-" if floor is None else f"{row['seconds'] / floor:.2f}x"
        where = (row["shape_name"], label(row), _seconds(row["seconds"]))
        cells.append((*where, over, _extra(row), f"{row['error']:.0e}"))
    head = ("trained head", "", "LA-TB step", "over four bare products")
    return [table((*head, "extra memory", "gradient error"), cells)]


def _tuner(rows: list[Line], found: list[Line]) -> list[str]:
    cells = []
    for row in rows:
        for field, tile in row.get("tiles", {}).items():
            if isinstance(tile, dict):
                size = f"{tile['rows']} x {tile['columns']} x {tile['depth']}"
                more = f"{tile['num_warps']} warps, {tile['num_stages']} stages"
                persistent = ", persistent" if tile["persistent"] else ""
                cells.append((row["case"], field, f"{size}, {more}{persistent}"))
    return [table(("tuned", "kernel", "tile"), cells)] if cells else []


def _counters(rows: list[Line], found: list[Line]) -> list[str]:
    """Of launches that take time; without what PyTorch fills and copies between them."""
    cells = [
        (
            row["case"],
            _seconds(row["seconds"]),
            *(_percent(row[share]) for share in SHARES),
            f"{row['clock'] / 1e9:.2f} GHz" if row.get("clock") else "-",
        )
        for row in rows
        if row.get("tensor_pipe") is not None and row["seconds"] > SHORT and "::" not in row["case"]
    ]
    return [table(("kernel, counted", "time", *SHARES.values(), "clock"), cells)] if cells else []


SHORT = 3e-5  # seconds
SHARES = {"tensor_pipe": "tensor pipe", "l2": "L2", "dram": "memory", "issue": "issue slots"}


def _sanitizer(rows: list[Line], found: list[Line]) -> list[str]:
    said = [f"{row['part']}: {row['errors']} errors" for row in rows if "errors" in row]
    return [f"compute-sanitizer on small steps: {', '.join(said)}."] if said else []


def _lora(rows: list[Line], found: list[Line]) -> list[str]:
    plans = {row["part"]: row["planned_bytes"] for row in rows if "planned_bytes" in row}
    cells = []
    for row in rows:
        if "tokens_per_second" in row:
            name = row.get("model") or f"{row['part']}, {row['case']}"
            rate = f"{row['tokens_per_second']:.0f}"
            planned = f"{plans[row['part']] / 1e9:.1f} GB"
            cells.append((name, _seconds(row["seconds"]), rate, _peak(row), planned))
    head = ("training step, LoRA", "one step", "tokens/s", "peak memory", "`plan` says")
    return [table(head, cells)]


def _prompts(rows: list[Line], found: list[Line]) -> list[str]:
    """A line for each size: a prompt for each completion, and once."""
    by_model: dict[str, dict[str, Line]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["layout"]] = row
    cells = []
    for model, ways in by_model.items():
        if ways.keys() == {"padded", "shared"}:
            each, once = ways["padded"], ways["shared"]
            gain = f"{each['seconds'] / once['seconds']:.2f}x"
            times = _seconds(each["seconds"]), _seconds(once["seconds"])
            cells.append((model, *times, gain, *(_peak(way) for way in (each, once))))
    head = ("training step, LoRA", "prompt for each completion", "prompt once", "gain")
    return [table((*head, "peak for each", "peak once"), cells)]


def _whole_steps(rows: list[Line], found: list[Line]) -> list[str]:
    cells = []
    for row in rows:
        phases = [_seconds(row["phases"][name]) for name in PHASES]
        rate = f"{60 / row['seconds']:.1f} ({row['steps']})"
        cells.append((row["case"], rate, f"{row['tokens_per_second']:.0f}", *phases, _peak(row)))
    head = ("whole step", "steps a minute (steps)", "tokens/s", *PHASES, "peak")
    return [table(head, cells)]


def _peak(row: Line) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"


def _compiled(found: list[Line]) -> list[str]:
    """Time that went into compiling, and not into measuring."""
    said = [
        f"{line['stage']}, {line['part']}: {line['compiled']} in {line['compile_seconds']:.0f} s"
        for line in found
        if "compiled" in line
    ]
    return [f"Kernels compiled while it ran: {'; '.join(said)}."] if said else []


def _missing(found: list[Line]) -> list[str]:
    """What has no figures, and why."""
    said = []
    for line in found:
        name = ", ".join(str(line[k]) for k in ("stage", "part", "case") if k in line)
        reason = line.get("skipped") or line.get("failed") or line.get("ended", "done")
        if any(k in line for k in ("skipped", "failed")) or reason != "done":
            said.append(f"* {name}: {reason}")
    return ["Not measured, or failed:\n\n" + "\n".join(said)] if said else []


def _floor(row: Line, found: list[Line]) -> float | None:
    """Seconds of the bare products and bytes, at what the same run's ceilings reached."""
    ceilings = _stage(found, "ceilings")
    flops = max((line["tflops"] * 1e12 for line in ceilings if "tflops" in line), default=0)
    bandwidth = max((line["bandwidth"] for line in ceilings if "bandwidth" in line), default=0)
    if not flops or not bandwidth:
        return None
    return Ceilings(flops, bandwidth).seconds(row["floor_flops"], row["floor_bytes"])[0]


def _extra(row: Line) -> str:
    return "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f} MB"


def _bandwidth(row: Line) -> str:
    return f"{row['bandwidth'] / 1e12:.2f} TB/s"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} %"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.2f} s"


TABLES = {
    "ceilings": _ceilings,
    "correct": _correct,
    "kernels": _kernels,
    "heads": _heads,
    "trained-head": _trained,
    "tuner": _tuner,
    "counters": _counters,
    "sanitizer": _sanitizer,
    "lora": _lora,
    "prompts": _prompts,
    "whole-step": _whole_steps,
}
