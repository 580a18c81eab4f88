"""`make report`: tables of the README and of this folder's page, and the plots, from results files.

Each block stands between `<!-- name -->` and `<!-- /name -->`. A test compares pages and plots with
what this would write, so they cannot drift from the measurements.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import head_tables, plots, results_file, whole_step_tables
from benchmarks.evidence import page as evidence_page
from benchmarks.evidence import sharpening
from benchmarks.gpu import page as gpu_page
from powerflow_fast.evaluation.scores import MEASURES

PAGE = Path(__file__).resolve().with_name("README.md")
README = PAGE.parent.parent / "README.md"


def step_tables() -> str:
    """GPUs, and the CPU measured last: the step with a frozen head, and a training step."""
    blocks = gpu_page.step_tables()
    for results in sorted(results_file.load("head"), key=lambda found: found["date"])[-1:]:
        blocks.append(results_file.source(results, short=True))
        blocks += head_tables.short_tables(results["rows"])
        tokens = [name for name in plots.names(results) if name.startswith("tokens")]
        blocks += [_plot(name, "benchmarks/results") for name in tokens]
    return "\n\n".join(blocks)


def every_table() -> str:
    """Every device: everything that was measured."""
    blocks = []
    for results in results_file.load("head"):
        blocks += [results_file.source(results), *head_tables.every_table(results)]
        blocks += [_plot(name, "results") for name in plots.names(results)]
    return "\n\n".join(blocks)


def whole_steps() -> str:
    """Every device: whole steps of all sizes, and their plot."""
    blocks = []
    for results in results_file.load("whole-step"):
        blocks += whole_step_tables.tables([results])
        blocks += [f"![{whole_step_tables.TITLE}](results/{whole_step_tables.plot_name(results)})"]
    return "\n\n".join(blocks)


def short_whole_steps() -> str:
    """Every device: whole steps at the anchor."""
    return "\n\n".join(whole_step_tables.short_tables(results_file.load("whole-step")))


def busy_tables() -> str:
    """Every device: a step beside other programs."""
    blocks = []
    for results in results_file.load("busy"):
        blocks += [results_file.source(results, short=True), *head_tables.busy_tables(results)]
    return "\n\n".join(blocks)


def _plot(name: str, folder: str) -> str:
    return f"![{plots.TITLES[name.partition('-')[0]]}]({folder}/{name})"


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
        for measure, (title, percent) in MEASURES.items():
            if measure not in results["mean"]:
                continue
            title = title.format(samples=settings["samples"], temperature=1)
            factor, unit = (100, " %") if percent else (1, "")
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
    return "\n\n".join(
        f"{sharpening.accuracy_table(r, alphas=('4',))}\n\n{r['device']}." for r in every
    )


TABLES = {
    README: {
        "step": step_tables,
        "whole-step": short_whole_steps,
        "demo": demo_tables,
        "evidence": evidence_table,
    },
    PAGE: {
        "gpu": gpu_page.tables,
        "head": every_table,
        "whole-step": whole_steps,
        "busy": busy_tables,
    },
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
    for results in results_file.load("whole-step"):
        name = whole_step_tables.plot_name(results)
        drawn[results_file.FOLDER / name] = whole_step_tables.draw(results)
    return {path: render(path) for path in TABLES} | drawn | evidence_page.files()


def main() -> None:
    wanted = files()
    done = []
    for stale in sorted(set(results_file.FOLDER.glob("*.svg")) - set(wanted)):
        stale.unlink()
        done.append(f"removed {_shown(stale)}: no results stand behind it")
    for path, text in wanted.items():
        if not is_current(path, text):
            path.write_text(text, encoding="utf-8")
            done.append(f"changed {_shown(path)}")
    unchanged = f"nothing changed: {len(wanted)} pages and plots agree with benchmarks/results/"
    print("\n".join(done) or unchanged)


def _shown(path: Path) -> Path:
    root = README.parent
    return path.relative_to(root) if path.is_relative_to(root) else path


def is_current(path: Path, text: str) -> bool:
    """Whether the file holds `text`; of a plot, what looks the same."""
    if not path.exists():
        return False
    held = path.read_text(encoding="utf-8")
    return plots.same(held, text) if path.suffix == ".svg" else held == text


if __name__ == "__main__":
    main()
