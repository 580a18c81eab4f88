"""The chips that the kernels are compiled for, and what their machine code looks like."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    shared: int  # bytes of shared memory that one program may take
    matrix: str  # its matrix instruction in machine code
    matrix_name: str  # and as its makers call it
    devices: str  # that have it
    registers: int = 255  # that a thread may have
    warp: int = 32  # threads


CHIPS = {
    # The row serves sm_86 and sm_89 too, which have less shared memory than the 163 KiB of sm_80.
    "sm_80": Chip(99 << 10, r"\bHMMA", "mma", "A100"),
    "sm_90": Chip(227 << 10, r"\bHGMMA", "wgmma", "H100, H200"),
    "sm_100": Chip(227 << 10, r"\bUTCHMMA", "tcgen05", "B200"),
    "sm_120": Chip(99 << 10, r"\bHMMA", "mma", "RTX 50"),
    # CDNA counts the registers of the matrix unit in: 256 and 256.
    "gfx942": Chip(64 << 10, r"\bv_mfma", "mfma", "MI300X", registers=512, warp=64),
    "gfx950": Chip(160 << 10, r"\bv_mfma", "mfma", "MI350X", registers=512, warp=64),
    "gfx1151": Chip(64 << 10, r"\bv_wmma", "wmma", "Strix Halo", registers=256),
}


def is_amd(chip: str) -> bool:
    return chip.startswith("gfx")
