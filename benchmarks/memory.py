"""Peak memory of one run of a case beside its inputs and what it returns.

On a GPU the allocator's peak. On a CPU the peak resident size of a process of its own during the
second run, less the resident size just before it (Linux resets the peak through
/proc/self/clear_refs).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases import GROUPS, Case, Group
from benchmarks.inputs import Inputs, draw

CPU = torch.device("cpu")
M_MMAP_THRESHOLD = -3  # malloc.h
# Imported once; every child is a fork of the process that did.
PRELOAD = ["benchmarks.memory", "trl.trainer.utils", "liger_kernel.chunked_loss"]


def on_gpu(group: Group, method: peers.Composed, inputs: Inputs) -> int:
    """Extra bytes at the peak; the method must have run before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = sum(x.nbytes for x in group.run(method, inputs))
    return max(torch.cuda.max_memory_allocated() - before - returned, 0)


def on_cpu(case: Case, setting: str) -> int:
    """Extra bytes at the peak, from a child process; raises RuntimeError if it fails."""
    return in_child(_measure, case, setting)


def in_child(function: Callable[..., int], *arguments: object) -> int:
    """`function(*arguments)` in a fresh process; RuntimeError if it dies."""
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise RuntimeError("the child process died; is there too little memory?") from None


@cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def return_freed_blocks() -> None:
    """From now on the C library gives every freed block of 64 KiB or more back to the system.

    glibc keeps such blocks once it has seen a few: they would be resident before the measurement
    and not count. Other libraries give them back anyway.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
    give_back()


def give_back() -> None:
    """What the C library has kept of freed blocks until now goes back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process [bytes]."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.M).group(1)) * 1024


def reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _measure(case: Case, setting: str) -> int:
    """The child's part."""
    return_freed_blocks()
    group = GROUPS[case.group]
    method = peers.methods(case.peer, CPU)[setting]
    inputs = draw("random", case.shape, case.dtype, CPU, train_head=group.train_head)
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
