"""Stage `tuner`: every candidate tile, timed; the fastest are written as the kernels read them.

`POWERFLOW_TUNE=1 POWERFLOW_CACHE=FOLDER` then uses the tiles.json of the output folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from benchmarks import method
from benchmarks.gpu.lines import Line
from benchmarks.gpu.shapes import dtype_of, shapes
from benchmarks.gpu.worker import Run
from benchmarks.inputs import Shape, draw
from powerflow_fast.kernels.config import CANDIDATES, TABLE, Tile, config_for
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import triton_tuning
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.triton_backend import tuned_calls

SECONDS = 0.1  # of rounds for each candidate


def tuner(run: Run) -> Iterator[None]:
    os.environ["POWERFLOW_CACHE"] = str(run.folder)
    torch.zeros(1, device=run.device)
    yield
    for name, shape in shapes(run.tiny).items():
        run.case(f"fastest tiles, {name}", partial(_tune, run, name, shape))


def _tune(run: Run, name: str, shape: Shape) -> Line:
    device, dtype = run.device, dtype_of(run.device)
    inputs = draw("random", shape, dtype, device)
    policy = Head(inputs.hidden.detach(), inputs.weight, None)

    def seconds(call) -> float:
        return method.quartiles(method.repeat(call, device, run.budget(SECONDS)))["seconds"]

    def watch(field: str, tile: Tile, spent: float) -> None:
        fits = {"seconds": spent} if spent < float("inf") else {"skipped": "does not fit"}
        case = f"{field} {tile.rows} x {tile.columns} x {tile.depth}, {name}"
        where = {"stage": run.stage, "part": run.part, "case": case, "tile": asdict(tile)}
        run.write(where | fits)

    table = TABLE["sm_90"] if run.tiny else config_for(device, dtype)  # the candidates' rows
    calls = tuned_calls(policy, inputs.targets, HeadOptions(), table)
    best = triton_tuning.tune(calls, table, seconds, watch)
    triton_tuning.store(triton_tuning.cache_key(policy.hidden, policy.weight), best)
    return {"tiles": asdict(best), "shape": vars(shape), "candidates": len(CANDIDATES)}
