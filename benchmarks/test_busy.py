"""Steps beside other programs, with threads that wait as the commands have them.

pytest benchmarks/ --groups busy --results runs/bench

A head's step takes at most three times its time alone, and no more than naive PyTorch's beside the
same programs. Sampling takes as long as OpenMP's default has it where nothing else runs.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import busy
from benchmarks.cases import head_dtypes
from benchmarks.peers import OURS

ON_CPU = not torch.cuda.is_available()
CPU_DTYPES = head_dtypes(torch.device("cpu")) if ON_CPU else []
BAR, AS_DEFAULT = 3.0, 1.15


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_a_heads_step(dtype, session):
    name = str(dtype).removeprefix("torch.")
    found = _measure(name, f"step, frozen head, {name}, N={busy.TOKENS}", session)[busy.COMMANDS]
    assert found[OURS]["beside"] <= BAR * found[OURS]["alone"]
    assert found[OURS]["beside"] <= found["naive PyTorch"]["beside"]


@pytest.mark.skipif(not ON_CPU, reason="sampling on a GPU does not wait for threads")
def test_sampling(session):
    found = _measure(busy.SAMPLING, "sampling, SmolLM2-135M with LoRA, float32", session)
    (default,), (ours,) = found[busy.DEFAULT].values(), found[busy.COMMANDS].values()
    assert ours["alone"] <= AS_DEFAULT * default["alone"]


def _measure(what: str, title: str, session) -> busy.Seconds:
    if session.tiny:
        pytest.skip("times alone, which tiny sizes have none of")
    found = busy.measure(what)
    session.busy += [
        {"what": title, "step": step, "waiting": waiting} | seconds
        for waiting, steps in found.items()
        for step, seconds in steps.items()
    ]
    return found
