"""A name for each way in which a kernel is launched, made of what differs between its launches.

No kernel's arguments are written down here: which are given at all, and which constants a kernel is
compiled with, is read from what Triton made of a launch. So a new kernel, or a new argument,
appears by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple


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


def switches(
    params: Sequence,  # of the kernel, as Triton describes them
    signature: Mapping[str, object],  # types by name; a tuple's are a tuple
    constants: Mapping[tuple[int, ...], object],  # by position
) -> Iterator[str]:
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
