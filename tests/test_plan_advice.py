"""What `plan` advises: commands that fit, and the trainer's options."""

import re

import pytest

pytest.importorskip("trl")

from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.model_shapes import model_shape  # noqa: E402
from powerflow_fast.plan import Run  # noqa: E402
from powerflow_fast.plan_advice import trainer_options  # noqa: E402
from tests import tiny  # noqa: E402

LLAMA = model_shape("Llama-3-70B")


@pytest.mark.parametrize(
    "argv",
    [
        "Llama-3-70B --gpus 2",
        "Llama-3-70B",
        "Qwen2.5-14B --lora-rank 0",
        "Llama-3-8B --no-checkpointing --memory-gb 40.0",
        "Llama-3-70B --weights nf4 --gpus 2 --memory-gb 48.0",
        "Llama-3-8B --completions 64 --memory-gb 24.0 --tokens 2048",
    ],
)
def test_what_does_not_fit_gets_commands_that_do(argv, capsys):
    assert main(["plan", *argv.split()]) == 1
    out = capsys.readouterr().out
    ways = re.findall(r"^  powerflow-fast (plan .*?)   # micro-batch (\d+), (\d+) GB", out, re.M)
    assert 1 <= len(ways) <= 4 and "It does not fit. These do:" in out
    for way, fits, peak in ways:
        assert main(way.split()) == 0
        out = capsys.readouterr().out
        assert re.search(rf"^largest micro-batch +{fits} ", out, re.M)
        assert round(float(re.search(r"^peak +([\d.]+)", out, re.M)[1])) == int(peak)


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("fits", [1, 2, 3, 8, 13, 500])
def test_the_trainers_options_are_taken_by_the_trainer(gpus, fits, tmp_path):
    text = trainer_options(Run(LLAMA, gpus=gpus), fits)
    options = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}
    size, steps = options["per_device_train_batch_size"], options["steps_per_generation"]
    assert size <= fits and (size * gpus * steps) % 8 == 0
    assert ("groups stay whole" in text) == (size % 8 == 0)
    assert options["gradient_accumulation_steps"] % steps == 0
    if gpus == 1:
        made = tiny.config(tmp_path, **options)
        assert made.generation_batch_size == size * steps
