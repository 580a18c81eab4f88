"""Tables of a run on a GPU, from lines of every kind."""

import pytest

from benchmarks import report, results_file
from benchmarks.gpu import lines, page

SHAPE = {"n": 16384, "h": 4096, "v": 131072, "length": 512}
FLOPS = 2 * 16384 * 4096 * 131072


def step(peer: str, group: str, seconds: float, **more) -> dict:
    flops = FLOPS * {"pair": 2, "tb-frozen": 3, "tb-trained": 4}[group]
    return {
        "stage": "trained-head" if group == "tb-trained" else "heads",
        "part": peer,
        "case": f"{group}, anchor",
        "group": group,
        "peer": peer,
        "setting": "",
        "shape_name": "anchor",
        "shape": SHAPE,
        "dtype": "bfloat16",
        "seconds": seconds,
        "floor_flops": flops,
        "floor_bytes": 10**9,
        "extra_bytes": 327 * 10**6,
        "error": 2e-3,
        **more,
    }


OURS = "powerflow-fast"
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
LINES = [
    {"stage": "ceilings", "part": "vendor", "case": "product", "seconds": 1e-3, "tflops": 800.0},
    {"stage": "ceilings", "part": "vendor", "case": "copy", "seconds": 1e-3, "bandwidth": 3e12},
    {"stage": "correct", "part": "kernels", "case": "a", "error": 1e-7, "bound": 1e-6},
    {"stage": "correct", "part": "kernels", "case": "b", "error": 8e-7, "bound": 1e-6},
    {"stage": "correct", "part": "cuda", "case": "graph", "outcome": "passed", "seconds": 1.0},
    {"stage": "correct", "part": "cuda", "case": "second device", "skipped": "needs a second GPU"},
    {
        "stage": "kernels",
        "part": "ours",
        "case": "unit gradient, anchor",
        "seconds": 2e-3,
        "tflops": 590.0,
        "vendor_tflops": 760.0,
        "bandwidth": 1.5e12,
    },
    {"stage": "kernels", "part": "ours", "case": "combine, anchor", "seconds": 1e-4}
    | {"bandwidth": 2.5e12},
    step("quack chunked", "tb-frozen", 0.0755, setting="4096 rows"),
    step(OURS, "tb-frozen", 0.0836),
    step(OURS, "pair", 0.052),
    step(OURS, "tb-frozen", 0.06)
    | {"case": "certified x2, anchor", "group": "certified"}
    | {"exact_seconds": 0.0836, "columns_kept": 0.05, "skipped_mass": 9e-4},
    {"stage": "heads", "part": "CCE exact", "skipped": "cut_cross_entropy is not installed"},
    {"stage": "heads", "part": OURS, "compiled": 12, "compile_seconds": 34.4},
    step(OURS, "tb-trained", 0.11),
    {"stage": "tuner", "part": "ours", "case": "statistics 128 x 256 x 64", "seconds": 0.05}
    | {"tile": {}},
    {
        "stage": "tuner",
        "part": "ours",
        "case": "fastest tiles, anchor",
        "tiles": {
            "statistics": {"rows": 128, "columns": 256, "depth": 64, "num_warps": 8}
            | {"num_stages": 4, "parts": 4, "persistent": True},
            "tma": True,
        },
    },
    {"stage": "counters", "part": "ncu", "case": "statistics_kernel", "seconds": 5e-3}
    | {"tensor_pipe": 88.0, "l2": 70.0, "dram": None, "issue": 30.0},
    {"stage": "sanitizer", "part": "memcheck", "case": "steps", "errors": 0},
    {
        "stage": "lora",
        "part": "Llama-3-8B",
        "case": "Llama-3-8B shape",
        "model": "Llama-3-8B shape",
        "seconds": 0.7,
        "tokens_per_second": 5851.0,
        "peak_bytes": 22.4e9,
        "planned_bytes": 23.1e9,
    },
    {"stage": "whole-step", "part": "Qwen2.5-1.5B", "case": "256 + 8 x 64, GRPOTrainer"}
    | {"seconds": 4.0, "steps": 3, "tokens_per_second": 640.0, "peak_bytes": 12.3e9}
    | {"phases": {"sampling": 2.5, "update": 1.25, "rest": 0.25}},
    {"stage": "lora", "part": "NF4", "case": "built", "planned_bytes": 50e9},
    {"stage": "lora", "part": "NF4", "case": "step 1", "seconds": 20.0}
    | {"tokens_per_second": 400.0, "peak_bytes": 51e9},
    {"stage": "lora", "part": "NF4", "ended": "stopped after 40 s of measuring", "seconds": 45.0},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results_file, "FOLDER", tmp_path)
    return tmp_path


