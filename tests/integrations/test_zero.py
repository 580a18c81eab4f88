"""DeepSpeed's ZeRO-2 and ZeRO-3 on two processes give what one process gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    script = str(Path(__file__).parents[1] / "helpers" / "zero_run.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda name: torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", ["adapter", "full", "tied", "loop"])
def test_two_processes_equal_one(runs, case, stage):
    expected, result = runs(f"{case}-0"), runs(f"{case}-{stage}")
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert result["parameters"].keys() == expected["parameters"].keys()
    for name, value in expected["parameters"].items():
        error = (result["parameters"][name] - value).abs().max()
        assert error <= 1e-5 * value.abs().max(), (name, float(error))
