"""Peak memory of one LA-TB step beside its inputs and gradients, in a process of its own.

    python -m benchmarks.memory "TRL fused head" bfloat16 1024 576 49152

On a CPU: the peak resident size during the second step less the resident size just before it (Linux
resets the peak through /proc/self/clear_refs). On a GPU: the allocator's peak.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import inputs, peers


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process [bytes]."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) * 1024


def measure(peer: str, dtype: torch.dtype, shape: inputs.Shape, device: str) -> int:
    loss = peers.loss_function(peer, torch.device(device))
    small = inputs.draw(inputs.Shape(64, shape.h, 4096), dtype, device)
    peers.step(loss, small)  # loads libraries and starts thread pools
    case = inputs.draw(shape, dtype, device)
    gradient = torch.zeros_like(case.hidden)  # the one that stays is not extra
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        del gradient
        peers.step(loss, case)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    del gradient
    peers.step(loss, case)
    return resident("VmHWM") - before


def in_child_process(peer: str, dtype: torch.dtype, shape: inputs.Shape, device: str) -> int:
    """Extra bytes at the peak of one step; raises CalledProcessError if the child fails."""
    arguments = [peer, str(dtype).removeprefix("torch."), shape.n, shape.h, shape.v, device]
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    root = Path(__file__).parent.parent
    # glibc raises this threshold as blocks are freed, and then keeps freed blocks: they would be
    # resident before the measurement and not count.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, cwd=root, env=env, check=True, capture_output=True, text=True)
    return int(result.stdout.split()[-1])


if __name__ == "__main__":
    peer, dtype, n, h, v, device = sys.argv[1:]
    shape = inputs.Shape(int(n), int(h), int(v))
    print(measure(peer, getattr(torch, dtype), shape, device))
