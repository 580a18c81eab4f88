"""One head on one set of inputs: right first, then its row of the results."""

from __future__ import annotations

import torch

from benchmarks import method, peers
from benchmarks.cases import GROUPS, Case, Outputs
from benchmarks.inputs import INPUT_SETS, Inputs, draw

CHECKED_ROWS = 128
# Relative error: a rounding of logits to the input's type (naive bf16) is what its users accept;
# float32 has no excuse.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


def input_sets(case: Case, device: torch.device) -> tuple[list[Inputs], int, Outputs]:
    """Inputs used in turn, the sequences of the first that are checked, and their truth."""
    group = GROUPS[case.group]
    arguments = (case.source, case.shape, case.dtype, device)
    sets = [draw(*arguments, seed=s, train_head=group.train_head) for s in range(INPUT_SETS)]
    whole = case.shape.group or 1  # a group is checked as a whole
    sequences = max(1, min(CHECKED_ROWS, case.shape.n) // (case.shape.length * whole)) * whole
    return sets, sequences, group.truth(sets[0], sequences, peers.ALPHA)


def check(
    case: Case, candidate: peers.Composed, inputs: Inputs, sequences: int, expected: Outputs
) -> float:
    """The largest relative error against float64; AssertionError if it is too large."""
    outputs = GROUPS[case.group].outputs_of(candidate, inputs, sequences)
    error = max(
        ((ours.double() - truth).norm() / truth.norm()).item()
        for ours, truth in zip(outputs, expected, strict=True)
    )
    limit = 1.0 if peers.PEERS[case.peer].approximate else TOLERANCE[case.dtype]
    assert error <= limit, f"{case.peer} is wrong: relative error {error:.1e}, limit {limit:g}"
    return error


def row(case: Case, setting: str, times: list[float], error: float, extra: int | None) -> dict:
    """A line of the results; its floor's seconds are set when the ceilings are known."""
    flops, moved = GROUPS[case.group].floor(case.shape, case.dtype.itemsize)
    timed = method.quartiles(times)
    return {
        "group": case.group,
        "peer": case.peer,
        "setting": setting,
        "shape_name": case.shape_name,
        "shape": vars(case.shape),
        "source": case.source,
        "axis": case.axis,
        "dtype": str(case.dtype).removeprefix("torch."),
        **timed,
        "floor_flops": flops,
        "floor_bytes": moved,
        "tflops": flops / timed["seconds"] / 1e12,
        "extra_bytes": extra,
        "error": error,
    }


def label(row: dict) -> str:
    """The peer of a row, and its setting, as tables have them."""
    name = f"**{row['peer']}**" if row["peer"] == peers.OURS else row["peer"]
    return f"{name} ({row['setting']})" if row.get("setting") else name
