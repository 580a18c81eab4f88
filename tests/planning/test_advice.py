"""What `plan` advises: commands that fit, and the trainer's options."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("trl")

from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.models.shapes import model_shape  # noqa: E402
from powerflow_fast.planning.advice import trainer_options, ways_to_fit  # noqa: E402
from powerflow_fast.planning.memory import Run, largest_micro_batch  # noqa: E402
from tests.helpers import tiny  # noqa: E402

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


@pytest.mark.parametrize(
    "argv",
    [
        "Llama-3-70B --weights nf4 --micro-batch 40",
        "Llama-3-8B --micro-batch 13",
        "Llama-3-8B --micro-batch 13 --gpus 2",
        "Llama-3-8B --micro-batch 3 --no-checkpointing --memory-gb 40.0",
    ],
)
def test_a_given_micro_batch_that_does_not_fit_gets_commands_that_do(argv, capsys):
    assert main(["plan", *argv.split()]) == 1
    out = capsys.readouterr().out
    assert "It does not fit. These do:" in out and "trainer:" not in out
    fits = int(re.search(r"^largest micro-batch +(\d+) ", out, re.M)[1])
    given = int(re.search(r"--micro-batch (\d+)", argv)[1])
    ways = re.findall(r"^  powerflow-fast (plan .*?)   # micro-batch (\d+)", out, re.M)
    sizes = [int(shown) for _, shown in ways]
    assert len(ways) >= 2 and fits < given
    assert sizes == ([fits] if fits else []) + [given] * (len(ways) - (fits > 0))
    for way, shown in ways:
        assert way.endswith(f" --micro-batch {shown}") and main(way.split()) == 0
        assert f"{shown} sequence(s) of" in capsys.readouterr().out


def test_a_given_micro_batch_that_fits(capsys):
    assert main(["plan", "Llama-3-8B", "--micro-batch", "4"]) == 0
    assert "trainer: per_device_train_batch_size=4 num_generations=8 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "memory_gb", "gpus"),
    [
        ("Llama-3-70B", 80, 4),
        ("Llama-3-70B", 96, 3),
        ("Llama-3-70B", 64, 5),
        ("Mistral-Large-123B", 80, 6),
    ],
)
def test_the_fewest_gpus_that_fit(model, memory_gb, gpus):
    run = Run(model_shape(model), memory_gb=memory_gb)
    (line,) = [way for way in ways_to_fit(model, run) if "--gpus" in way]
    assert f" --gpus {gpus} " in line
    sharded = replace(run, sharding="fsdp")
    assert largest_micro_batch(replace(sharded, gpus=gpus)) > 0
    assert largest_micro_batch(replace(sharded, gpus=gpus - 1)) == 0


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("completions", [1, 2, 6, 8, 11, 48])
@pytest.mark.parametrize("fits", [1, 2, 3, 8, 13, 500])
def test_the_trainers_options_multiply_to_what_was_planned(gpus, completions, fits, tmp_path):
    text = trainer_options(Run(LLAMA, gpus=gpus, completions=completions), fits)
    if completions * gpus == 1:
        assert text == "trainer: no group has 1 completion; plan --completions 2 or more"
        return
    options = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}
    size, steps = options["per_device_train_batch_size"], options["steps_per_generation"]
    group = options["num_generations"]
    assert size <= fits and size * steps == completions
    assert completions * gpus % group == 0 and group >= 2
    assert group == 8 or completions * gpus % 8
    assert ("groups stay whole" in text) == (size % group == 0)
    assert ("would not divide" in text) == (size < fits)
    assert options["gradient_accumulation_steps"] % steps == 0
    assert size * gpus * options["gradient_accumulation_steps"] >= 64
    if gpus == 1:
        made = tiny.config(tmp_path, **options)
        assert made.generation_batch_size == completions
