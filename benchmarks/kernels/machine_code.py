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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.kernels import launches, sass, table  # launches before Triton
from benchmarks.kernels.chips import CHIPS, is_amd
from benchmarks.kernels.launches import CASES, Compiled, compile_listed
from benchmarks.kernels.table import Facts

import triton  # isort: skip

TMA = r"\bUTMALDG"
WAIT = r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)"  # until so many groups are in flight
FMA = r"\bFFMA|\bv_(?:pk_|dual_)?fmac?_f32"


def facts_of(compiled: Compiled, chip: str) -> Facts:
    ttgir = compiled.files["ttgir"].read_text()
    has_product = re.search(r"tt\.dot|warp_group_dot|tc_gen5_mma", ttgir) is not None
    if is_amd(chip):
        code = compiled.files["amdgcn"].read_text()
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        stores = loads = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        scalar = _number(r"\.sgpr_spill_count:\s+(\d+)", code)
    else:
        usage = _tool("cuobjdump", "--dump-resource-usage", compiled.files["cubin"])
        registers, scalar = _number(r"REG:(\d+)", usage), 0
        # Half a second; without a stack there are no spills.
        needed = has_product or _number(r"STACK:(\d+)", usage) > 0
        code = _tool("nvdisasm", "-c", compiled.files["cubin"]) if needed else ""
        stores, loads = len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))
    loop = None
    if chip == "sm_90" and has_product:
        loop = sass.main_loop(code, ttgir, compiled.num_warps)
    groups = max((int(count, 16) for count in re.findall(WAIT, code)), default=0)
    return Facts(
        chip=chip,
        kernel=compiled.name.kernel,
        flags=compiled.name.flags,
        case=compiled.case,
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        scalar_spills=scalar,
        shared=compiled.shared,
        product=has_product,
        matrix=len(re.findall(CHIPS[chip].matrix, code)),
        fma=len(re.findall(FMA, code)) if has_product else None,
        tma=len(re.findall(TMA, code)),
        sum_layouts=sum_layouts(ttgir),
        in_flight=loop and groups,
        step=loop and loop.step,
        epilogue=loop and loop.epilogue,
        epilogue_marked=loop and loop.epilogue_marked,
        flattened=loop and loop.flattened,
        seconds=compiled.seconds,
    )


def sum_layouts(ttgir: str) -> tuple[str, ...]:
    """How threads hold the float32 tiles that are reduced: the order of a sum follows it."""
    layouts = dict(re.findall(r"^#(\w+) = (.*)$", ttgir, re.M))
    found = re.findall(r"\}\) : \(tensor<\d+x\d+xf32, #(\w+)>\) -> tensor<\d+xf32", ttgir)
    return tuple(sorted({layouts[name] for name in found}))


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(match.group(1))


def _tool(name: str, option: str, cubin: Path) -> str:
    """What a tool in Triton's wheel prints."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(path), option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel and report its machine code")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this chip")
    parser.add_argument("--kernel", action="append", help="only this kernel")
    parser.add_argument("--case", choices=CASES, action="append", help="these launches")
    arguments = parser.parse_args()
    chips = list(dict.fromkeys(arguments.chip or CHIPS))
    cases = arguments.case or [name for name, case in CASES.items() if case.usual]
    names = {chip: launches.listed(chip, cases) for chip in chips}
    if arguments.kernel:
        known = {name.kernel for name in names[chips[0]].values()}
        if unknown := set(arguments.kernel) - known:
            parser.error(f"--kernel: expected some of {sorted(known)}, got {sorted(unknown)}")
        for chip, found in names.items():
            names[chip] = {x: name for x, name in found.items() if name.kernel in arguments.kernel}

    def compile_for(chip: str, show: Callable[[Facts], None]) -> None:
        compile_listed(chip, cases, names[chip], lambda compiled: show(facts_of(compiled, chip)))

    if arguments.json:
        rows: list[Facts] = []
        for chip in chips:
            compile_for(chip, rows.append)
        print(json.dumps({"triton": triton.__version__, "kernels": [asdict(x) for x in rows]}))
    else:
        count = sum(map(len, names.values()))
        table.print_table(chips, count, triton.__version__, compile_for)


if __name__ == "__main__":
    main()
