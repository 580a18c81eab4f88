"""Facts of the compiled kernels that need no GPU: no spills, and the chip's own instructions."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from benchmarks.kernels.chips import CHIPS
from powerflow_fast.kernels import config

ROOT = Path(__file__).parents[2]
PINNED = f"triton=={triton.__version__}" in (ROOT / "constraints.txt").read_text().split()
COPIES_BY_TMA = ("sm_90", "sm_100")
# Half a minute to a minute a chip: `make test-chips` takes them all.
ALL = bool(os.environ.get("ALL_CHIPS"))
TESTED = list(CHIPS) if ALL else ["sm_90"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a tool of benchmarks/kernels in a process that compiles -> what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def call(tool: str, *arguments: str) -> str:
        command = [sys.executable, "-m", f"benchmarks.kernels.{tool}", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "fp_fusion" not in done.stderr.lower()  # Triton warns where a launch leaves it open
        return done.stdout

    return call


@pytest.fixture(scope="module")
def facts(run) -> list[dict]:
    found = json.loads(run("machine_code", "--json", *(f"--chip={chip}" for chip in TESTED)))
    assert found["triton"] == triton.__version__
    return found["kernels"]


def products(facts: list[dict], *chips: str) -> list[dict]:
    rows = [row for row in facts if row["product"] and row["chip"] in (chips or TESTED)]
    assert {row["chip"] for row in rows} == set(chips or TESTED)
    return rows


def gathers(row: dict) -> bool:
    """Rows of the weight, on the certified route: Hopper's copy engine cannot."""
    certified = row["kernel"] == "unit_gradient" and "float16" not in row["flags"]
    return certified or row["kernel"] == "kept_probabilities"


def test_every_kernel_is_compiled_for_every_chip(facts):
    source = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+)_kernel\(", source, re.M))
    assert len(kernels) > 9
    for chip in TESTED:
        assert {row["kernel"] for row in facts if row["chip"] == chip} == kernels


def test_no_register_is_spilled(facts):
    """None by the Triton that constraints.txt pins; others may spill a few in an epilogue.

    On sm_100 one kernel does, 94 times a tile: it redoes the few rows that the pilot misled on the
    certified route.
    """
    for row in facts:
        most = 100 if row["chip"] == "sm_100" and row["case"] == "certified" else 0
        most = most if PINNED else max(most, 16)
        assert max(row["spill_stores"], row["spill_loads"]) <= most, row


def test_products_use_the_matrix_unit(facts):
    assert [row for row in products(facts) if row["matrix"] == 0] == []


def test_hoppers_matrix_unit_is_never_waited_for_within_a_main_loop(facts):
    waits = [row for row in products(facts, "sm_90") if row["in_flight"] < 1]
    # float16's exp-logits are scaled in registers.
    assert [row["kernel"] for row in waits] == ["unit_gradient"] and "float16" in waits[0]["flags"]


def test_epilogues_on_hopper(facts):
    """Instructions of the usual tile, policy and reference in one launch.

    636, and 796 with stored exp-logits, by Triton 3.9; 638 and 828 by 3.6. The tiles that hold a
    target or end past the vocabulary, a fifth of them, take 1951 and 1797; 1709 and 1810.
    """
    statistics = [
        row
        for row in products(facts, "sm_90")
        if (row["case"], row["kernel"]) == ("step", "statistics")
        and "persistent" not in row["flags"]
    ]
    overshoot = 1.0 if PINNED else 1.15
    for exp_logits, most in ((False, 1300), (True, 1450)):
        rows = [row for row in statistics if ("exp_logits" in row["flags"]) == exp_logits]
        row = max(rows, key=lambda row: row["epilogue"])
        assert 128 * 3 < row["epilogue"] <= most * overshoot  # 3 an element are needed
        assert row["epilogue"] < row["epilogue_marked"]


def test_main_loops_on_hopper(facts):
    """A step of a 128 x 256 x 64 tile keeps the matrix unit busy for 1,024 cycles."""
    for row in products(facts, "sm_90"):
        # Rows are gathered, or float16's exp-logits scaled in registers.
        slow = row["kernel"] in ("unit_gradient", "kept_probabilities")
        assert row["step"] <= (300 if slow else 95), row
        assert row["flattened"] is False, row  # Tile.persistent says why


def test_a_rows_sum_has_one_order(facts):
    """Whatever else a launch computes, and however sizes are aligned: its threads hold tiles alike.

    `combine` sums by halves, whose order is the code's (tests/kernels/test_batch_invariance.py).
    """
    for chip in TESTED:
        rows = [row for row in facts if row["chip"] == chip]
        of_tiles = [row["sum_layouts"] for row in rows if row["kernel"] == "statistics"]
        assert len(of_tiles) > 5 and all(len(layouts) == 1 for layouts in of_tiles)
        assert len({layouts[0] for layouts in of_tiles}) == 1
        given = [row for row in rows if "statistics.row_shift" in row["flags"]]
        assert given and all(row["sum_layouts"] == [] for row in given)


def test_no_product_is_done_by_float32_multiply_adds(facts):
    # One step of a 128 x 256 x 64 tile by 256 threads would take 8192 a thread; an epilogue takes
    # about one per element of its 128.
    assert [row for row in products(facts) if row["fma"] >= 1024] == []


def test_products_copy_by_tma_where_the_chip_can(facts):
    for row in products(facts):
        assert (row["tma"] > 0) == (row["chip"] in COPIES_BY_TMA and not gathers(row)), row


def test_shared_memory_fits(facts):
    assert [row for row in facts if row["shared"] > CHIPS[row["chip"]].shared] == []


def test_chips_that_are_compiled_for_are_those_of_the_table():
    rows = {config.table_row(chip) for chip in CHIPS}
    assert rows == set(config.TABLE) - {"float32", "interpreter"}
    with pytest.raises(ValueError, match="gfx1100"):
        config.table_row("gfx1100")


# Sizes that Triton makes constants, of matrices that the copy engine cannot read; with the others
# every option of the head.
CASES = {"one token": "one token"}
OTHERS = {"options": "form.cap", "strided": "strided", "masked": "mask", "float32": "float32"}


@pytest.mark.parametrize("chip", TESTED)
def test_unusual_launches_compile(chip, run):
    cases = CASES | OTHERS if ALL else CASES
    names = run("launches", f"--chip={chip}", *(f"--case={case}" for case in cases)).splitlines()
    for label in cases.values():
        assert any(label in name for name in names), names
