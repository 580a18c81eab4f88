"""Loops that are not ours: accelerate's by hand, and the one of Axolotl's trainer."""

import ast
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from transformers import Trainer, TrainingArguments  # noqa: E402

from powerflow_fast.integrations import axolotl  # noqa: E402
from tests.helpers import tiny  # noqa: E402

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "examples" / "plain_loop.py"


def test_the_readme_shows_the_plain_loop_that_is_tested():
    text = LOOP.read_text()
    body = text[text.index("import torch") : text.index('\n\nif __name__ == "__main__"')]
    assert body.rstrip() in (ROOT / "README.md").read_text()


def test_the_plain_loop_sharpens(tmp_path, capsys):
    torch.manual_seed(0)
    tiny.model().save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    spec = importlib.util.spec_from_file_location("plain_loop", LOOP)
    loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loop)
    loop.train(tmp_path, tiny.PROMPTS, steps=12, max_new_tokens=6, lr=2e-2)
    lines = [
        ast.literal_eval(line)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("{'")
    ]
    assert len(lines) == 12
    assert lines[0]["policy_logp"] == pytest.approx(lines[0]["ref_logp"], abs=1e-3)
    # A power of 4 of the base puts its completions at likelier ones.
    assert lines[-1]["ref_logp"] > lines[0]["ref_logp"] + 0.2


def train(folder, hook):
    rows = [{"input_ids": ids, "labels": ids} for ids in (list(range(2, 8)), list(range(8, 14)))]
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    torch.manual_seed(0)
    trainer = Trainer(tiny.model(), args, None, rows)
    hook(trainer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def test_axolotls_hook_gives_its_trainer_this_head(tmp_path):
    """With what the hook is called with: the configuration, a mapping, and the built trainer."""
    before, _ = train(tmp_path, lambda trainer: None)
    after, trainer = train(tmp_path, lambda trainer: axolotl.use_head({"rl": None}, trainer))
    assert after == pytest.approx(before, rel=1e-4)
    ids = torch.arange(2, 8)[None]
    log_probs = trainer.model(input_ids=ids, labels=ids).log_probs
    assert log_probs.shape == (1, 5)
    expected = trainer.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(log_probs, expected.gather(2, ids[:, 1:, None])[..., 0])
    with pytest.raises(ValueError, match="supervised fine-tuning"):
        axolotl.use_head({"rl": "grpo"}, trainer)


def test_axolotl_loads_the_plugin_by_its_name(tmp_path):
    base = pytest.importorskip("axolotl.integrations.base")
    plugin = base.load_plugin("powerflow_fast.integrations.axolotl.PowerFlowPlugin")
    manager = SimpleNamespace(plugins={"powerflow": plugin})
    before, _ = train(tmp_path, lambda trainer: None)
    create = base.PluginManager.post_trainer_create
    after, _ = train(tmp_path, lambda trainer: create(manager, {"rl": None}, trainer))
    assert after == pytest.approx(before, rel=1e-4) and "axolotl" in sys.modules


def test_axolotls_options_reach_the_head(tmp_path):
    seen = []
    train(
        tmp_path,
        lambda trainer: (
            axolotl.use_head({"rl": None, "powerflow_head": {"grad_tolerance": 1e-3}}, trainer),
            seen.append(trainer.model._fused_head_options),
        ),
    )
    assert seen == [{"grad_tolerance": 1e-3}]
    assert axolotl.PowerFlowArgs(powerflow_head={"round_logits": True}).powerflow_head
