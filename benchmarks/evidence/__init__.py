"""What PowerFlow (arXiv 2603.18363) claims, reproduced on small models: see README.md here.

One module per experiment, each with the same names:

    TITLE                    one line
    plan(done) -> [Run]      every run it wants, given the results so far (name -> result); called
                             again whenever one ends, so that a run may depend on an earlier one
    run(**options) -> dict   one run in a worker process with one thread; JSON in, JSON out
    summarise(done) -> dict  what the results file holds beside the runs
    draw(figure, results)    the plot, from a results file alone
    tables(results) -> str   its tables for README.md, likewise
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXPERIMENTS = ("exact", "length_bias", "sharpening", "flattening", "ablations", "off_policy")


@dataclass(frozen=True)
class Run:
    """One run: a name that says what it is, and the keywords of the experiment's `run`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
