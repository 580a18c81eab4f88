"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes give what one process gives."""

from functools import partial

import pytest
import torch

pytest.importorskip("deepspeed")

from tests.helpers import ranks, zero_run  # noqa: E402

CASES = ("adapter", "full", "tied", "loop")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    for case in CASES:
        for stage, world in ((0, 1), (2, 2), (3, 2)):
            work = partial(zero_run.run, folder, stage, world, case)
            ranks.finish(world, work, folder / f"log-{case}-{stage}")
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(runs, case, stage):
    expected, result = runs(f"{case}-0"), runs(f"{case}-{stage}")
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    if case != "loop":  # which has no trainer
        assert result["saved"] == expected["saved"] and min(expected["saved"]) > 0  # prompts
    assert result["parameters"].keys() == expected["parameters"].keys()
    for name, value in expected["parameters"].items():
        error = (result["parameters"][name] - value).abs().max()
        assert error <= 1e-5 * value.abs().max(), (name, float(error))
