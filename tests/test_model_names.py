"""Which model a user means: names as people write them, folders, the Hub."""

import json

import pytest

from powerflow_fast import model_names
from powerflow_fast.cli import main
from powerflow_fast.model_names import find_shape, table_name
from powerflow_fast.model_shapes import model_shape
from tests import tiny

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
    ("key", "value", "said"),
    [
        ("hidden_size", "many", "hidden_size.*many"),
        ("hidden_size", 0, "hidden_size: expected a whole number > 0, got 0"),
        ("num_hidden_layers", -2, "num_hidden_layers: expected a whole number > 0, got -2"),
        ("num_attention_heads", 0, "num_attention_heads"),
        ("vocab_size", [32000], "vocab_size.*32000"),
        ("intermediate_size", 1.5, "intermediate_size.*1.5"),
        ("model_type", ["llama"], "no model_type"),
    ],
)
def test_a_bad_value_in_a_config_json_is_one_line(key, value, said, tmp_path, capsys):
    tiny.model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"model: {path}: .*{said}"):
        find_shape(str(path))
    capsys.readouterr()
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_config_json_does_not_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(model_names, "_hub_config", lambda name: pytest.fail("asks the Hub"))
    (tmp_path / "some" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="model: the folder some/model has no config.json"):
        find_shape("some/model")
