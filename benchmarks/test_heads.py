"""The head by itself, every group of cases.GROUPS: ours against what a user has today.

Each peer must first give the float64 result on the first sequences of the inputs it is timed on.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import heads, memory, method, peers
from benchmarks.cases import GROUPS, Case, Outputs, table
from benchmarks.conftest import SESSION, Session
from benchmarks.inputs import INPUT_SETS, Inputs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    marked = [
        pytest.param(case, id=case.id, marks=pytest.mark.benchmark(group=case.group))
        for case in table(session.device, tiny=session.tiny)
    ]
    metafunc.parametrize("case", marked)


def test_head(benchmark, session, record, device, case):
    needed, free = case.bytes_needed(INPUT_SETS), method.free_bytes(device)
    if needed > free:
        reason = f"needs about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        session.skip(case.group, case.peer, reason)
    try:
        measure(benchmark, session, case)
    except peers.Unavailable as reason:
        session.skip(case.group, case.peer, str(reason))
    except torch.OutOfMemoryError:
        session.skip(case.group, case.peer, "out of memory")
    except Exception as error:  # the results file says so too
        session.unavailable[f"{case.group}: {case.peer}"] = f"fails: {str(error)[:200]}"
        raise
    record(benchmark.extra_info)  # the same dict: its floor is set when the run ends


def measure(benchmark, session: Session, case: Case) -> None:
    """The row of the results, as the benchmark's further information."""
    group, device = GROUPS[case.group], session.device
    methods = peers.methods(case.peer, device)
    key = (case.peer, case.dtype, case.shape_name)
    if key in session.best_setting:
        methods = {session.best_setting[key]: methods[session.best_setting[key]]}
    sets, sequences, expected = input_sets(session, case)
    errors = {}
    for name, candidate in methods.items():
        errors[name] = heads.check(case, candidate, sets[0], sequences, expected)
    turns = itertools.cycle(sets)
    clock = method.Clock(device)

    def seconds(name: str) -> float:
        return clock.seconds(lambda: group.run(methods[name], next(turns)))

    if key not in session.best_setting:
        only = len(methods) == 1
        session.best_setting[key] = next(iter(methods)) if only else min(methods, key=seconds)
    setting = session.best_setting[key]
    rounds = method.rounds_within(session.case_seconds, seconds(setting))

    def call() -> Outputs:
        return group.run(methods[setting], next(turns))

    benchmark.pedantic(call, rounds=rounds)
    times = list(benchmark.stats.stats.data) if benchmark.enabled else [seconds(setting)]
    extra = extra_bytes(case, setting, methods[setting], sets[0])
    benchmark.extra_info.update(heads.row(case, setting, times, errors[setting], extra))
    if case.axis is None and not session.tiny:
        session.lap.enter(benchmark.extra_info, call, times)


def input_sets(session: Session, case: Case) -> tuple[list[Inputs], int, Outputs]:
    """Inputs that the peers of a group share, the sequences that are checked, and their truth."""
    key = (case.group, case.shape, case.source, case.dtype)
    if key not in session.cached:
        session.lap.run()
        session.cached.clear()  # only one shape at a time has to fit
        if case.axis is None or case.dtype not in session.ceilings:
            session.measure_ceilings(case.dtype)
        try:
            session.cached[key] = heads.input_sets(case, session.device)
        except FileNotFoundError as reason:  # the real model's package
            raise peers.Unavailable(str(reason)) from None
    return session.cached[key]


def extra_bytes(case: Case, setting: str, method_: peers.Composed, inputs: Inputs) -> int | None:
    """Peak memory beside inputs and outputs; on a CPU, where it costs a process, not everywhere."""
    if inputs.hidden.is_cuda:
        return memory.on_gpu(GROUPS[case.group], method_, inputs)
    worth = case.source == "random" and (case.group.startswith("tb-") or case.axis is not None)
    return memory.on_cpu(case, setting) if worth else None
