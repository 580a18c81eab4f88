"""The fastest heads of a group run again, in turn, and the table says where no order is claimed."""

import torch

from benchmarks import head_tables, method
from benchmarks.second_lap import FASTEST, SecondLap


class Scripted(method.Clock):
    """A call says itself how long it took."""

    def seconds(self, function):
        return function()


def test_the_fastest_run_again_in_turn():
    lap = SecondLap(Scripted(torch.device("cpu")), seconds=100.0)
    rows, turns = [], []
    for at in range(FASTEST + 2):

        def call(at=at):
            turns.append(at)
            return 3.0 + at

        rows.append({"seconds": 1.0 + at, "floor_flops": 10**12})
        lap.enter(rows[-1], call, [1.0 + at] * 8)
    lap.run()
    assert turns == list(range(FASTEST)) * 8
    assert rows[0]["seconds"] == 2.0 and rows[0]["rounds"] == 16 and rows[0]["tflops"] == 0.5
    assert [row.get("seconds_apart") for row in rows] == [2.0] * FASTEST + [None] * 2
    lap.run()
    assert len(turns) == 8 * FASTEST  # each row once


def test_one_head_alone_has_no_order():
    lap = SecondLap(Scripted(torch.device("cpu")), seconds=1.0)
    row = {"seconds": 1.0}
    lap.enter(row, lambda: 1.0, [1.0])
    lap.run()
    assert row == {"seconds": 1.0}


def test_laps_further_apart_than_two_heads_claim_no_order():
    rows = [{"seconds": 1.0, "seconds_apart": 0.2}, {"seconds": 1.1, "seconds_apart": 0.05}]
    assert head_tables._alike(*rows)
    assert not head_tables._alike(rows[0], {"seconds": 1.3})
    assert not head_tables._alike({"seconds": 1.0}, {"seconds": 1.1})  # no second lap
