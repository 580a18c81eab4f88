"""What `make kernels` prints: its legend, a line a kernel as it is compiled, its verdict."""

import re
from dataclasses import replace

from benchmarks.kernels import table
from benchmarks.kernels.chips import CHIPS
from benchmarks.kernels.table import Facts

FACTS = Facts(
    chip="sm_90",
    kernel="statistics",
    flags=("exp_logits", "models=2"),
    case="step",
    registers=64,
    spill_stores=0,
    spill_loads=0,
    scalar_spills=0,
    shared=1024,
    product=True,
    matrix=4,
    fma=128,
    tma=6,
    sum_layouts=("#ttg.linear<...>",),
    seconds=1.5,
    in_flight=1,
    step=71.0,
    epilogue=796,
    epilogue_marked=1797,
    flattened=False,
)
PLAIN = replace(
    FACTS,
    kernel="combine",
    flags=(),
    product=False,
    matrix=0,
    fma=None,
    tma=0,
    sum_layouts=(),
    in_flight=None,
    step=None,
    epilogue=None,
    epilogue_marked=None,
    flattened=None,
)


def test_every_chip_has_a_title_and_a_line_is_shown_before_the_next_is_compiled(capsys):
    shown = []

    def compile_for(chip, show):
        for row in (FACTS, PLAIN):
            shown.append(capsys.readouterr().out)
            show(replace(row, chip=chip))

    table.print_table(CHIPS, 14, "3.9.0", compile_for)
    assert shown[0].startswith("14 kernels to compile by Triton 3.9.0,")
    for index, (name, chip) in enumerate(CHIPS.items()):
        title = f"\n{name} ({chip.devices}), matrix unit: {chip.matrix_name}\n"
        assert title in shown[2 * index] and "  combine" not in shown[2 * index + 1]
        assert "  statistics exp_logits models=2  " in shown[2 * index + 1]
    assert max(map(len, "".join(shown).splitlines())) <= 125
    assert "none in 14 kernels" in capsys.readouterr().out


def test_the_legend_explains_every_column():
    for name in table.HEAD.split()[1:]:
        assert re.search(rf"\b{name}: \w", table.LEGEND), name


def test_a_line_under_its_head():
    assert table.line(FACTS).split() == (
        "statistics exp_logits models=2 64 0/0 1024 4 6 1 71 796/1797 - 1.5".split()
    )
    assert table.line(PLAIN).split() == "combine 64 0/0 1024 - - - - - - 1.5".split()
    flat = replace(FACTS, flattened=True, step=97.5, epilogue_marked=None)
    assert "98" in table.line(flat) and " 796  yes" in table.line(flat)
    assert len(table.line(FACTS)) == len(table.HEAD)


def test_the_verdict_comes_from_the_rows():
    rows = [
        replace(FACTS, registers=200),
        replace(PLAIN, chip="gfx942", registers=300, scalar_spills=9),
    ]
    assert table.verdict(rows).splitlines() == [
        "spills: none in 2 kernels",
        "registers a thread: at most 200 of 255, at most 300 of 512",
        "shared memory: every kernel fits",
        "matrix unit: used by every kernel with a product (1)",
    ]
    assert "matrix unit" not in table.verdict(rows[1:])
    rows += [
        replace(FACTS, kernel="unit_gradient", flags=(), spill_loads=2),
        replace(FACTS, chip="sm_80", flags=(), matrix=0, shared=CHIPS["sm_80"].shared + 1),
    ]
    verdict = table.verdict(rows)
    assert "spills: sm_90 unit_gradient\n" in verdict
    assert "shared memory: too much in sm_80 statistics\n" in verdict
    assert verdict.endswith("matrix unit: not used by sm_80 statistics")
