"""`powerflow-fast plan`: its counts against real steps, against each other, and its answers."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from powerflow_fast import model_names  # noqa: E402
from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.model_names import find_shape, table_name  # noqa: E402
from powerflow_fast.model_shapes import model_shape  # noqa: E402
from powerflow_fast.plan import Run, largest_micro_batch, lora_parameters, plan  # noqa: E402
from powerflow_fast.plan_advice import trainer_options  # noqa: E402
from tests import plan_run, tiny  # noqa: E402

LLAMA = model_shape("Llama-3-70B")


@pytest.mark.parametrize(("checkpointing", "fused"), [(True, True), (False, False)])
def test_counts_are_the_measured_peak_of_a_real_step(checkpointing, fused):
    """Within -5 % and +20 %: a plan that errs should err on the safe side.

    Seen when this was written, with the other two combinations: +1 to +11 %.
    """
    script = Path(plan_run.__file__)
    command = [sys.executable, script, str(int(checkpointing)), "fused" if fused else "plain"]
    # Freed blocks go back to the system, so that a freed one does not hide a new one.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    memory = plan(plan_run.run_of(checkpointing), plan_run.SEQUENCES, fused)
    counted = memory.activations + max(memory.head, memory.backward)
    ratio = counted / int(done.stdout)
    print(f"counted {counted / 1e6:.0f} MB, measured {int(done.stdout) / 1e6:.0f} MB")
    assert 0.95 < ratio < 1.2


def test_weights_and_adapter_are_those_of_the_model():
    model = plan_run.build(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(plan_run.SHAPE, 8) == trained
    memory = plan(plan_run.run_of(False), 1)
    assert memory.weights == 4 * (sum(p.numel() for p in model.parameters()) - trained)
    assert memory.adapter == memory.gradients == memory.optimizer / 2 == 4 * trained
    for name in ("Llama-3-70B", "Qwen2.5-7B"):
        shape = model_shape(name)
        with torch.device("meta"):
            full = AutoModelForCausalLM.from_config(shape.to_config())
            full = get_peft_model(full, LoraConfig(r=16, target_modules="all-linear"))
        trained = sum(p.numel() for p in full.parameters() if p.requires_grad)
        assert lora_parameters(shape, 16) == trained


def test_seventy_billion_on_one_gpu():
    run = Run(LLAMA, weights="nf4", lora_rank=16, tokens=8192)
    memory = plan(run, 1)
    assert 39e9 < memory.weights < 40e9  # 68.5e9 at 4.127 bits and 2.1e9 at 16
    assert largest_micro_batch(run) >= 1
    assert largest_micro_batch(replace(run, weights="bf16")) == 0
    assert plan(run, 1, fused=False).head > 8 * memory.head
    no_checkpoints = replace(run, checkpointing=False)
    assert largest_micro_batch(no_checkpoints) == 0


def test_seventy_billion_on_two_gpus():
    resident = Run(LLAMA, gpus=2, sharding="fsdp")
    assert largest_micro_batch(resident) == 0  # half of 141 GB, and what is gathered
    offloaded = replace(resident, offload=True)
    assert largest_micro_batch(offloaded) >= 1
    memory = plan(offloaded, 1)
    assert memory.weights == memory.optimizer == 0 and memory.host > 141e9


def test_an_offloaded_reference_is_there_when_activations_are_not():
    run = Run(model_shape("Qwen2.5-7B"), lora_rank=0)
    kept, offloaded = plan(run, 4), plan(replace(run, offload_reference=True), 4)
    assert offloaded.reference == 0 and offloaded.host == kept.reference == kept.weights
    assert offloaded.scoring == kept.weights + kept.head
    step = kept.activations + max(kept.head, kept.backward)
    expected = kept.total - kept.weights - step + max(step, offloaded.scoring)
    assert offloaded.total == pytest.approx(expected) and offloaded.total < kept.total
    few = plan(replace(run, tokens=64, offload_reference=True), 1)  # the copy outweighs a step
    assert few.total == few.weights + few.gradients + few.optimizer + few.scoring


def test_the_largest_micro_batch_is_the_largest():
    for tokens in (512, 4096):
        run = Run(model_shape("Qwen2.5-7B"), memory_gb=40, tokens=tokens)
        fits = largest_micro_batch(run)
        assert plan(run, fits).total <= 0.95 * 40e9 < plan(run, fits + 1).total
        assert largest_micro_batch(run, fused=False) < fits


def test_the_command_answers(capsys, tmp_path):
    assert main(["plan", "Llama-3-70B", "--weights", "nf4"]) == 0
    out = capsys.readouterr().out
    assert "weights (nf4)" in out and "not measured" in out and "nan" not in out
    rows = re.findall(r"largest micro-batch +(\d+) +(\d+)", out)
    assert int(rows[0][0]) >= int(rows[0][1])
    tiny.model().save_pretrained(tmp_path / "model")
    argv = ["plan", str(tmp_path / "model"), "--tokens", "64", "--tflops", "100"]
    assert main(argv) == 0
    assert "100 TFLOP/s (given)" in capsys.readouterr().out
    argv = ["plan", "Llama-3-70B", "--gpus", "2", "--sharding", "fsdp", "--offload"]
    assert main(argv) == 0 and "main memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["nothing"], "names there are: Llama-2-7B"),
        (["Llama-3-71B"], "nearest: Llama-3-70B"),
        (["Mixtral-8x7B-Instruct-v0.1"], "mixture of experts"),
        (["nobody/nothing-7B"], "Hub"),
        (["Llama-3-70B", "--memory-gb", "0"], "memory_gb"),
        (["Llama-3-70B", "--weights", "int3"], "invalid choice"),
        (["Llama-3-70B", "--weights", "nf4", "--lora-rank", "0"], "LoRA"),
        (["Llama-3-70B", "--offload"], "sharding"),
        (["Llama-3-70B", "--offload-reference"], "lora_rank=0"),
        (["Llama-3-70B", "--micro-batch", "-1"], "micro_batch"),
    ],
)
def test_bad_questions_get_one_line(capsys, argv, word):
    assert main(["plan", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err


SPELLINGS = {
    "Llama-3.3-70B": "Llama-3-70B",
    "meta-llama/Llama-3.3-70B-Instruct": "Llama-3-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3-8B",
    "meta-llama/Meta-Llama-3-8B": "Llama-3-8B",
    "Mistral-7B": "Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.2": "Mistral-7B-v0.1",
    "smollm2": "SmolLM2-135M",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M",
    "qwen3-8b": "Qwen3-8B",
    "Qwen/Qwen3-8B-Base": "Qwen3-8B",
    "Qwen3-4B-Instruct-2507": "Qwen3-4B",
    "Gemma-3-27b": "Gemma-3-27B",
    "google/gemma-2-9b-it": "Gemma-2-9B",
    "Qwen2.5-7B-Instruct": "Qwen2.5-7B",
    "Qwen/Qwen2.5-Math-1.5B": "Qwen2.5-1.5B",
    "llama_2_7b_chat_hf": "Llama-2-7B",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_as_people_write_them(spelling, monkeypatch):
    monkeypatch.setattr(model_names, "_hub_config", lambda name: pytest.fail("asks the Hub"))
    assert table_name(spelling) == SPELLINGS[spelling]
    assert find_shape(spelling)[1] == model_shape(SPELLINGS[spelling])


def test_an_unknown_name_is_no_known_one():
    for name in ("Qwen3-9B", "Llama-4-Scout", "Qwen3-30B-A3B", "gpt-oss-20b", "7B", ""):
        assert table_name(name) is None


def test_a_config_json_and_a_name_of_the_hub(tmp_path, monkeypatch, capsys):
    tiny.model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    for model in (path.parent, path):
        assert find_shape(str(model))[1].hidden_size == 16
    monkeypatch.setattr(model_names, "_hub_config", lambda name: path.read_text())
    assert main(["plan", "nobody/mine", "--tokens", "64"]) == 0
    assert capsys.readouterr().out.startswith("nobody/mine, config.json of the Hub: 0.00e9")
    path.write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        find_shape(str(path))


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
