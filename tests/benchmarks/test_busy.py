"""Steps beside other programs: their table, and that the programs end with them."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import busy, head_tables
from benchmarks.peers import OURS


def test_the_table_of_a_busy_machine():
    rows = [
        {"what": "a step", "step": step, "waiting": waiting, "alone": 0.1} | more
        for step, more in ((OURS, {"beside": 0.2}), ("naive PyTorch", {"beside": 1.5}))
        for waiting in busy.WAITING
    ]
    (table,) = head_tables.busy_tables({"rows": rows})
    head, _, ours, naive = table.splitlines()
    assert head.startswith("| a step | alone, default | beside two programs | alone, passive |")
    assert ours == f"| **{OURS}** |" + " 0.10 s | 0.20 s (2.0x) |" * 3
    assert naive.endswith("| 1.50 s (15.0x) |")


class Program:
    """Stands for a worker with two steps, or for a program that counts."""

    stood: list = []

    def __init__(self, command, env=None, **_):
        self.env, self.killed = env, False
        self.stdin = SimpleNamespace(write=lambda _: None, flush=lambda: None)
        self.stdout = io.StringIO("\n".join(['["a", "b"]', *(str(i) for i in range(99))]))
        self.stood.append(self)

    def kill(self):
        self.killed = True

    def wait(self):
        pass


def test_what_runs_beside_a_step_ends_with_it(monkeypatch):
    monkeypatch.setattr(Program, "stood", [])
    monkeypatch.setattr(busy.subprocess, "Popen", Program)
    monkeypatch.setattr(busy.time, "sleep", lambda _: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    found = busy.measure("float32")
    assert len(Program.stood) == len(busy.WAITING) + busy.PROGRAMS
    assert all(program.killed for program in Program.stood)
    # One round of two steps warms up, seven follow, then seven beside the programs.
    times = {step: {"alone": 8.0 + i, "beside": 22.0 + i} for i, step in enumerate("ab")}
    assert found == dict.fromkeys(busy.WAITING, times)
    spins = [program.env.get("GOMP_SPINCOUNT") for program in Program.stood[:3]]
    assert spins == [None, None, "10000"]


def test_a_worker_runs_the_steps_it_is_told_to(monkeypatch, capsys):
    ran = []
    steps = {name: lambda name=name: ran.append(name) or print("noise") for name in "ab"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # serve() turns it away
    busy.serve(steps)
    names, seconds = capsys.readouterr().out.splitlines()
    assert json.loads(names) == ["a", "b"] and ran == ["a", "b", "b"] and float(seconds) > 0


def test_what_a_worker_says_when_it_cannot_start(tmp_path):
    with pytest.raises(RuntimeError, match="invalid choice: 'nothing'"):
        busy.Worker("nothing", tmp_path, busy.DEFAULT)
