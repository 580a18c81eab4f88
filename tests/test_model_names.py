"""Which model a name, a folder or a config.json means, and what is said of one that means none."""

import pytest

pytest.importorskip("peft")

from powerflow_fast import model_names  # noqa: E402
from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.model_names import find_shape, table_name  # noqa: E402
from powerflow_fast.model_shapes import model_shape  # noqa: E402
from tests import tiny  # noqa: E402

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


@pytest.mark.parametrize(
    ("model", "word"),
    [
        ("nothing", "names there are: Llama-2-7B"),
        ("Llama-3-71B", "nearest: Llama-3-70B"),
        ("Mixtral-8x7B-Instruct-v0.1", "mixture of experts"),
        ("nobody/nothing-7B", "Hub"),
    ],
)
def test_a_name_of_no_model_gets_one_line(capsys, model, word):
    assert main(["plan", model]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err


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
