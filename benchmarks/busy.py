"""Seconds of a step alone and beside two programs that only count, by how threads wait.

    python -m benchmarks.busy float32

A thread that waits for another one spins by default: on a busy machine it holds the core that the
other waits for. How threads wait is read when torch is imported: hence a process for each way. They
take turns, so that a machine whose speed changes does so for all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from benchmarks import memory, peers, step_models
from benchmarks.cases import FEW_PEERS, GROUPS, model_head
from benchmarks.inputs import draw
from powerflow_fast.cli.common import SPINS

ROUNDS, PROGRAMS = 7, 2
COUNTS = [sys.executable, "-c", "while True: pass"]
DEFAULT, COMMANDS = "default", f"{SPINS:,} spins"  # as OpenMP and as our commands have it
WAITING = {
    DEFAULT: {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    COMMANDS: {"GOMP_SPINCOUNT": str(SPINS)},
}
READ_BY_OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TOKENS = 256  # of a head's step
SAMPLING = "sampling"
SEQUENCES, PROMPT, NEW_TOKENS = 8, 32, 4
Seconds = dict[str, dict[str, dict[str, float]]]  # by waiting, by step, "alone" and "beside"


def measure(what: str) -> Seconds:
    """Median seconds of each step of `what`, for every way to wait."""
    with ExitStack() as running:
        folder = Path(running.enter_context(tempfile.TemporaryDirectory())) / "model"
        workers = {}
        for waiting in WAITING:
            workers[waiting] = Worker(what, folder, waiting)
            running.callback(workers[waiting].end)
        _in_turn(workers, rounds=1)
        alone = _in_turn(workers)
        for _ in range(PROGRAMS):
            running.callback(subprocess.Popen(COUNTS).kill)
        time.sleep(1)
        beside = _in_turn(workers)
    return {
        waiting: {
            step: {"alone": alone[waiting][step], "beside": beside[waiting][step]}
            for step in alone[waiting]
        }
        for waiting in WAITING
    }


class Worker:
    """A process whose threads wait in one way, and that runs the steps it is told to."""

    def __init__(self, what: str, folder: Path, waiting: str):
        env = {name: value for name, value in os.environ.items() if name not in READ_BY_OPENMP}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.busy", what, "--model", str(folder)],
            env=env | WAITING[waiting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.steps: list[str] = self._answer()

    def seconds(self, step: str) -> float:
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"benchmarks.busy: {self.errors.read()[-2000:]}")
        return json.loads(line)


def _in_turn(workers: dict[str, Worker], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    order = list(workers)
    times = {waiting: {step: [] for step in workers[waiting].steps} for waiting in order}
    for _ in range(rounds):
        for step in workers[order[0]].steps:
            for waiting in order:
                time.sleep(0.05)  # the threads of the one before spin no longer
                times[waiting][step].append(workers[waiting].seconds(step))
        order.append(order.pop(0))
    return {
        waiting: {step: statistics.median(seconds) for step, seconds in steps.items()}
        for waiting, steps in times.items()
    }


def serve(steps: dict[str, Callable[[], object]]) -> None:
    """Run the steps whose names come in, and print the seconds of each."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for step in steps.values():
        step()
    print(json.dumps(list(steps)), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        steps[line.strip()]()
        print(time.perf_counter() - began, file=answers, flush=True)


def head_steps(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """A step with a frozen head, by peer."""
    inputs = draw("random", model_head("SmolLM2-135M", n=TOKENS, length=64), dtype, memory.CPU)
    names = FEW_PEERS if dtype == torch.float32 else (FEW_PEERS[0], peers.ROUNDED, *FEW_PEERS[1:])
    steps = {}
    for name in names:
        method = next(iter(peers.methods(name, memory.CPU).values()))
        steps[name] = partial(GROUPS["tb-frozen"].run, method, inputs)
    return steps


def sampling_steps(folder: Path) -> dict[str, Callable[[], object]]:
    """Tokens of a policy with LoRA, as a trainer samples them."""
    from peft import LoraConfig, get_peft_model

    loaded = step_models.load(step_models.SMOLLM2, folder)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, adapter).eval()
    prompts = step_models.texts(loaded.tokenizer, PROMPT, 1) * SEQUENCES
    given = loaded.tokenizer(prompts, return_tensors="pt")
    length = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    sample = torch.no_grad()(partial(model.generate, **given, **length, do_sample=True, top_k=0))
    return {f"transformers, {SEQUENCES} sequences, {NEW_TOKENS} tokens of each": sample}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.busy")
    parser.add_argument("what", choices=("float32", "bfloat16", SAMPLING))
    parser.add_argument("--model", type=Path, help="folder of the model that samples")
    args = parser.parse_args()
    sampling = args.what == SAMPLING
    serve(sampling_steps(args.model) if sampling else head_steps(getattr(torch, args.what)))


if __name__ == "__main__":
    main()
