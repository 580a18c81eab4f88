"""Stages `heads` and `trained-head`: the pair and the LA-TB step, one process for each peer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks import heads, memory, method, peers
from benchmarks.cases import GROUPS, Case
from benchmarks.gpu.lines import Line
from benchmarks.gpu.shapes import dtype_of, shapes
from benchmarks.gpu.worker import Run
from benchmarks.inputs import INPUT_SETS, Inputs, Shape, draw

SECONDS = 0.5  # of rounds for each case
FROZEN = (
    peers.OURS,
    "quack chunked",
    "Liger scaled CE",
    "CCE exact",
    "TRL fused head",
    "unsloth-zoo",
    "F.linear_cross_entropy",
    "torch.compile",
    "naive PyTorch",
)
TRAINED = (peers.OURS, "Liger scaled CE", "quack", "CCE exact", "naive PyTorch")
SHARPENING = (2.0, 4.0)  # of the policy's logits, for the certified gradient
TOLERANCE = 1e-3
powerflow = partial(peers.PowerflowFast, backend="triton")  # interpreted in a dry run
WARM_ROWS = 1024  # of the trial that compiles
BY_SHAPE = ("quack", "quack chunked", "Liger scaled CE", "CCE exact", "torch.compile")
# Seconds of those that compile for each shape while they are measured.
COMPILES_BY_SHAPE = dict.fromkeys(
    ("quack", "quack chunked", "Liger scaled CE", "torch.compile"), 25
)


def frozen(run: Run) -> Iterator[None]:
    yield from _measure_all(run, ("tb-frozen", "pair"))
    if run.part == peers.OURS:
        name, shape = next(iter(shapes(run.tiny).items()))
        for factor in SHARPENING:
            measure = partial(_certified, run, shape, factor)
            run.case(
                f"certified x{factor:g}, {name}",
                measure,
                _case(run, "tb-frozen", name, shape).bytes_needed(1),
            )


def trained(run: Run) -> Iterator[None]:
    yield from _measure_all(run, ("tb-trained",))


def _case(run: Run, group: str, name: str, shape: Shape) -> Case:
    return Case(group, run.part, name, shape, "random", dtype_of(run.device))


def _measure_all(run: Run, groups: tuple[str, ...]) -> Iterator[None]:
    if run.tiny:
        torch._dynamo.config.disable = True  # what compiles takes half a minute on a CPU
    methods = {"": powerflow()} if run.part == peers.OURS else peers.methods(run.part, run.device)
    _warm(run, methods, groups)
    yield
    best: dict[str, str] = {}  # by shape, the setting that was the fastest
    for name, shape in shapes(run.tiny).items():
        for group in groups:
            case = _case(run, group, name, shape)
            measure = partial(_measure, run, case, methods, best)
            run.case(f"{group}, {name}", measure, case.bytes_needed(INPUT_SETS))


def _warm(run: Run, methods: dict[str, peers.Composed], groups: tuple[str, ...]) -> None:
    """Compiles: few rows of the first shape; all of them for peers that compile by shape."""
    shape = next(iter(shapes(run.tiny).values()))
    rows = shape.n if run.part in BY_SHAPE else min(WARM_ROWS, shape.n)
    few = replace(shape, n=rows)
    for name in groups:
        group = GROUPS[name]
        inputs = draw("random", few, dtype_of(run.device), run.device, train_head=group.train_head)
        for method_ in methods.values():
            try:
                group.run(method_, inputs)
            except torch.OutOfMemoryError as error:  # others have the memory now
                print(f"while compiling: {error}")
        del inputs
    method.free_bytes(run.device)  # gives back what is cached


def _measure(
    run: Run, case: Case, methods: dict[str, peers.Composed], best: dict[str, str]
) -> Line:
    group, device, budget = GROUPS[case.group], run.device, run.budget(SECONDS)
    sets, sequences, expected = heads.input_sets(case, device)
    if case.shape_name in best:
        methods = {best[case.shape_name]: methods[best[case.shape_name]]}
    errors = {
        name: heads.check(case, candidate, sets[0], sequences, expected)
        for name, candidate in methods.items()
    }
    turns = itertools.cycle(sets)
    clock = method.Clock(device)
    setting = next(iter(methods))
    if len(methods) > 1:
        setting = min(
            methods, key=lambda name: clock.seconds(lambda: group.run(methods[name], next(turns)))
        )
    best[case.shape_name] = setting
    times = method.repeat(lambda: group.run(methods[setting], next(turns)), device, budget)
    extra = memory.on_gpu(group, methods[setting], sets[0]) if device.type == "cuda" else None
    return heads.row(case, setting, times, errors[setting], extra)


def _certified(run: Run, shape: Shape, sharpening: float) -> Line:
    """The certified step beside the exact one, on a policy whose logits are multiplied."""
    device, group, budget = run.device, GROUPS["tb-frozen"], run.budget(SECONDS)
    inputs: Inputs = draw("random", shape, dtype_of(device), device).sharpened(sharpening)
    exact, sparse = powerflow(), powerflow(grad_tolerance=TOLERANCE)
    metrics = sparse.tb(inputs).metrics
    skipped = metrics["skipped_mass"].item()
    assert skipped <= TOLERANCE, f"left out {skipped:.1e}, tolerance {TOLERANCE:g}"
    ours, truth = (
        gradient.double().flatten()
        for gradient in (
            group.outputs_of(sparse, inputs, 1)[0],
            group.truth(inputs, 1, peers.ALPHA)[0],
        )
    )
    timed = {
        name: method.quartiles(method.repeat(lambda m=m: group.run(m, inputs), device, budget))
        for name, m in (("exact", exact), ("certified", sparse))
    }
    flops, _ = group.floor(shape, inputs.weight.element_size())
    on_gpu = device.type == "cuda"
    return timed["certified"] | {
        "group": "certified",
        "shape": vars(shape),
        "sharpening": sharpening,
        "grad_tolerance": TOLERANCE,
        "exact_seconds": timed["exact"]["seconds"],
        "floor_flops": flops,
        "columns_kept": metrics["columns_kept"].item(),
        "skipped_mass": skipped,
        "error": ((ours - truth).norm() / truth.norm()).item(),
        "extra_bytes": memory.on_gpu(group, sparse, inputs) if on_gpu else None,
    }
