"""The launches whose machine code is read: calls of the back end, and a name for each kernel.

No kernel's arguments are written down here. A name is made of what differs between the launches of
one kernel: which arguments are given at all, and the switches that it is compiled with. So a new
kernel, or a new argument, appears by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from benchmarks.kernels import absent  # before Triton

import torch  # isort: skip
from triton import knobs


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
    "one token": Case(partial(absent.launch_head, 1, 1, 1, torch.bfloat16), "one token"),
    "strided": Case(
        partial(absent.launch_head, 17, 40, 257, torch.bfloat16, models=1, strided=True), "strided"
    ),
}


class Launch(NamedTuple):
    """One way in which a kernel is specialised."""

    kernel: str
    label: str
    key: str  # types and constants
    switches: tuple[str, ...]  # arguments that are given, and constants that are not off


class Name(NamedTuple):
    kernel: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.kernel, *self.flags))


class Compiled(NamedTuple):
    name: Name
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
        show(Compiled(current[0], metadata["shared"], metadata["num_warps"], files, seconds))

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


def switches(params, signature: Mapping[str, object], constants: Mapping[tuple, object]):
    """Arguments that are given, and compile-time constants that are neither None nor False."""
    for index, (name, kind) in enumerate(signature.items()):
        for path, part, leaf in _leaves((index,), name.removesuffix("_ptr"), kind):
            value = constants.get(path)
            if leaf != "constexpr" or not params[index].is_constexpr:
                if leaf != "constexpr" or value is not None:  # Triton makes a size of 1 constant
                    yield part
            elif isinstance(value, bool) or value is None:
                if value:
                    yield part.lower()
            else:
                yield f"{part.lower()}={getattr(value, '__name__', value)}"


def _leaves(path: tuple[int, ...], name: str, kind) -> Iterator[tuple[tuple[int, ...], str, str]]:
    """Of an argument that may be a tuple, or a NamedTuple: path, name and type of each part."""
    if not isinstance(kind, tuple):
        yield path, name, kind
        return
    names = getattr(kind, "_fields", range(len(kind)))
    for index, (part, inner) in enumerate(zip(names, kind, strict=True)):
        yield from _leaves((*path, index), f"{name}.{part}".removesuffix("_ptr"), inner)


def flags(launch: Launch, alike: Iterable[Launch]) -> tuple[str, ...]:
    """The switches that are on here and off in another launch; of those that go together the first.

    A label comes last.
    """
    others = [set(other.switches) for other in alike]
    patterns: dict[tuple[bool, ...], str] = {}
    for switch in launch.switches:
        pattern = tuple(switch in other for other in others)
        if not all(pattern):
            patterns.setdefault(pattern, switch)
    return (*patterns.values(), *([launch.label] if launch.label else []))
