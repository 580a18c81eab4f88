"""The launches of `python -m benchmarks.gpu` on one chip, compiled ahead of time.

    TRITON_CACHE_DIR=FOLDER python -m benchmarks.gpu.pack.launches --chip sm_90 --group timed

Fills Triton's cache, and in it the folders KEYS and LAUNCHERS with what the machine that unpacks it
needs to find the entries there. Sizes are the benchmark's own, as tensors without storage: what
Triton specialises on are types, and which numbers and addresses are multiples of 16. The certified
route reads its results, so it runs in small sizes with real memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from benchmarks.kernels import absent  # before Triton

import torch  # isort: skip
from triton.compiler import compiler

from benchmarks.gpu import correct, kernel_times, tools
from benchmarks.gpu.pack import unpack
from benchmarks.gpu.shapes import ODD, SHAPES
from benchmarks.inputs import Inputs, Shape
from powerflow_fast.kernels import config
from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import triton_tuning
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.triton_backend import tuned_calls
from powerflow_fast.models.shapes import model_shape
from tests.helpers.truth import DTYPES
from tests.kernels.test_exp2 import test_exp2_of_integers_is_exact

KEYS, LAUNCHERS = "keys", "launchers"  # folders in the cache
BF16 = torch.bfloat16
# N, H, V of tests/test_cuda.py; then of the models that the stage `lora` trains.
CUDA_TESTS = ((256, 128, 5000), (128, 1024, 100_000), (512, 128, 20_000))
MODELS = ("Llama-3.2-1B", "Llama-3-8B", "Llama-3-70B")


def heads() -> None:
    """Steps and scores at the sizes of the benchmark and of its tests."""
    sizes = [(s.n, s.h, s.v) for s in (*SHAPES.values(), tools.SMALL)]
    for name in MODELS:
        model = model_shape(name)
        sizes.append((4096, model.hidden_size, model.vocab_size))
    for n, h, v in (*sizes, *CUDA_TESTS):
        for models in (1, 2):
            absent.launch_head(n, h, v, BF16, models=models, device="meta")
    absent.launch_head(7168, 8192, 128_256, BF16, entropy=True, device="meta")  # the trainer's
    for tokens, sequences in ((16384, 32), (16384, 128), (4096, 8), (256, 8)):
        absent.launch_residual(tokens, sequences)
        absent.launch_residual(tokens, sequences, masked=True)


def certified() -> None:
    """Whole, and for the blocks alone that are tried again."""
    sizes = [
        (16384, 64, 256, BF16),
        (tools.SMALL.n, tools.SMALL.h, tools.SMALL.v, BF16),
    ]
    sizes += [(n, h, v, BF16) for n, h, v in CUDA_TESTS if v % 16 == 0]
    for n, h, v, dtype in (*sizes, *((*size, dtype) for size in ODD for dtype in DTYPES)):
        for rows in (n, 128):
            for models in (1, 2):
                absent.launch_head(rows, h, v, dtype, models=models, grad_tolerance=1e-3)


def correctness() -> None:
    """What is computed is arbitrary, as no kernel runs."""
    with contextlib.suppress(AssertionError):
        test_exp2_of_integers_is_exact(torch.device("cpu"))
    for n, h, v in ODD:
        for dtype in DTYPES:
            for check in correct.CHECKS.values():
                with contextlib.suppress(ArithmeticError):
                    check(n, h, v, dtype, torch.device("cpu"))


def timed() -> None:
    for shape in SHAPES.values():
        inputs = without_storage(shape)
        chunks = kernel_times.Chunks(inputs, config.config_for(None, BF16), inputs.hidden.device)
        for case in kernel_times.CASES.values():
            case(chunks).launch()


def candidates() -> None:
    for shape in SHAPES.values():
        inputs = without_storage(shape)
        policy = Head(inputs.hidden, inputs.weight, None)
        table = config.config_for(None, BF16)
        calls = tuned_calls(policy, inputs.targets, HeadOptions(), table)
        triton_tuning.tune(calls, table, launch_once)


def launch_once(call: Callable[[], object]) -> float:
    call()
    return 0.0


def without_storage(shape: Shape) -> Inputs:
    empty = functools.partial(torch.empty, dtype=BF16, device="meta")
    return Inputs(
        hidden=empty(shape.n, shape.h),
        weight=empty(shape.v, shape.h),
        targets=empty(shape.n, dtype=torch.int64),
        ref_hidden=empty(shape.n, shape.h),
        cu_seqlens=empty(shape.n // shape.length + 1, dtype=torch.int32),
    )


GROUPS: dict[str, Callable[[], None]] = {
    "heads": heads,
    "candidates": candidates,
    "timed": timed,
    "correctness": correctness,
    "certified": certified,
}


def note_keys(folder: Path) -> None:
    """Writes FOLDER/KEYS/HASH for every kernel that is looked up: its key without Triton's part."""
    from triton.runtime.cache import triton_key

    whole_key, own = compiler.get_cache_key, triton_key()
    (folder / KEYS).mkdir(parents=True, exist_ok=True)

    def get_cache_key(*arguments, **options) -> str:
        key = whole_key(*arguments, **options)
        assert key.startswith(own), "unpack.py puts the machine's own in front"
        name = hashlib.sha256(key.encode()).hexdigest()
        (folder / KEYS / name).write_text(key.removeprefix(own))
        return key

    compiler.get_cache_key = get_cache_key


def note_launchers(folder: Path) -> absent.Watch:
    """Has Triton write the C source with which it starts each kernel, in place of compiling it."""
    from triton.backends.nvidia import driver

    (folder / LAUNCHERS).mkdir(parents=True, exist_ok=True)

    def note(src: str, name: str, **_) -> SimpleNamespace:
        source = hashlib.sha256(src.encode()).hexdigest()[:16]
        (folder / LAUNCHERS / f"{source}-{name}.c").write_text(src)
        return SimpleNamespace(launch=None)

    driver.compile_module_from_src = note
    driver.library_dirs = list
    return driver.CudaLauncher


def collect(cache: Path, folder: Path) -> int:
    """From a cache that was filled here into what unpack.py takes: the number of kernels."""
    from triton.runtime.cache import _base32

    number = 0
    for key in sorted((cache / KEYS).iterdir()):
        entry = cache / _base32(key.name)
        files = [*entry.glob("*.cubin"), *(p for p in entry.glob("*.json") if p.name[0] != "_")]
        if len(files) == 2:  # not where the compiler gave up
            (folder / key.name).mkdir(parents=True)
            for path in files:
                shutil.copy(path, folder / key.name)
            shutil.copy(key, folder / key.name / unpack.KEY)
            number += 1
    shutil.copytree(cache / LAUNCHERS, folder / unpack.LAUNCHERS)
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.pack.launches")
    parser.add_argument("--chip", default="sm_90")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--group", choices=GROUPS, help="launch these")
    what.add_argument("--collect", type=Path, metavar="FOLDER", help="what was compiled, into it")
    args = parser.parse_args(argv)
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    if args.collect:
        print(f"{collect(cache, args.collect)} compiled kernels")
        return
    note_keys(cache)
    absent.use(args.chip, note_launchers(cache))
    GROUPS[args.group]()


if __name__ == "__main__":
    main()
