"""Which model a name, a folder or a config.json means, and what is said of one that means none."""

import json

import pytest

pytest.importorskip("peft")

from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.models import names  # noqa: E402
from powerflow_fast.models.names import find_shape, table_name  # noqa: E402
from powerflow_fast.models.shapes import ModelShape, model_shape  # noqa: E402
from tests.helpers import tiny  # noqa: E402

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
    monkeypatch.setattr(names, "_hub_config", lambda name: pytest.fail("asks the Hub"))
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
        ("~nobody-here/nothing-7B", "names there are"),
        ("", "names there are"),
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
    monkeypatch.setattr(names, "_hub_config", lambda name: path.read_bytes())
    assert main(["plan", "nobody/mine", "--tokens", "64"]) == 0
    assert capsys.readouterr().out.startswith("nobody/mine, config.json of the Hub: 0.00e9")


NOTHING = object()  # the key is left out
A_SIZE = "expected a whole number from 1 to 1e+09, got"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", "16", f"{A_SIZE} '16'"),
        ("hidden_size", NOTHING, f"{A_SIZE} no such key"),
        ("vocab_size", None, f"{A_SIZE} None"),
        ("vocab_size", 10**400, f"{A_SIZE} 1000"),
        ("num_hidden_layers", [2], f"{A_SIZE} [2]"),
        ("num_hidden_layers", True, f"{A_SIZE} True"),
        ("num_attention_heads", 0, f"{A_SIZE} 0"),
        ("num_attention_heads", 2.5, f"{A_SIZE} 2.5"),
        ("num_key_value_heads", "two", f"{A_SIZE} 'two'"),
        ("num_key_value_heads", 3, "expected a divisor of num_attention_heads=4, got 3"),
        ("head_dim", -4, f"{A_SIZE} -4"),
        ("intermediate_size", {}, f"{A_SIZE} {{}}"),
        ("num_experts", "many", "expected a whole number from 0 to 1e+09, got 'many'"),
        ("tie_word_embeddings", "no", "expected bool, got str"),
        ("rms_norm_eps", "small", "expected float, got str"),
        ("model_type", ["llama"], "expected a name, got ['llama']"),
        ("model_type", "lama", "transformers knows no 'lama'"),
        ("text_config", "llama", "expected an object, got 'llama'"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_bad_value_of_a_config_json_gets_one_line(tmp_path, capsys, kind, key, value, words):
    shape = ModelShape(kind, 16, 20, 2, 4, 2, 4, 32)
    values = {**shape.to_config().to_dict(), key: value}
    if value is NOTHING:
        del values[key]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    for model in (tmp_path, path):
        assert main(["plan", str(model)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert f"model: {path}: " in err and key in err and words in err and len(err) < 400


def test_a_bad_value_of_a_nested_config_gets_one_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    nested = {"model_type": "gemma3_text", "num_attention_heads": "8"}
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": nested}))
    assert main(["plan", str(path)]) == 2
    assert f"{path}: num_attention_heads: {A_SIZE} '8'" in capsys.readouterr().err
    del nested["num_attention_heads"]  # transformers has sizes of its own for what is left out
    path.write_text(json.dumps({"model_type": "gemma3", "text_config": nested}))
    assert find_shape(str(path))[1].model_type == "gemma3_text"


NO_OBJECTS = {
    "list": b"[]",
    "cut": b"{",
    "empty": b"",
    "binary": b"\xff\xfe\x00",
    "number": b"1",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_a_config_json_that_is_no_object_gets_one_line(tmp_path, capsys, name):
    path = tmp_path / "config.json"
    path.write_bytes(NO_OBJECTS[name])
    assert main(["plan", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(f"model: {path} is no JSON object\n")


def test_heads_that_no_head_dim_follows_from():
    config = ModelShape("phi3", 16, 20, 2, 4, 2, 4, 32).to_config(head_dim=None, hidden_size=18)
    with pytest.raises(ValueError, match="num_attention_heads: expected a divisor of hidden_size"):
        ModelShape.from_config(config)


def test_a_folder_without_a_config_json_is_no_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(names, "_hub_config", lambda name: pytest.fail("asks the Hub"))
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/sharp", "Llama-3-8B"):
        (tmp_path / folder).mkdir(parents=True)
        for model in (folder, str(tmp_path / folder)):
            assert main(["plan", model]) == 2
            assert capsys.readouterr().err.endswith(
                f"model: {model}: this folder has no config.json\n"
            )
    for model in (str(tmp_path / "Qwen3-8B"), "./Qwen3-8B", "../Qwen3-8B", "mine/config.json"):
        assert main(["plan", model]) == 2
        assert f"model: {model}: no such folder or file" in capsys.readouterr().err
