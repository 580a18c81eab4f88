"""What the compiled kernels are made of, chip by chip, found without a GPU.

`python -m powerflow_fast.kernel_facts [--json] [--all] [--chip sm_90] [--kernel statistics]`
compiles the kernels ahead of time in bf16 at their default tile sizes and reads registers, spills,
shared memory and the matrix and copy instructions from the machine code. It needs
TRITON_INTERPRET unset.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from powerflow_fast import kernel_table
from powerflow_fast.kernel_table import Chip, Facts, Variant

CHIPS = {
    # The row serves sm_86 and sm_89 too, which have less shared memory than the 163 KiB of sm_80.
    "sm_80": Chip("sm_80", 99 << 10, r"\bHMMA", "mma", "A100"),
    "sm_90": Chip("sm_90", 227 << 10, r"\bHGMMA", "wgmma", "H100, H200"),
    "sm_100": Chip("sm_100", 227 << 10, r"\bUTCHMMA", "tcgen05", "B200"),
    "sm_120": Chip("sm_80", 99 << 10, r"\bHMMA", "mma", "RTX 50"),
    # AMD counts those of the matrix unit in: 256 and 256.
    "gfx942": Chip("gfx942", 64 << 10, r"\bv_mfma", "mfma", "MI300X", registers=512),
}
TMA = r"\bUTMALDG"
WAIT = r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)"  # until so many groups are in flight
FMA = r"\bFFMA|\bv_(?:pk_)?fmac?_f32"


DEFAULT = (
    Variant("statistics", models=2),
    Variant("statistics", models=2, soft=True),
    Variant("statistics", models=2, maxima=True, persistent=True),
    Variant("mean_direction"),
    Variant("true_shift"),
    Variant("statistics", models=2, soft=True, parts=True),
    Variant("direction"),
    Variant("statistics", models=2, certified=True),
    Variant("kept"),
    Variant("direction", certified=True),
    Variant("dlogits"),
    Variant("kept_dlogits"),
    Variant("combine", models=2, entropy=True),
    Variant("columns"),
    Variant("active_blocks"),
    Variant("residual"),
    Variant("residual_gradient"),
)
EVERY = DEFAULT + (
    Variant("statistics", models=2, soft=True, entropy=True, softcap=True, bias=True),
    Variant("statistics", models=1, soft=True),
    Variant("statistics", models=2, soft=True, tma=False),
    Variant("statistics", models=2, soft=True, persistent=True),
    Variant("direction", softcap=True),
    Variant("direction", tma=False),
    Variant("kept", softcap=True, bias=True),
    Variant("dlogits", entropy=True, softcap=True, bias=True),
    Variant("dlogits", tma=False),
)

_FLOATS = {"scale", "cap", "inverse_cap", "derivative", "soft_scale", "budget"}
_INT64 = {"targets_ptr", "rows_ptr"}
_INT32_POINTERS = {"starts_ptr", "ends_ptr", "lengths_ptr", "columns_ptr", "counts_ptr"}
_INT32_POINTERS |= {"blocks_ptr", "count_ptr", "misled_ptr", "only_ptr"}


def _source(variant: Variant, chip: str):
    """-> (jit function, {argument: tile shape of its descriptor}, constants, tile, use_tma)."""
    from powerflow_fast.kernels import direction, dlogits, kept, statistics
    from powerflow_fast.kernels.config import TABLE

    config = TABLE[CHIPS[chip].row]
    gathers = variant.certified and variant.kernel == "direction"
    use_tma = variant.tma and config.tma and not gathers
    logits = {
        "USE_TMA": use_tma,
        "ROUND_TO": None,
        "SOFTCAP": variant.softcap,
    }
    if not variant.bias:
        logits |= {"bias_ptr": None, "ref_bias_ptr": None}
    if variant.kernel in ("statistics", "dlogits"):
        tile = getattr(config, variant.kernel)
        constants = logits | {
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.columns,
            "BLOCK_H": tile.depth,
            "PARTS": tile.parts,
            "GROUP": statistics.GROUP,
            "MODELS": variant.models,
            "SOFT_EXPONENT": 0,
            "SOFT_TMA": use_tma and variant.soft,
            "PERSISTENT": variant.persistent,
        }
        if not variant.entropy:
            constants |= {"tile_spread_ptr": None, "grad_entropy_ptr": None, "entropy_ptr": None}
        if not variant.certified:
            constants |= {"peaks_ptr": None, "guess_ptr": None}
        if variant.parts or variant.maxima:
            constants["row_shift_ptr"] = None
        if not variant.parts and not variant.maxima:
            constants["tile_shift_ptr"] = None
        if variant.maxima:
            constants |= {"tile_total_ptr": None, "target_logit_ptr": None}
        operands = {"hidden": [tile.rows, tile.depth], "weight": [tile.columns, tile.depth]}
        operands |= {f"ref_{name}": shape for name, shape in operands.items()}
        if variant.soft:
            operands["soft"] = [tile.rows, tile.part]
        else:
            constants["soft"] = None
        kernels = {"statistics": statistics.statistics_kernel, "dlogits": dlogits.dlogits_kernel}
        return kernels[variant.kernel], operands, constants, tile, use_tma
    if variant.kernel == "direction":
        tile = config.direction
        constants = {
            "USE_TMA": use_tma,
            "SOFTCAP": variant.softcap,
            "BLOCK_N": tile.rows,
            "BLOCK_H": tile.columns,
            "BLOCK_V": tile.depth,
            "PART": config.statistics.part,
            "PARTS": tile.parts,
            "GROUP": direction.GROUP,
        }
        absent = ("tile_shift", "row_shift", "row_total") if gathers else ("columns", "counts")
        constants |= {f"{name}_ptr": None for name in absent}
        operands = {"soft": [tile.rows, tile.depth], "weight": [tile.depth, tile.columns]}
        return direction.direction_kernel, operands, constants, tile, use_tma
    if variant.kernel == "kept":
        tile = config.statistics
        constants = logits | {
            "BLOCK_N": tile.rows,
            "BLOCK_V": tile.columns,
            "BLOCK_H": tile.depth,
            "PARTS": tile.parts,
            "SOFT_EXPONENT": 0,
        }
        return kept.kept_probabilities_kernel, {"hidden": [], "weight": []}, constants, tile, False
    return *_elementwise_source(variant, config.statistics.rows), None, False


def _elementwise_source(variant: Variant, rows: int):
    """-> (jit function, no descriptors, constants) of the kernels without a product."""
    from powerflow_fast.kernels import (  # type: ignore[attr-defined]
        active_blocks,
        columns,
        combine,
        config,
        kept_dlogits,
        mean_direction,
        residual,
        row_shift,
    )

    if variant.kernel == "columns":
        constants = {"LOWEST": columns.LOWEST, "STEPS": columns.STEPS, "BLOCK": columns.BLOCK}
        return columns.choose_columns_kernel, {}, constants
    if variant.kernel == "active_blocks":
        constants = {"BLOCK_N": rows, "CHUNK": active_blocks.CHUNK}
        return active_blocks.active_blocks_kernel, {}, constants
    if variant.kernel == "kept_dlogits":
        constants = {"PIECE": config.numerators_layout().piece, "BLOCK_N": kept_dlogits.BLOCK}
        return kept_dlogits.kept_dlogits_kernel, {}, constants
    if variant.kernel == "combine":
        constants = combine.BLOCKS | {"LOWEST": combine.LOWEST, "HIGHEST": combine.HIGHEST}
        constants |= {"tile_shift_ptr": None, "only_ptr": None}
        if not variant.entropy:
            constants |= {"tile_spread_ptr": None, "entropy_ptr": None}
        return combine.combine_kernel, {}, constants
    if variant.kernel == "true_shift":
        return row_shift.true_shift_kernel, {}, dict(row_shift.BLOCKS)
    if variant.kernel == "mean_direction":
        constants = mean_direction.BLOCKS | {"SOFTCAP": variant.softcap}
        return mean_direction.mean_direction_kernel, {}, constants
    constants = {"BLOCK": residual.BLOCK, "MEAN_POLICY": True, "MEAN_REFERENCE": True}
    if variant.kernel == "residual":
        return residual.residual_kernel, {}, constants
    return residual.residual_gradient_kernel, {}, constants


def compile_variant(variant: Variant, chip: str):
    """The compiled kernel for a chip that need not be present."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from powerflow_fast.kernels.config import LAUNCH

    kernel, operands, constants, tile, use_tma = _source(variant, chip)
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    constants |= {name: 1 for name in names if re.fullmatch(r"stride_(ref_)?(hh|wh)", name)}
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in operands and use_tma:
            rows, columns = operands[name]
            signature[name] = f"tensordesc<bf16[{rows},{columns}]>"
        else:
            signature[name] = _argument_type(name, name in operands)
            if name in operands or name.endswith("_ptr") or name.startswith("stride_"):
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif name == "num_h":
                attributes[(position,)] = [["tt.divisibility", 16]]
    is_amd = chip.startswith("gfx")
    target = GPUTarget("hip", chip, 64) if is_amd else GPUTarget("cuda", int(chip[3:]), 32)
    options = LAUNCH if tile is None else tile.launch_options
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=target, options=options
    )


