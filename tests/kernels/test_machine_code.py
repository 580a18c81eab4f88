"""Facts of the compiled kernels that need no GPU: no spills, and the chip's own instructions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from powerflow_fast.kernel_facts import CHIPS
from powerflow_fast.kernel_table import PRODUCTS

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
COPIES_BY_TMA = ("sm_90", "sm_100")
# Half a minute a chip: `make test-chips` takes them all.
TESTED = list(CHIPS) if os.environ.get("ALL_CHIPS") else ["sm_90"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a process that compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}


@pytest.fixture(scope="module")
def facts(environment) -> list[dict]:
    command = [sys.executable, "-m", "powerflow_fast.kernel_facts", "--json"]
    command += [f"--chip={chip}" for chip in TESTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fp_fusion" not in done.stderr.lower()  # Triton 3.9 warns where a launch leaves it open
    return json.loads(done.stdout)


def of(facts: list[dict], *kernels: str) -> list[dict]:
    chosen = [row for row in facts if row["variant"]["kernel"] in kernels]
    assert {row["chip"] for row in chosen} == set(TESTED)
    return chosen


def test_no_register_is_spilled(facts):
    """None by the Triton that constraints.txt pins; others may spill a few in an epilogue."""
    assert len(facts) >= 10 * len(TESTED)
    pinned = f"triton=={triton.__version__}" in CONSTRAINTS.read_text().split()
    most = 0 if pinned else 16
    assert [row for row in facts if max(row["spill_stores"], row["spill_loads"]) > most] == []


def test_products_use_the_matrix_unit(facts):
    # wgmma on sm_90, tcgen05 on sm_100, mma on sm_80 and sm_120, mfma on gfx942
    assert [row for row in of(facts, *PRODUCTS) if row["matrix"] == 0] == []


def test_hoppers_matrix_unit_is_never_waited_for_within_a_main_loop(facts):
    rows = [row for row in of(facts, *PRODUCTS) if row["chip"] == "sm_90"]
    waits = [row["variant"] for row in rows if row["in_flight"] < 1]
    # float16's numerators are scaled in registers.
    assert all(x["kernel"] == "direction" and not x["certified"] for x in waits)


def test_no_product_is_done_by_float32_multiply_adds(facts):
    # One step of a 128 x 256 x 64 tile by 256 threads would take 8192 a thread; an epilogue takes
    # about one per element of its 128.
    assert [row for row in facts if row["fma"] >= 1024] == []


def test_products_copy_by_tma_where_the_chip_can(facts):
    for row in of(facts, *PRODUCTS):
        # Rows of the weight are gathered on the certified route: Hopper's TMA has no gather.
        gathers = row["variant"]["certified"] and row["variant"]["kernel"] == "direction"
        gathers |= row["variant"]["kernel"] == "kept"
        assert (row["tma"] > 0) == (row["chip"] in COPIES_BY_TMA and not gathers), row


def test_shared_memory_fits(facts):
    assert [row for row in facts if row["shared"] > CHIPS[row["chip"]].shared] == []


# With and without the copy engine's descriptors; float16 scales what the other types do not.
LAUNCHED = [("sm_80", "float32"), ("sm_90", "float16"), ("sm_90", "bfloat16")]


@pytest.mark.parametrize(("chip", "dtype"), LAUNCHED if len(TESTED) > 1 else LAUNCHED[2:])
def test_every_kernel_is_launched_as_on_a_gpu(chip, dtype, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.launch_run", chip, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fp_fusion" not in done.stderr.lower()
    kernels = ["active_blocks", "choose_columns", "combine", "direction", "dlogits", "kept_dlogits"]
    kernels += ["kept_probabilities", *(["mean_direction"] if dtype != "float16" else [])]
    kernels += ["residual_gradient", "residual", "statistics"]
    kernels += ["true_shift"] if dtype != "float16" else []
    assert done.stdout.split() == [f"{kernel}_kernel" for kernel in kernels]
