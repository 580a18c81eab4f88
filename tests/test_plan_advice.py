"""What `powerflow-fast plan` advises: ways to fit, and the trainer's options."""

import re

import pytest

from powerflow_fast.cli import main
from powerflow_fast.model_shapes import model_shape
from powerflow_fast.plan import Run
from powerflow_fast.plan_advice import trainer_options
from tests import tiny

LLAMA = model_shape("Llama-3-70B")


def options_of(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}


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
    options = options_of(text)
    size, steps = options["per_device_train_batch_size"], options["steps_per_generation"]
    assert size <= fits and (size * gpus * steps) % 8 == 0
    assert ("groups stay whole" in text) == (size % 8 == 0)
    assert options["gradient_accumulation_steps"] % steps == 0
    if gpus == 1:
        made = tiny.config(tmp_path, **options)
        assert made.generation_batch_size == size * steps


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("completions", [1, 4, 8, 20, 64])
@pytest.mark.parametrize("fits", [1, 3, 8, 40])
def test_no_more_is_sampled_than_was_planned_unless_it_must(gpus, completions, fits):
    text = trainer_options(Run(LLAMA, gpus=gpus, completions=completions), fits)
    options = options_of(text)
    own = options["per_device_train_batch_size"] * options["steps_per_generation"]
    fewest = next(n for n in range(1, 9) if n * gpus % 8 == 0)  # of one GPU, for a whole group
    assert own <= max(completions, fewest)
    assert ("not" in text) == (completions < fewest)


def test_a_micro_batch_that_does_not_fit(capsys):
    assert main("plan Llama-3-8B --micro-batch 40 --tokens 4096".split()) == 1
    out = capsys.readouterr().out
    fits = int(re.search(r"^largest micro-batch +(\d+) ", out, re.M)[1])
    assert f"A micro-batch of 40 does not fit. One of {fits} does:" in out
    assert main(f"plan Llama-3-8B --micro-batch {fits} --tokens 4096".split()) == 0
    assert "per_device_train_batch_size" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["Llama-3-70B --tokens 2048", "Qwen2.5-14B --lora-rank 0"])
def test_the_fewest_gpus_that_fit_are_advised(model, capsys):
    """Also where they are no power of two."""
    assert main(["plan", *model.split()]) == 1
    sharded = [x for x in capsys.readouterr().out.splitlines() if "--sharding fsdp" in x]
    gpus = int(re.search(r"--gpus (\d+)", sharded[0])[1])
    fewer = ["--sharding", "fsdp", "--gpus", str(gpus - 1)]
    assert main(["plan", *model.split(), *fewer]) == 1
    assert gpus == 3