def _argument_type(name: str, is_operand: bool) -> str:
    if is_operand or name in ("soft_ptr", "weight_ptr", "bias_ptr", "ref_bias_ptr", "dlogits_ptr"):
        return "*bf16"
    if name in _INT64:
        return "*i64"
    if name in _INT32_POINTERS:
        return "*i32"
    if name == "mask_ptr":
        return "*i1"
    if name == "peaks_ptr":
        return "*fp16"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in _FLOATS else "i32"


def facts_of(variant: Variant, chip: str) -> Facts:
    began = time.perf_counter()
    compiled = compile_variant(variant, chip)
    seconds = round(time.perf_counter() - began, 1)
    if chip.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        stores = loads = _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        scalar = _number(r"\.sgpr_spill_count:\s+(\d+)", code)
    else:
        usage, code = _disassemble(compiled.asm["cubin"])
        registers, scalar = _number(r"REG:(\d+)", usage), 0
        stores, loads = len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bLDL\b", code))
    return Facts(
        chip=chip,
        variant=variant,
        registers=registers,
        spill_stores=stores,
        spill_loads=loads,
        scalar_spills=scalar,
        shared=compiled.metadata.shared,
        matrix=len(re.findall(CHIPS[chip].matrix, code)),
        fma=len(re.findall(FMA, code)),
        tma=len(re.findall(TMA, code)),
        in_flight=max((int(count, 16) for count in re.findall(WAIT, code)), default=0),
        seconds=seconds,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return int(match.group(1))


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code, by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"])
        outputs = [
            subprocess.run(
                [str(tools / name), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for name, option in commands
        ]
    return outputs[0], outputs[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel and report its machine code")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    parser.add_argument("--all", action="store_true", help="every combination of flags")
    parser.add_argument("--chip", choices=CHIPS, action="append", help="only this chip")
    kernels = sorted({variant.kernel for variant in EVERY})
    parser.add_argument("--kernel", choices=kernels, action="append", help="only this kernel")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("kernel_facts: unset TRITON_INTERPRET; interpreted kernels cannot be compiled")
    variants = [
        variant
        for variant in (EVERY if arguments.all else DEFAULT)
        if arguments.kernel is None or variant.kernel in arguments.kernel
    ]
    chips = arguments.chip or list(CHIPS)
    if arguments.json:
        rows = [facts_of(variant, chip) for chip in chips for variant in variants]
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print_table(variants, chips)


def print_table(variants: list[Variant], chips: list[str]) -> None:
    """A line a kernel as soon as it is compiled: all of them take a minute."""
    count = f"{len(variants) * len(chips)} kernels to compile in bf16"
    print(f"{count}, each shown as soon as it is.\n{kernel_table.LEGEND}", flush=True)
    rows = []
    for name in chips:
        chip = CHIPS[name]
        unit = f"matrix unit: {chip.matrix_name}"
        print(f"\n{name} ({chip.devices}), {unit}\n{kernel_table.HEAD}", flush=True)
        for variant in variants:
            rows.append(facts_of(variant, name))
            print(kernel_table.line(rows[-1]), flush=True)
    print(f"\n{kernel_table.verdict(rows, CHIPS)}")


if __name__ == "__main__":
    main()
