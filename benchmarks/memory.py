"""Peak memory of one run of a case beside its inputs and what it returns.

On a GPU the allocator's peak. On a CPU the peak resident size of a process of its own during the
second run, less the resident size just before it (Linux resets the peak through
/proc/self/clear_refs):

    python -m benchmarks.memory '{"group": "tb-frozen", "peer": "TRL fused head", ...}'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases import GROUPS, Case
from benchmarks.inputs import Inputs, Shape, draw

CPU = torch.device("cpu")


def on_gpu(case: Case, method: peers.Composed, inputs: Inputs) -> int:
    """Extra bytes at the peak; the case must have run before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = GROUPS[case.group].run(method, inputs)
    returned = sum(x.nbytes for x in outputs)
    return max(torch.cuda.max_memory_allocated() - before - returned, 0)


def on_cpu(case: Case, setting: str) -> int:
    """Extra bytes at the peak, from a child process; raises RuntimeError if it fails."""
    request = {
        "group": case.group,
        "peer": case.peer,
        "setting": setting,
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": vars(case.shape),
    }
    return run_child("benchmarks.memory", request)


def run_child(module: str, request: dict) -> int:
    """The number that `python -m module REQUEST` prints last; RuntimeError with its last words."""
    # glibc raises this threshold as blocks are freed, and then keeps freed blocks: they would be
    # resident before the measurement and not count.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, json.dumps(request)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the child process failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout.split()[-1])


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process [bytes]."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) * 1024


def reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(request: dict) -> int:
    """The child's part."""
    group, shape = GROUPS[request["group"]], Shape(**request["shape"])
    method = peers.methods(request["peer"], CPU)[request["setting"]]
    dtype = getattr(torch, request["dtype"])
    inputs = draw("random", shape, dtype, CPU, train_head=group.train_head)
    # Loads libraries, compiles, starts thread pools; what is returned is not extra, so it stays.
    outputs = group.run(method, inputs)
    returned = sum(x.nbytes for x in outputs)
    del outputs
    reset_resident_peak()
    before = resident("VmRSS")
    outputs = group.run(method, inputs)  # alive until the peak is read
    extra = resident("VmHWM") - before - returned
    del outputs
    return max(extra, 0)


if __name__ == "__main__":
    print(measure(json.loads(sys.argv[1])))
