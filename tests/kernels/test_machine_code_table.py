"""What `make kernels` prints: its legend, a line a kernel as it is compiled, its verdict."""

import json
import re
import sys
from dataclasses import asdict, fields, replace

import pytest

from powerflow_fast import kernel_facts, kernel_table
from powerflow_fast.kernel_facts import CHIPS, DEFAULT, Facts, Variant

DEVICES = {"sm_80": "A100", "sm_90": "H100, H200", "sm_100": "B200"}
DEVICES |= {"sm_120": "RTX 50", "gfx942": "MI300X"}


def fake(variant: Variant, chip: str = "sm_90", **changed) -> Facts:
    zeros = dict.fromkeys((field.name for field in fields(Facts)), 0)
    matrix = 4 if variant.kernel in kernel_table.PRODUCTS else 0
    row = Facts(**zeros | {"chip": chip, "variant": variant, "registers": 64, "matrix": matrix})
    return replace(row, **changed)


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the command with kernels that are not compiled -> what it prints."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_facts, "facts_of", fake)

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["kernel_facts", *arguments])
        kernel_facts.main()
        return capsys.readouterr().out

    return command


def test_every_chip_has_a_title_and_every_kernel_a_line(run):
    text = run()
    for chip, devices in DEVICES.items():
        assert f"\n{chip} ({devices}), matrix unit: {CHIPS[chip].matrix_name}\n" in text
    assert set(DEVICES) == set(CHIPS)
    for kernel in {variant.kernel for variant in DEFAULT}:
        count = sum(variant.kernel == kernel for variant in DEFAULT)
        assert len(re.findall(rf"^  {kernel} ", text, re.M)) == count * len(CHIPS)
    assert max(map(len, text.splitlines())) <= 100


def test_the_legend_explains_every_column_and_flag():
    for name in [*kernel_table.HEAD.split()[2:], "pair", "soft", "certified", "kept"]:
        assert re.search(rf"\b{name}: \w", kernel_table.LEGEND), name


def test_a_line_is_shown_before_the_next_kernel_is_compiled(run, monkeypatch, capsys):
    shown = []

    def slow(variant: Variant, chip: str) -> Facts:
        shown.append(capsys.readouterr().out)
        return fake(variant, chip)

    monkeypatch.setattr(kernel_facts, "facts_of", slow)
    last = run("--chip", "sm_80", "--kernel", "direction")
    assert shown[0].startswith("2 kernels to compile in bf16") and "  direction " not in shown[0]
    assert "  direction " in shown[1] and "certified  " in last


def test_the_verdict_comes_from_the_rows():
    rows = [
        fake(Variant("statistics", models=2), registers=200),
        fake(Variant("combine"), "gfx942", registers=300, scalar_spills=9),
    ]
    assert kernel_table.verdict(rows, CHIPS).splitlines() == [
        "spills: none in 2 kernels",
        "registers a thread: at most 200 of 255, at most 300 of 512",
        "shared memory: every kernel fits",
        "matrix unit: used by every kernel with a product (1)",
    ]
    rows += [
        fake(Variant("direction", certified=True), spill_loads=2),
        fake(Variant("dlogits"), "sm_80", matrix=0, shared=CHIPS["sm_80"].shared + 1),
    ]
    verdict = kernel_table.verdict(rows, CHIPS)
    assert "spills: sm_90 direction certified\n" in verdict
    assert "shared memory: too much in sm_80 dlogits\n" in verdict
    assert verdict.endswith("matrix unit: not used by sm_80 dlogits")


def test_json_is_the_facts_and_nothing_else(run):
    text = run("--json", "--chip", "sm_80", "--kernel", "kept")
    assert json.loads(text) == [asdict(fake(Variant("kept"), "sm_80"))]
