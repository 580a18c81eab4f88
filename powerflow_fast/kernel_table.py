"""What `python -m powerflow_fast.kernel_facts` finds of a kernel, and how it prints that: a legend,
a line a kernel, a verdict."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple


class Chip(NamedTuple):
    row: str  # of the tile table
    shared: int  # bytes of shared memory that one program may take
    matrix: str  # its matrix instruction in machine code
    matrix_name: str  # and as its makers call it
    devices: str  # that have it
    registers: int = 255  # that a thread may have


@dataclass(frozen=True)
class Variant:
    """One kernel with the flags that change its code."""

    kernel: str
    models: int = 1
    tma: bool = True
    entropy: bool = False
    softcap: bool = False
    soft: bool = False  # store the softmax numerators
    bias: bool = False
    certified: bool = False  # look for candidate columns, or gather those that are kept
    persistent: bool = False  # a program walks over the tiles
    parts: bool = False  # each part of a tile has its own shift, as in float16
    maxima: bool = False  # the largest logits alone


@dataclass(frozen=True)
class Facts:
    chip: str
    variant: Variant
    registers: int
    spill_stores: int
    spill_loads: int
    scalar_spills: int  # scalar registers kept in vector registers (AMD): no memory is touched
    shared: int
    matrix: int
    fma: int  # float32 multiply-adds: an epilogue's few hundred, not a main loop's thousands
    tma: int
    in_flight: int  # sm_90: groups of products that a main loop's step leaves running
    seconds: float


LEGEND = """\
regs: registers a thread; spills: instructions that store / load what found no register;
shared: bytes of shared memory a program; matrix: instructions of the matrix unit; flight: products
that a step of Hopper's main loop leaves running; fma: float32 multiply-adds; TMA: bulk copies;
s: seconds to compile. pair: policy and reference in one launch; soft: softmax numerators stored;
certified: on the certified gradient's route; kept: probabilities of the columns that it keeps;
parts: each part of a tile has its own shift; maxima: the largest logits alone."""
HEAD = (
    f"  {'kernel':17} {'flags':30} {'regs':>4} {'spills':>6} {'shared':>6} {'matrix':>6} "
    f"{'flight':>6} {'fma':>4} {'TMA':>3} {'s':>5}"
)
PRODUCTS = ("statistics", "direction", "kept", "dlogits")  # kernels with a matrix product


def line(row: Facts) -> str:
    spills = f"{row.spill_stores}/{row.spill_loads}"
    return (
        f"  {row.variant.kernel:17} {flags(row.variant):30} {row.registers:>4} {spills:>6} "
        f"{row.shared:>6} {row.matrix or '-':>6} {row.in_flight or '-':>6} {row.fma:>4} "
        f"{row.tma or '-':>3} {row.seconds:>5}"
    )


def flags(variant: Variant) -> str:
    switches = [field.name for field in fields(Variant) if field.type == "bool"]
    given = [name for name in switches if name != "tma" and getattr(variant, name)]
    return " ".join(["pair"] * (variant.models == 2) + given)


def verdict(rows: Collection[Facts], chips: Mapping[str, Chip]) -> str:
    """Spills, registers, matrix unit and shared memory of all rows, a line each."""
    spilled = [row for row in rows if row.spill_stores or row.spill_loads]
    products = [row for row in rows if row.variant.kernel in PRODUCTS]
    without = [row for row in products if not row.matrix]
    large = [row for row in rows if row.shared > chips[row.chip].shared]
    most: dict[int, int] = {}  # by the chip's limit
    for row in rows:
        limit = chips[row.chip].registers
        most[limit] = max(row.registers, most.get(limit, 0))
    registers = ", ".join(f"at most {used} of {limit}" for limit, used in most.items())
    lines = [
        f"spills: {_named(spilled) or f'none in {len(rows)} kernels'}",
        f"registers a thread: {registers}",
        f"shared memory: {'too much in ' + _named(large) if large else 'every kernel fits'}",
    ]
    if products:
        used = f"used by every kernel with a product ({len(products)})"
        lines.append(f"matrix unit: {'not used by ' + _named(without) if without else used}")
    return "\n".join(lines)


def _named(rows: Iterable[Facts]) -> str:
    names = (f"{row.chip} {row.variant.kernel} {flags(row.variant)}".rstrip() for row in rows)
    return ", ".join(names)
