"""Main loop and epilogue are read from the control flow of Hopper's machine code."""

from benchmarks.kernels import sass

TTGIR = """
  %r = scf.for %i = %zero to %n step %one {
    %a = ttng.warp_group_dot %h, %w, %c {isAsync = true} : !ttg.memdesc<128x64xbf16, #shared> \
* !ttg.memdesc<64x256xbf16, #shared> -> tensor<128x256xf32, #mma>
  }
  %last = ttng.warp_group_dot %h, %w, %r : !ttg.memdesc<128x64xbf16> * !ttg.memdesc<64x256xbf16>
"""
HGMMA = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24"


def code(*lines: str) -> str:
    """As nvdisasm prints it; `n *` repeats an instruction."""
    text, address = "", 0
    for line in lines:
        if line.startswith("."):
            text += f"{line}:\n"
            continue
        times, _, rest = line.partition(" * ")
        for _ in range(int(times) if rest else 1):
            text += f"        /*{address:04x}*/                   {rest or line} ;\n"
            address += 16
    return text


def loop(*lines: str, ttgir: str = TTGIR):
    return sass.main_loop(code(*lines), ttgir, num_warps=8)


def test_a_step_does_not_count_what_waits_for_a_copy():
    # A round: 5 + 1 (the branch to the wait) + 4 products + 1.
    head = ("MOV", ".L_loop", "5 * IADD", "@!P0 BRA `(.L_wait)", ".L_on")
    rest = (f"4 * {HGMMA}", "@P0 BRA `(.L_loop)", "9 * FADD", "EXIT")
    wait = (".L_wait", "7 * SYNCS", "@!P0 BRA `(.L_wait)", "BRA `(.L_on)")
    assert loop(*head, *rest, *wait) == sass.Loop(11.0, 10, None, False)


def test_an_unrolled_loop_holds_several_steps():
    lines = (".L_loop", f"8 * {HGMMA}", "11 * IADD", "@P0 BRA `(.L_loop)", "EXIT")
    assert loop(*lines).step == 10.0


def test_a_step_may_be_multiplied_in_pieces():
    """As Triton does where one operand is in registers."""
    piece = "    %a = ttng.warp_group_dot %h, %w, %c : tensor<128x16xf16, #ttg.dot_op<{idx = 0}>> \
* !ttg.memdesc<16x256xf16, #shared> -> tensor<128x256xf32, #mma>\n"
    lines = (".L_loop", f"4 * {HGMMA}", "16 * HMUL2", "@P0 BRA `(.L_loop)", "EXIT")
    assert loop(*lines, ttgir=f"  scf.for %i = %zero to %n {{\n{4 * piece}  }}\n").step == 21.0


def test_a_program_may_have_two_copies_of_its_epilogue():
    """Within the usual one the longest way counts; a predicated EXIT ends no warp."""
    lines = (".L_loop", f"4 * {HGMMA}", "@P0 BRA `(.L_loop)", "3 * MOV", "@P1 BRA `(.L_marked)")
    usual = ("150 * FADD", "@P2 BRA `(.L_out)", "50 * STG.E", ".L_out", "@P3 EXIT", "STG.E", "EXIT")
    marked = (".L_marked", "500 * FSETP", "EXIT", ".L_end", "BRA `(.L_end)")
    assert loop(*lines, *usual, *marked) == sass.Loop(
        5.0, 3 + 1 + 150 + 1 + 50 + 3, 3 + 1 + 500 + 1, False
    )


def test_the_epilogue_of_a_walk_over_tiles_ends_where_the_next_tile_begins():
    lines = (".L_tile", "20 * UTMALDG.2D", ".L_loop", f"4 * {HGMMA}", "@P0 BRA `(.L_loop)")
    lines += ("30 * STG.E", "@P1 BRA `(.L_tile)", "EXIT")
    assert loop(*lines) == sass.Loop(5.0, 32, None, False)


def test_a_flattened_loop_holds_the_epilogue_and_the_next_copies():
    lines = (".L_loop", "2 * UTMALDG.2D", f"4 * {HGMMA}", "@P0 BRA `(.L_next)", "200 * STG.E")
    lines += (".L_next", "@P1 BRA `(.L_loop)", "EXIT")
    assert loop(*lines) == sass.Loop(8.0, 200, None, True)


def test_without_a_main_loop_there_is_nothing_to_read():
    assert loop("4 * FADD", "EXIT", ttgir="") is None
    # A walk over tiles of one step each.
    assert loop(".L_tile", f"4 * {HGMMA}", "@P0 EXIT", "BRA `(.L_tile)") is None


def test_the_way_of_a_parted_warp_does_not_count():
    lines = (".L_loop", f"4 * {HGMMA}", "@P0 BRA `(.L_loop)", "BRA.DIV ~URZ, `(.L_slow)")
    lines += ("5 * SHFL", ".L_join", "EXIT", ".L_slow", "400 * WARPSYNC", "BRA `(.L_join)")
    assert loop(*lines).epilogue == 7
