"""What is found of a compiled kernel, and its print: a legend, a line a kernel, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from benchmarks.kernels.chips import CHIPS


@dataclass(frozen=True)
class Facts:
    chip: str
    kernel: str
    flags: tuple[str, ...]  # arguments that are given and switches that are on: names.py
    case: str  # of launches.py
    registers: int
    spill_stores: int
    spill_loads: int
    scalar_spills: int  # scalar registers kept in vector registers (AMD): no memory is touched
    shared: int  # bytes
    product: bool  # whether it has a matrix product
    matrix: int  # instructions of the matrix unit
    # float32 multiply-adds: an epilogue's few hundred, not a main loop's thousands. None: not read
    fma: int | None
    tma: int  # bulk copies
    sum_layouts: tuple[str, ...]  # of the float32 tiles that are reduced, in Triton's words
    seconds: float
    # Of sm_90's kernels with a product; sass.py says how they are read. None of other kernels.
    in_flight: int | None  # groups of products that a main loop's step leaves running
    step: float | None  # instructions
    epilogue: int | None  # instructions
    epilogue_marked: int | None  # instructions, with targets or a ragged end; None: as `epilogue`
    flattened: bool | None


LEGEND = """\
regs: registers a thread; spills: instructions that store / load what found no register;
shared: bytes of shared memory a program; matrix: instructions of the matrix unit; TMA: bulk copies;
s: seconds to compile. Of Hopper's products, in instructions that a warp issues: step: one step of
the main loop; flight: products that it leaves running; epilogue: of the usual tile / of one with
targets or a ragged end; flat: the next tile's copies run during the epilogue.
After a kernel's name: arguments that are given and switches that are on, where launches differ."""
HEAD = (
    f"  {'kernel':56} {'regs':>4} {'spills':>6} {'shared':>6} {'matrix':>6} {'TMA':>3} "
    f"{'flight':>6} {'step':>4} {'epilogue':>9} {'flat':>4} {'s':>4}"
)


def print_table(
    chips: Iterable[str],
    count: int,  # of kernels
    triton: str,  # its version
    compile_for: Callable[[str, Callable[[Facts], None]], None],  # a chip, what is done with a row
) -> None:
    """A line a kernel as soon as it is compiled: all of them take minutes."""
    print(f"{count} kernels to compile by Triton {triton}, each shown as soon as it is.")
    print(LEGEND, flush=True)
    rows: list[Facts] = []

    def show(row: Facts) -> None:
        rows.append(row)
        print(line(row), flush=True)

    for name in chips:
        chip = CHIPS[name]
        unit = f"matrix unit: {chip.matrix_name}"
        print(f"\n{name} ({chip.devices}), {unit}\n{HEAD}", flush=True)
        compile_for(name, show)
    print(f"\n{verdict(rows)}")


def line(row: Facts) -> str:
    spills = f"{row.spill_stores}/{row.spill_loads}"
    epilogue = "/".join(str(x) for x in (row.epilogue, row.epilogue_marked) if x is not None)
    step = "-" if row.step is None else f"{row.step:.0f}"
    return (
        f"  {name(row):56} {row.registers:>4} {spills:>6} {row.shared:>6} {row.matrix or '-':>6} "
        f"{row.tma or '-':>3} {row.in_flight or '-':>6} {step:>4} {epilogue or '-':>9} "
        f"{'yes' if row.flattened else '-':>4} {row.seconds:>4}"
    )


def name(row: Facts) -> str:
    return " ".join((row.kernel, *row.flags))


def verdict(rows: Collection[Facts]) -> str:
    """Spills, registers, shared memory and the products' epilogues of all rows, a line each."""
    spilled = [row for row in rows if row.spill_stores or row.spill_loads]
    large = [row for row in rows if row.shared > CHIPS[row.chip].shared]
    most: dict[int, int] = {}  # by the chip's limit
    for row in rows:
        limit = CHIPS[row.chip].registers
        most[limit] = max(row.registers, most.get(limit, 0))
    registers = ", ".join(f"at most {used} of {limit}" for limit, used in most.items())
    products = [row for row in rows if row.product]
    without = [row for row in products if not row.matrix]
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
    return ", ".join(f"{row.chip} {name(row)}" for row in rows)
