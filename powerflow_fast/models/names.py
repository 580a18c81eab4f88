"""Which model a user means: a name of the table however people write it, a folder, or the Hub.

A name is looked up by its last path part, without the words that leave the sizes as they are
(`meta-llama/Llama-3.1-8B-Instruct` has the sizes of `Llama-3-8B`). For a name in no table
the Hub is asked, by one short request.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerflow_fast.models.shapes import (
    FAMILIES,
    MODEL_SHAPES,
    NO_EXPERTS,
    SIZES,
    ModelShape,
    check_sizes,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HUB_SECONDS = 5.0  # to wait for the Hub

# Models with the sizes of an entry. Sources: litgpt's table (see model_shapes); Qwen2.5-Math-1.5B
# has a tied head too, since its 1,543,714,304 published parameters are Qwen2.5-1.5B's;
# DeepSeek-R1-Distill-Qwen-7B as printed by model viewers (3584, 28 layers, 152064 rows, untied).
SAME_SIZES = {
    "Llama-3-8B": ["Llama-3.1-8B", "DeepSeek-R1-Distill-Llama-8B"],
    "Llama-3-70B": [
        "Llama-3.1-70B",
        "Llama-3.3-70B",
        "Llama-3.1-Nemotron-70B",
        "DeepSeek-R1-Distill-Llama-70B",
    ],
    "SmolLM2-135M": ["smollm2"],  # the packaged one
    "Mistral-7B-v0.1": ["Mistral-7B-v0.2"],
    "Mistral-7B-v0.3": ["Mistral-7B", "Mathstral-7B"],
    "Mistral-Nemo-12B": ["Mistral-Nemo"],
    "Mistral-Small-24B": ["Mistral-Small-3.1-24B"],
    "Mistral-Large-123B": ["Mistral-Large-2407", "Mistral-Large-2411"],
    "Phi-3-mini": ["Phi-3-mini-4k", "Phi-3-mini-128k", "Phi-3.5-mini"],
    "Phi-4": ["Phi-4-reasoning", "Phi-4-reasoning-plus"],
    "Phi-4-mini": ["Phi-4-mini-reasoning"],
    "Qwen2.5-0.5B": ["Qwen2.5-Coder-0.5B"],
    "Qwen2.5-1.5B": ["Qwen2.5-Coder-1.5B", "Qwen2.5-Math-1.5B"],
    "Qwen2.5-3B": ["Qwen2.5-Coder-3B"],
    "Qwen2.5-7B": ["Qwen2.5-Coder-7B", "Qwen2.5-Math-7B", "DeepSeek-R1-Distill-Qwen-7B"],
    "Qwen2.5-14B": ["Qwen2.5-Coder-14B"],
    "Qwen2.5-32B": ["Qwen2.5-Coder-32B", "QwQ-32B"],
    "Qwen2.5-72B": ["Qwen2.5-Math-72B"],
}
# Words after which a model has the same sizes: how it was trained, how a copy of it is stored.
WORDS = set("instruct it pt base chat hf thinking preview 1m unsloth bnb 4bit gguf awq".split())
VERSION = re.compile(r"v\d+(\.\d+)*|\d{4}")  # v0.3, 2507: dropped where the name with it is unknown
MIXTURES = re.compile(
    r"mixtral|moe\b|-a\d+(\.\d+)?b\b|gpt-?oss|deepseek-(v[23]|r1(?!-distill))|llama-4|kimi-k2"
)


def find_shape(model: str) -> tuple[str, ModelShape]:
    """A model's sizes, and in words where they come from.

    Args:
        model: a folder with a config.json or such a file, a name of the table as people write it,
            or the name of a repository on the Hugging Face Hub, which is asked once.

    Raises:
        ValueError: one line that names `model`, what was tried, and the nearest names; for a
            config.json its path, the key, what came and what was expected.
    """
    path = _config_path(model)
    if path is not None:
        return str(path), _from_json(str(path), path.read_bytes())
    name = table_name(model)
    if name is not None:
        same = model.rsplit("/", 1)[-1] == name
        return name if same else f"{model}, the sizes of {name}", MODEL_SHAPES[name]
    if MIXTURES.search(model.lower()):
        raise ValueError(f"model: {model} {NO_EXPERTS}")
    tried = "no name of the table, no folder with a config.json"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        try:
            source = f"{model}, config.json of the Hub"
            return source, _from_json(source, _hub_config(model))
        except LookupError as error:
            tried += f", and {error.args[0]}"
    raise ValueError(
        f"model: {model!r} is {tried}; {_nearest(model)}, or a folder with config.json"
    )


def _config_path(model: str) -> Path | None:
    """The config.json that `model` means as a folder or a file; None for a name."""
    path = Path(os.path.expanduser(model))  # Path's own raises for an unknown user
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: {model}: this folder has no config.json")
        return path / "config.json"
    if path.is_file():
        return path
    if path.is_absolute() or model.startswith(".") or path.suffix == ".json":
        raise ValueError(f"model: {model}: no such folder or file")
    return None


def table_name(model: str) -> str | None:
    """The entry of the table that `model` means; None where there is none."""
    known = {
        _key(other): name for name in MODEL_SHAPES for other in (name, *SAME_SIZES.get(name, ()))
    }
    return known.get(_key(model)) or known.get(_key(model, versions=False))


def _key(model: str, versions: bool = True) -> tuple[str, ...]:
    """What a name says about sizes: its letters and numbers, e.g. ("llama", "3.1", "8", "b")."""
    words = re.split(r"[-_: ]+", model.rstrip("/").rsplit("/", 1)[-1].lower())
    words = words[1:] if words[0] == "meta" else words
    words = [w for w in words if w not in WORDS and (versions or not VERSION.fullmatch(w))]
    return tuple(re.findall(r"[a-z]+|\d+(?:\.\d+)?", " ".join(words)))


def _nearest(model: str) -> str:
    names = {" ".join(_key(n)): n for n in (*MODEL_SHAPES, *sum(SAME_SIZES.values(), []))}
    near = difflib.get_close_matches(" ".join(_key(model)), names, n=3, cutoff=0.6)
    if near:
        return f"nearest: {', '.join(names[key] for key in near)}"
    return f"names there are: {', '.join(MODEL_SHAPES)}"


def _from_json(source: str, text: bytes) -> ModelShape:
    """The shape in a config.json, whose place `source` says; ValueError names the key at fault."""
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or no text, or too deep
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"model: {source} is no JSON object")
    kind, nested = values.get("model_type"), values.get("text_config")
    try:
        if not isinstance(kind, str):
            raise ValueError(f"model_type: expected a name, got {reprlib.repr(kind)}")
        if not isinstance(nested, dict | None):
            raise ValueError(f"text_config: expected an object, got {reprlib.repr(nested)}")
        if nested is not None:  # transformers has sizes of its own for keys left out
            check_sizes(nested, may_lack=SIZES)
        elif kind in FAMILIES:
            check_sizes(values)
        return ModelShape.from_config(_config(kind, values))
    except ValueError as error:
        raise ValueError(f"model: {source}: {error}") from None


def _config(kind: str, values: dict[str, Any]) -> PretrainedConfig:
    """The configuration that transformers makes of a config.json; ValueError where it refuses."""
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type: transformers knows no {kind!r}")
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except Exception as error:  # of any class: a wrong type fails wherever it is first used
        text = " ".join(str(error).split())
        raise ValueError(f"transformers refuses it: {type(error).__name__}: {text}") from None


def _hub_config(name: str) -> bytes:
    """A repository's config.json: from the cache, else by one request; LookupError."""
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached).read_bytes()
    try:
        answer = get_session().get(
            hf_hub_url(name, "config.json"), headers=build_hf_headers(), timeout=HUB_SECONDS
        )
    except Exception as error:  # classes of the client's own, which change with its version
        raise LookupError(f"the Hub cannot be reached ({type(error).__name__})") from None
    if answer.status_code in (401, 403):  # without a token the Hub does not say which
        raise LookupError("the Hub has no such model, or it is gated: see `hf auth login`")
    if answer.status_code == 404:
        raise LookupError("the Hub has no such model or no config.json in it")
    if answer.status_code != 200:
        raise LookupError(f"the Hub answers with error {answer.status_code}")
    return answer.content
