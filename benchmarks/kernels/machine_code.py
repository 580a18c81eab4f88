"""What the compiled kernels are made of, chip by chip, found without a GPU.

`python -m benchmarks.kernels.machine_code [--json] [--chip sm_90] [--kernel statistics] [--case X]`
launches the kernels as the back end does, on a GPU that is not there (absent.py), and reads what
the installed Triton compiled: registers, spills, shared memory, the matrix unit's instructions
and, of Hopper, the main loop and the epilogue (sass.py).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.kernels import launches, sass, table  # launches before Triton
from benchmarks.kernels.chips import CHIPS, is_amd
from benchmarks.kernels.launches import CASES, Compiled
from benchmarks.kernels.table import Facts

import triton  # isort: skip

TMA = r"\bUTMALDG"
WAIT = r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)"  # until so many groups are in flight
FMA = r"\bFFMA|\bv_(?:pk_|dual_)?fmac?_f32"


def facts_of(compiled: Compiled, chip: str) -> Facts:
    if is_amd(chip):
        code = compiled.files["amdgcn"].read_text()
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        stores = loads = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        scalar = _number(r"\.sgpr_spill_count:\s+(\d+)", code)
    else:
        usage, code = _disassemble(compiled.files["cubin"])
        registers, scalar = _number(r"REG:(\d+)", usage), 0
        stores, loads = len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))
    loop = None
    if chip == "sm_90":
        loop = sass.main_loop(code, compiled.files["ttgir"].read_text(), compiled.num_warps)
    groups = max((int(count, 16) for count in re.findall(WAIT, code)), default=0)
    return Facts(
        chip=chip,
        kernel=compiled.name.kernel,
        flags=compiled.name.flags,
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        scalar_spills=scalar,
        shared=compiled.shared,
        matrix=len(re.findall(CHIPS[chip].matrix, code)),
        fma=len(re.findall(FMA, code)),
        tma=len(re.findall(TMA, code)),
        in_flight=loop and groups,
        step=loop and loop.step,
        epilogue=loop and loop.epilogue,
        epilogue_marked=loop and loop.epilogue_marked,
        flattened=loop and loop.flattened,
        seconds=compiled.seconds,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(match.group(1))


def _disassemble(cubin: Path) -> tuple[str, str]:
    """Resource usage and machine code, by the tools in Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
    outputs = [
        subprocess.run(
            [str(tools / name), option, str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        for name, option in commands
    ]
    return outputs[0], outputs[1]


def compile_all(
    chips: Iterable[str], cases: list[str], kernels: list[str] | None, show: Callable[[Facts], None]
) -> None:
    for chip in chips:
        names = listed(chip, cases, kernels)
        launches.compile_listed(chip, cases, names, lambda x, chip=chip: show(facts_of(x, chip)))


def listed(chip: str, cases: Iterable[str], kernels: list[str] | None) -> dict:
    names = launches.listed(chip, cases)
    return {x: name for x, name in names.items() if kernels is None or name.kernel in kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel and report its machine code")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this chip")
    parser.add_argument("--kernel", action="append", help="only this kernel")
    parser.add_argument("--case", choices=CASES, action="append", help="these launches")
    arguments = parser.parse_args()
    cases = arguments.case or [name for name, case in CASES.items() if case.usual]
    chips = arguments.chip or list(CHIPS)
    known = {name.kernel for name in listed(chips[0], cases, None).values()}
    if unknown := set(arguments.kernel or ()) - known:
        parser.error(f"--kernel: expected some of {', '.join(sorted(known))}, got {unknown}")
    rows: list[Facts] = []
    if arguments.json:
        compile_all(chips, cases, arguments.kernel, rows.append)
        found = {"triton": triton.__version__, "kernels": [asdict(row) for row in rows]}
        print(json.dumps(found))
    else:
        print_table(chips, cases, arguments.kernel)


def print_table(chips: list[str], cases: list[str], kernels: list[str] | None) -> None:
    """A line a kernel as soon as it is compiled: all of them take minutes."""
    count = sum(len(listed(chip, cases, kernels)) for chip in chips)
    print(f"{count} kernels to compile by Triton {triton.__version__}, each shown as soon as it is.")
    print(table.LEGEND, flush=True)
    rows: list[Facts] = []

    def show(row: Facts) -> None:
        rows.append(row)
        print(table.line(row), flush=True)

    for name in chips:
        chip = CHIPS[name]
        unit = f"matrix unit: {chip.matrix_name}"
        print(f"\n{name} ({chip.devices}), {unit}\n{table.HEAD}", flush=True)
        compile_all([name], cases, kernels, show)
    print(f"\n{table.verdict(rows)}")


if __name__ == "__main__":
    main()
