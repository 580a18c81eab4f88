"""What commands share: the run behind a folder, its base, and options that were given."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

pytest.importorskip("transformers")

from powerflow_fast.cli.common import UsageError, base_of, fields_given, run_of  # noqa: E402
from powerflow_fast.evaluation.record import RunRecord  # noqa: E402
from powerflow_fast.models.smollm2 import HUB_NAME  # noqa: E402


def test_the_run_of_a_folder_or_of_its_checkpoint(tmp_path):
    assert run_of(None) is run_of("no such folder") is run_of(str(tmp_path)) is None
    RunRecord("m", 4.0, None, True, 3, 4, 16, 1.0, 1e-4, "length", "group", 0).save(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    assert run_of(str(tmp_path)) == run_of(str(tmp_path / "checkpoint-2")) is not None


def test_the_base_of_an_adapter(tmp_path):
    assert base_of(None, None) == "smollm2"
    with pytest.raises(UsageError, match="no adapter_config.json there"):
        base_of(str(tmp_path), None)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": HUB_NAME}))
    assert base_of(str(tmp_path), None) == "smollm2"
    run = RunRecord("m", 4.0, None, True, 3, 4, 16, 1.0, 1e-4, "length", "group", 0)
    assert base_of(str(tmp_path), run) == "m"
    config.write_text("{}")
    with pytest.raises(UsageError, match="names no base"):
        base_of(str(tmp_path), None)


def test_options_that_are_fields():
    @dataclass
    class Settings:
        steps: int = 1
        seed: int = 0

    given = argparse.Namespace(steps=3, run=print)
    assert Settings(**fields_given(given, Settings)) == Settings(3, 0)


@pytest.mark.parametrize(
    "given,expected",
    [
        ({}, "None 10000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "7"}, "None 7"),
    ],
)
def test_threads_of_a_command_soon_sleep_where_they_wait(given, expected):
    """OpenMP reads the variables once, when torch is imported: the command has to be earlier."""
    code = """
import os, sys
import powerflow_fast.cli as cli
def parser():
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    print(*(os.environ.get(name) for name in names), "torch" in sys.modules)
    sys.exit()
cli._parser = parser
cli.main([])
"""
    read = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in read} | given
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.split() == [*expected.split(), "False"], run.stderr
