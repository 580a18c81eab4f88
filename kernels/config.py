"""Tile shapes by chip: the one table a new chip is added to.

The token count is never part of a key and never a compile-time constant, so no batch recompiles.
The shapes are the largest tried for which `python -m benchmarks.kernels.machine_code` finds no
spilled register. Those of sm_90 were the fastest of CANDIDATES on an H100 (docs/gpu-notes.md); the
others were not timed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache

import torch

# Bytes that one chunk of rows may take for exp-logits (exact route), for exp-logits of kept columns
# (certified route), for per-tile statistics (forward) and for d loss / d logits (backward). A
# quarter GiB leaves 1,024 rows at V = 131k: with H = 4096 enough tiles to fill a large chip in the
# product over the vocabulary. Twice as much takes 1 to 9 % off a step on an H100, half adds 4 to
# 80 %.
EXP_LOGITS_BYTES = 256 << 20
KEPT_BYTES = 64 << 20
STATISTICS_BYTES = 64 << 20
DLOGITS_BYTES = 256 << 20
# How the softmax cache cuts the vocabulary: columns that share a factor, and what the number of its
# columns is a multiple of. Every tile of the tables fits, tuned or not: sizes must not depend on
# the device.
CACHE_TILE, CACHE_MULTIPLE = 64, 256
# Row blocks that walk the vocabulary together, both models counted. 16 blocks of 128 rows of
# H = 4096 in bf16 are 16 MiB: they stay in L2, and all 16 read each weight tile at once.
GROUP = 16
# For every launch: a product and a sum become one instruction. Triton up to 3.9 does so unasked,
# 3.9 warns that 3.10 will not.
LAUNCH = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tile:
    """One output tile `rows x columns`, `depth` numbers of the summed axis at a time.

    The columns are finished in `parts` pieces after the product: fewer values are alive at once.
    `persistent` (of the statistics alone): one program a multiprocessor, which walks over the
    tiles. Triton does not overlap them: slower where all have work (5 % on an H100), and quicker to
    start where most have none.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    parts: int = 1
    persistent: bool = False

    def __post_init__(self) -> None:
        assert self.parts in (1, 2, 4) and self.columns % self.parts == 0

    @property
    def part(self) -> int:
        return self.columns // self.parts

    @property
    def constants(self) -> dict[str, int]:
        """Constants of a kernel whose product is hidden @ weight.T."""
        sizes = {"BLOCK_N": self.rows, "BLOCK_V": self.columns, "BLOCK_H": self.depth}
        return sizes | {"PARTS": self.parts}

    @property
    def launch_options(self) -> dict[str, int]:
        return LAUNCH | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Config:
    statistics: Tile  # hidden @ weight.T and the softmax statistics of each tile
    unit_gradient: Tile  # exp-logits @ weight
    dlogits: Tile  # hidden @ weight.T and the gradient of the logits
    tma: bool  # the chip copies tiles with its bulk copy engine

    def __post_init__(self) -> None:
        # One step of the unit gradient's product lies within one part of the statistics.
        assert self.statistics.part % self.unit_gradient.depth == 0
        assert self.statistics.rows == self.unit_gradient.rows  # the blocks of the certified route


@cache
def persistent(config: Config) -> Config:
    """The same with persistent programs for the statistics."""
    return replace(config, statistics=replace(config.statistics, persistent=True))


def same_tiles(tile: Tile, tma: bool = False) -> Config:
    return Config(statistics=tile, unit_gradient=tile, dlogits=tile, tma=tma)


