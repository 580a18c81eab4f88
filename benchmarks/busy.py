"""Seconds of a step alone and beside two programs that only count, in a process of its own.

    python -m benchmarks.busy float32

A thread that waits for another one spins by default: on a busy machine it holds the core that the
other waits for. How threads wait, OMP_WAIT_POLICY, is read when torch is imported: hence a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial

import torch

from benchmarks import memory, peers
from benchmarks.cases import FEW_PEERS, GROUPS, model_head
from benchmarks.inputs import draw

ROUNDS, PROGRAMS = 7, 2
COUNTS = [sys.executable, "-c", "while True: pass"]
POLICIES = ("default", "passive")  # the first: as OpenMP has it
TOKENS = 256


def in_child(dtype: torch.dtype, policy: str) -> dict[str, dict[str, float]]:
    """Median seconds "alone" and "beside" by peer."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if policy == POLICIES[0] else {"OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-m", "benchmarks.busy", str(dtype).removeprefix("torch.")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"benchmarks.busy: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def measure(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    inputs = draw("random", model_head("SmolLM2-135M", n=TOKENS, length=64), dtype, memory.CPU)
    names = FEW_PEERS if dtype == torch.float32 else (FEW_PEERS[0], peers.ROUNDED, *FEW_PEERS[1:])
    steps = {}
    for name in names:
        method = next(iter(peers.methods(name, memory.CPU).values()))
        steps[name] = partial(GROUPS["tb-frozen"].run, method, inputs)
        steps[name]()
    alone = _in_turn(steps)
    with ExitStack() as running:
        for _ in range(PROGRAMS):
            running.callback(subprocess.Popen(COUNTS).kill)
        time.sleep(1)
        beside = _in_turn(steps)
    return {name: {"alone": alone[name], "beside": beside[name]} for name in names}


def _in_turn(steps) -> dict[str, float]:
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.busy")
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    print(json.dumps(measure(getattr(torch, parser.parse_args().dtype))))
