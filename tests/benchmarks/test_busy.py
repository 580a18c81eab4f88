"""The step beside other programs: its table, and that they end with it."""

import time
from types import SimpleNamespace

import torch

from benchmarks import busy, head_tables, peers
from benchmarks.peers import OURS


def test_the_table_of_a_busy_machine():
    rows = [
        {"peer": peer, "dtype": "float32", "waiting": waiting, "tokens": 256, "alone": 0.1} | more
        for peer, more in ((OURS, {"beside": 0.2}), ("naive PyTorch", {"beside": 1.5}))
        for waiting in ("default", "passive")
    ]
    (table,) = head_tables.busy_tables({"rows": rows})
    head, _, ours, naive = table.splitlines()
    assert head.count("beside two programs") == 2 and "passive waiting" in head
    assert ours == f"| **{OURS}** | 0.10 s | 0.20 s (2.0x) | 0.10 s | 0.20 s (2.0x) |"
    assert naive.endswith("| 1.50 s (15.0x) |")


def test_programs_beside_a_step_end_with_it(monkeypatch):
    step = lambda method, inputs: time.sleep(0.01)  # noqa: E731
    monkeypatch.setattr(busy, "GROUPS", {"tb-frozen": SimpleNamespace(run=step)})
    monkeypatch.setattr(busy, "draw", lambda *_: None)
    monkeypatch.setattr(busy, "ROUNDS", 1)
    started = []
    monkeypatch.setattr(
        busy.subprocess, "Popen", lambda *_: started.append(Program()) or started[-1]
    )
    found = busy.measure(torch.bfloat16)
    assert len(started) == busy.PROGRAMS and all(program.killed for program in started)
    assert list(found)[:2] == [OURS, peers.ROUNDED]
    assert all(seconds["alone"] >= 0.01 for seconds in found.values())


class Program:
    killed = False

    def kill(self):
        self.killed = True
