"""README.md of this folder and the plots, from the results files alone."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import plots, results_file
from benchmarks.evidence import EXPERIMENTS
from benchmarks.evidence.runner import module

PAGE = Path(__file__).with_name("README.md")


def files() -> dict[Path, str]:
    """Every file made from results, with its text; experiments without results leave gaps."""
    text, drawn = PAGE.read_text(encoding="utf-8"), {}
    for name in EXPERIMENTS:
        blocks = []
        for results in results_file.load(f"evidence-{name}"):
            plot = results_file.FOLDER / f"evidence-{name}-{results['slug']}.svg"
            drawn[plot] = plots.svg(lambda figure, r=results, n=name: module(n).draw(figure, r))
            blocks += [
                module(name).tables(results),
                f"![{module(name).TITLE}](../results/{plot.name})",
                f"{results_file.source(results)} {len(results['runs'])} runs, "
                f"{results['cpu_minutes']} CPU-minutes, one thread each.",
            ]
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not block.search(text):
            raise ValueError(f"{PAGE}: expected a block <!-- {name} --> ... <!-- /{name} -->")
        joined = "\n\n".join(blocks) or "Not run yet."
        text = block.sub(lambda match, t=joined: match[1] + t + "\n" + match[2], text)
    return {PAGE: text, **drawn}
