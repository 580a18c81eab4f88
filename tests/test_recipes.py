"""The recipes: every one parses into options that the trainer takes, and so do accelerate's."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402
from trl import TrlParser  # noqa: E402

from powerflow_fast import PowerFlowConfig  # noqa: E402
from powerflow_fast.cli.train import TrainArguments  # noqa: E402

RECIPES = Path(__file__).parents[1] / "recipes"
ALPHA = {  # the paper's, by kind of model and task
    "qwen2.5-math-1.5b": 4.0,
    "qwen2.5-math-7b": 4.0,
    "instruct-reasoning": 2.0,
    "creative": 0.5,
    "llama-70b-qlora": 4.0,
    "llama-70b-fsdp2": 4.0,
}


def test_there_is_a_recipe_for_each():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(ALPHA)


@pytest.mark.parametrize("name", ALPHA)
def test_recipe(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    parser = TrlParser((TrainArguments, PowerFlowConfig))
    argv = ["--config", str(RECIPES / f"{name}.yaml"), "--use_cpu", "true", "--report_to", "none"]
    options, config = parser.parse_args_and_config(argv)  # raises for a key that is no option
    assert options.model and options.data and config.alpha == ALPHA[name]
    assert config.generation_batch_size % config.num_generations == 0
    assert config.resume_from_checkpoint == "last" and config.save_total_limit == 2


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes in (1, 2, 8, 64)
    if config.num_processes > 1:
        assert config.fsdp_config["fsdp_version"] == 2


def test_the_numbers_in_the_docs_are_those_of_plan():
    from powerflow_fast.models.shapes import model_shape
    from powerflow_fast.planning.memory import Run, largest_micro_batch, lora_parameters, plan

    text = (RECIPES.parent / "docs" / "scaling.md").read_text()
    shape, layouts = model_shape("Llama-3-70B"), []
    layouts.append(Run(shape, weights="nf4"))
    layouts.append(Run(shape, gpus=2, sharding="fsdp", offload=True))
    layouts += [Run(shape, gpus=n, sharding="fsdp") for n in (8, 64)]
    for run in layouts:
        fits, plain = largest_micro_batch(run), largest_micro_batch(run, fused=False)
        row = f"| {run.gpus} | "
        (line,) = [line for line in text.splitlines() if line.startswith(row)]
        assert f"| {fits} / {plain} | {plan(run, fits).total / 1e9:.0f} GB |" in line, line
    assert f"({plan(layouts[1], 1).host / 1e9:.0f} GB of main memory)" in text
    resident = plan(Run(shape, gpus=2, sharding="fsdp"), 1)
    assert f"{resident.weights / 1e9:.1f} GB of weights each" in text
    assert f"and {resident.gathered / 1e9:.1f} GB gathered" in text
    one = plan(Run(shape, completions=1), 1).sampler
    assert f"({one / 1e9:.1f} GB for each" in text
    sent = 4 * lora_parameters(shape, 16)  # PEFT's adapters are float32
    assert f"{sent / 1e9:.1f} GB travel for each rollout" in text
    assert f"{2 * shape.parameters() / 1e9:.0f} GB, and no weight is merged" in text
