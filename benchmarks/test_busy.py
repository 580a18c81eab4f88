"""A step beside other programs: no more than three times its time alone, nor than naive PyTorch's.

pytest benchmarks/ --groups busy --results runs/bench
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import busy
from benchmarks.cases import head_dtypes
from benchmarks.peers import OURS

CPU_DTYPES = [] if torch.cuda.is_available() else head_dtypes(torch.device("cpu"))
BAR = 3.0  # with threads that sleep, as the commands have them


@pytest.mark.parametrize("policy", busy.POLICIES)
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_busy(dtype, policy, session):
    if session.tiny:
        pytest.skip("times alone, which tiny sizes have none of")
    found = busy.in_child(dtype, policy)
    common = {"dtype": str(dtype).removeprefix("torch."), "waiting": policy, "tokens": busy.TOKENS}
    session.busy += [{"peer": peer} | common | seconds for peer, seconds in found.items()]
    if policy != busy.POLICIES[0]:
        ours = found[OURS]
        assert ours["beside"] <= BAR * ours["alone"]
        assert ours["beside"] <= found["naive PyTorch"]["beside"]