CDNA = same_tiles(Tile(128, 128, 64, num_warps=8, num_stages=2))
TABLE = {
    "sm_80": same_tiles(Tile(128, 256, 32, num_warps=8, num_stages=4, parts=4)),
    "sm_90": Config(
        statistics=Tile(128, 256, 64, num_warps=8, num_stages=3, parts=4),
        unit_gradient=Tile(128, 256, 64, num_warps=8, num_stages=4, parts=4),
        dlogits=Tile(128, 256, 64, num_warps=8, num_stages=4, parts=4),
        tma=True,
    ),
    # In parts, a soft-capped head's statistics with stored exp-logits do not compile: Triton 3.6
    # and 3.9 end in TritonNvidiaGPUOptimizeTMemLayoutsPass.
    "sm_100": Config(
        statistics=Tile(128, 256, 64, num_warps=8, num_stages=3),
        unit_gradient=Tile(128, 256, 64, num_warps=8, num_stages=4, parts=4),
        dlogits=Tile(128, 256, 64, num_warps=8, num_stages=4, parts=4),
        tma=True,
    ),
    "gfx942": CDNA,
    "gfx950": CDNA,
    # With a depth of 64 the statistics spill 45 registers, with one part and all options 210.
    "gfx1151": same_tiles(Tile(128, 128, 32, num_warps=8, num_stages=2, parts=2)),
    # float32 operands use no matrix unit (no tf32), so any chip gets one shape.
    "float32": same_tiles(Tile(64, 64, 16, num_warps=8, num_stages=2)),
    # Triton's interpreter: small enough that small tests have several tiles and ragged ends.
    "interpreter": Config(
        statistics=Tile(16, 64, 32, num_warps=4, num_stages=1),
        unit_gradient=Tile(16, 32, 16, num_warps=4, num_stages=1),
        dlogits=Tile(16, 64, 32, num_warps=4, num_stages=1),
        tma=True,
    ),
}


# What tuning tries for each product besides the table's tile. All have the table's rows, which are
# also the blocks of the certified route.
CANDIDATES = (
    Tile(128, 256, 64, num_warps=8, num_stages=3, parts=4),
    Tile(128, 256, 64, num_warps=8, num_stages=4, parts=4),
    Tile(128, 256, 32, num_warps=8, num_stages=4, parts=4),
    Tile(128, 128, 64, num_warps=8, num_stages=4, parts=2),
    Tile(128, 128, 64, num_warps=4, num_stages=4, parts=2),
    Tile(128, 128, 32, num_warps=4, num_stages=5, parts=2),
)


def stored_exponent(dtype: torch.dtype) -> int:
    """Power of two by which stored exp-logits are enlarged.

    float16 ends at 2^-24 and exp-logits are at most 1: 15 more powers keep the mass that underflows
    below 2^-39 per column. bfloat16 has float32's range.
    """
    return 15 if dtype == torch.float16 else 0


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def chip_name(device: torch.device) -> str:
    """The row of TABLE that serves this device with 16-bit operands."""
    return "interpreter" if is_interpreted() else table_row(compilers_name(device))


def compilers_name(device: torch.device) -> str:
    """The name of a GPU's chip among compilers: "sm_90", "gfx942"."""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName  # "gfx942:sramecc+:xnack-"
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def table_row(chip: str) -> str:
    """The row of TABLE that serves a chip.

    Refused are chips before Ampere, and of AMD's all that no row was compiled for: their registers,
    shared memory and matrix units differ so much that another's tiles spill or do not fit.
    """
    if chip.startswith("sm_") and int(chip[3:-1]) >= 8:
        # 12.x, the consumer chips after 10.x, lack its matrix unit and have sm_80's shared memory.
        return {"9": "sm_90", "10": "sm_100"}.get(chip[3:-1], "sm_80")
    known = [name for name in TABLE if name.startswith("gfx")]
    if chip in known:
        return chip
    raise ValueError(
        f"backend: 'triton' has no tile shapes for {chip}, only for sm_80 and newer, "
        f"{', '.join(known)}; use backend='torch'"
    )


def config_for(device: torch.device, dtype: torch.dtype) -> Config:
    name = chip_name(device)
    if dtype == torch.float32 and name != "interpreter":
        name = "float32"
    return TABLE[name]


def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def ceil_div(a: int, b: int) -> int:
    """triton.cdiv takes the host some 5 us, and a chunk of rows needs a dozen."""
    return -(-a // b)


def balanced_rows(num_rows: int, limit: int, block: int, columns: int, processors: int) -> int:
    """Rows per chunk: at most `limit`, filling whole waves of `processors` tiles best.

    A chunk's product has (rows / block) * columns tiles; every wave computes `processors` of them.
    """
    most = max(1, min(limit // block, ceil_div(num_rows, block)))

    def utilisation(blocks: int) -> float:
        tiles = blocks * columns
        return tiles / (ceil_div(tiles, processors) * processors)

    # Rounded, so that among equally good sizes the largest wins: fewer launches.
    best = max(range(1, most + 1), key=lambda blocks: (round(utilisation(blocks), 2), blocks))
    return best * block
