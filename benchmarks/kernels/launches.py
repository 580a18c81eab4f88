"""The launches whose machine code is read: calls of the back end, and what Triton compiles of them.

    python -m benchmarks.kernels.launches --chip sm_90 --case strided

compiles the kernels of a case, prints their names and reads nothing: arguments that do not fit a
signature, and code that does not compile, are what the interpreter cannot find.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels import absent  # before Triton

import torch  # isort: skip
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.kernels.chips import CHIPS
from benchmarks.kernels.names import Launch, Name, flags, switches


class Case(NamedTuple):
    """Launches of one step, or of a part of one.

    `label`: part of the names of its kernels; launches are compared with those of the same label.
    `usual`: compiled where nothing else is asked for.
    """

    launch: Callable[[], None]
    label: str = ""
    usual: bool = False


# Sizes are divisible by 16, as a model's are; tensors without storage where no result is read.
_step = partial(absent.launch_head, 4096, 1024, 32768, device="meta")
_bf16 = partial(_step, torch.bfloat16)
_few = partial(absent.launch_head, dtype=torch.bfloat16, whole=False)
OPTIONS = {"bias": True, "softcap": 30.0, "entropy": True, "round_logits": True}
CASES = {
    "step": Case(_bf16, usual=True),
    "certified": Case(
        partial(absent.launch_head, 4096, 64, 512, torch.bfloat16, grad_tolerance=1e-3), usual=True
    ),
    "residual": Case(partial(absent.launch_residual, 4096, 32), usual=True),
    "masked": Case(partial(absent.launch_residual, 4096, 32, masked=True)),
    "float16": Case(partial(_step, torch.float16), "float16", usual=True),
    "options": Case(partial(_bf16, **OPTIONS)),
    **{name: Case(partial(_bf16, **{name: value})) for name, value in OPTIONS.items()},
    "one model": Case(partial(_bf16, models=1)),
    "float32": Case(partial(_step, torch.float32), "float32"),
    # Triton makes a constant of a size of 1, and the copy engine cannot read these.
    "one token": Case(partial(_few, 1, 1, 1), "one token"),
    "strided": Case(partial(_few, 17, 40, 257, models=1, strided=True), "strided"),
}


class Compiled(NamedTuple):
    name: Name
    case: str  # the first that launches it
    shared: int  # bytes
    num_warps: int
    files: dict[str, Path]  # by their endings: "cubin", "ttgir", "amdgcn"
    seconds: float


def listed(chip: str, cases: Iterable[str]) -> dict[Launch, Name]:
    """What the cases launch on this chip, every name once. Nothing is compiled."""
    absent.use(chip)
    by_case: dict[str, list[Launch]] = {case: [] for case in CASES}
    for case, found in by_case.items():
        _launch(case, found.append)
    alike = defaultdict(list)
    for launch in chain.from_iterable(by_case.values()):
        alike[launch.kernel, launch.label].append(launch)
    names: dict[Launch, Name] = {}
    seen: set[tuple[str, str]] = set()
    for launch in chain.from_iterable(by_case[case] for case in cases):
        name = Name(launch.kernel, flags(launch, alike[launch.kernel, launch.label]))
        if (launch.kernel, launch.key) not in seen and name not in names.values():
            names[launch] = name
        seen.add((launch.kernel, launch.key))
    return names


def compile_listed(
    chip: str,
    cases: Iterable[str],
    names: Mapping[Launch, Name],  # of these launches
    show: Callable[[Compiled], None],  # as soon as each is compiled
) -> None:
    # Not the chip's own limit: the table says what does not fit.
    absent.use(chip).shared = 1 << 30
    todo = dict(names)
    current: list[Name] = []

    def wanted(launch: Launch) -> bool:
        if launch in todo:
            current[:] = [todo.pop(launch)]
            return True
        return False

    def listen(*, metadata, metadata_group, times, **_) -> None:
        files = {path.rsplit(".", 1)[-1]: Path(path) for path in metadata_group.values()}
        seconds = round(times.total / 1e6, 1)
        launch = (metadata["shared"], metadata["num_warps"], files, seconds)
        show(Compiled(current[0], case, *launch))

    knobs.compilation.listener = listen
    for case in cases:
        try:
            _launch(case, wanted)
        except Exception as error:
            error.add_note(f"{chip}: {current[0] if current else case}")
            raise
    knobs.compilation.listener = None


def _launch(case: str, wanted: Callable[[Launch], object]) -> None:
    """Runs a case. Of its launches those are compiled for which `wanted` returns True."""
    label = CASES[case].label

    def skip(*, fn, compile, **_) -> bool:
        kernel = fn.jit_function
        signature, constants = compile["signature"], compile["constants"]
        key = f"{signature} {constants}"
        on = tuple(switches(kernel.params, signature, constants))
        name = kernel.__name__.removesuffix("_kernel")
        return wanted(Launch(name, label, key, on)) is not True

    knobs.runtime.jit_cache_hook = skip
    CASES[case].launch()
    knobs.runtime.jit_cache_hook = None


def main() -> None:
    parser = argparse.ArgumentParser(description="compile the kernels of some launches")
    parser.add_argument("--chip", choices=CHIPS, default="sm_90")
    parser.add_argument("--case", choices=CASES, action="append", required=True)
    arguments = parser.parse_args()
    CUDABackend.make_cubin = lambda *_: b""  # the assembler would take a fifth of the time
    names = listed(arguments.chip, arguments.case)
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder  # not where others would find kernels without machine code
        compile_listed(arguments.chip, arguments.case, names, lambda compiled: print(compiled.name))


if __name__ == "__main__":
    main()