def write(folder, dry_run: bool) -> None:
    header = {"device": "NVIDIA H100", "date": "2026-12-01", "versions": VERSIONS}
    path = lines.start(folder, header | {"dry_run": dry_run})
    for line in LINES:
        lines.append(path, line)


def test_every_table(folder):
    write(folder, dry_run=False)
    text = page.tables()
    for row in (
        "| copy | 1 ms | 3.00 TB/s |",
        "2 checks within their bounds, the nearest at 80 % of its bound (b); 1 tests of CUDA pass.",
        "| unit gradient, anchor | 2 ms | 590 | 760 | 1.50 TB/s |",
        "| combine, anchor | 0.1 ms | - | - | 2.50 TB/s |",
        # Three products of 17.6 TFLOP at 800 TFLOP/s; the faster peer stands first.
        "| anchor: bfloat16, N=16384, H=4096, V=131072 | pair | LA-TB step "
        "| over three bare products (66 ms) | extra memory | gradient error |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| quack chunked (4096 rows) | - | 75.5 ms | 1.14x | 327 MB | 2e-03 |\n"
        "| **powerflow-fast** | 52 ms | 83.6 ms | 1.27x | 327 MB | 2e-03 |",
        "| certified x2, anchor | 83.6 ms | 60 ms | 5.0 % | 9e-04 | 2e-03 |",
        "| anchor | **powerflow-fast** | 110 ms | 1.25x | 327 MB | 2e-03 |",
        "| fastest tiles, anchor | statistics | 128 x 256 x 64, 8 warps, 4 stages, persistent |",
        "| statistics_kernel | 5 ms | 88 % | 70 % | - | 30 % |",
        "compute-sanitizer on small steps: memcheck: 0 errors.",
        "| Llama-3-8B shape | 700 ms | 5851 | 22.4 GB | 23.1 GB |",
        "| 256 + 8 x 64, GRPOTrainer | 15.0 (3) | 640 | 2.50 s | 1.25 s | 250 ms | 12.3 GB |",
        "| NF4, step 1 | 20.00 s | 400 | 51.0 GB | 50.0 GB |",
        "Kernels compiled while it ran: heads, powerflow-fast: 12 in 34 s.",
        "* heads, CCE exact: cut_cross_entropy is not installed",
        "* correct, cuda, second device: needs a second GPU",
        "* lora, NF4: stopped after 40 s of measuring",
    ):
        assert row in text
    short = report.step_tables()
    assert "| **powerflow-fast** | 52 ms | 83.6 ms |" in short and "NVIDIA H100" in short
    assert "combine" not in short


def test_a_dry_run_is_no_measurement(folder):
    write(folder, dry_run=True)
    assert page.tables() == "No GPU was measured yet." and page.step_tables() == []


def test_what_a_killed_run_left_is_shown(folder):
    header = {"device": "NVIDIA H100", "date": "2026-12-01", "versions": {}, "dry_run": False}
    path = lines.start(folder, header)
    assert page.tables() == "NVIDIA H100; 2026-12-01; ."
    for line in LINES[7:10]:  # no ceilings
        lines.append(path, line)
    assert "| **powerflow-fast** | - | 83.6 ms | - | 327 MB | 2e-03 |" in page.tables()
