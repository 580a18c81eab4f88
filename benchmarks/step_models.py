"""Models of whole steps: SmolLM2, or random weights in a published shape; texts of exact length."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import training_step
from powerflow_fast.models.shapes import ModelShape, model_shape

SMOLLM2 = "SmolLM2-135M-Instruct"
TINY = "tiny"
END = "<reponame>"  # a token that SmolLM2 does not write: 6e-10 a token
WORD = re.compile(r"Ġ?([a-z]+)\d*")
VOCABULARY = 49152  # of the tiny model: so large that it hardly ever draws its end token


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any


def load(name: str, folder: Path) -> Loaded:
    """SmolLM2 in float32, or random weights in the shape of that name: bf16 on a GPU.

    Completions end at their greatest length alone: the end token is one that is not drawn. On a CPU
    the model is kept in `folder`, from where a sampler may read it, and for the next time.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if torch.cuda.is_available():
        return _of_shape(name, torch.device("cuda"))
    if not folder.exists():
        made = _smollm2() if name == SMOLLM2 else _of_shape(name, torch.device("cpu"))
        made.model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a mapped file becomes resident when it is read
    return Loaded(model, AutoTokenizer.from_pretrained(folder, padding_side="left"))


def texts(tokenizer, length: int, count: int) -> list[str]:
    """`count` texts of random words, each of `length` tokens."""
    every = sorted(word for word in tokenizer.get_vocab() if WORD.fullmatch(word))
    spaced = [word[1:] for word in every if word.startswith("Ġ")]
    words = spaced or every
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (count, length), generator=draw).tolist()
    found = ["".join(f" {words[i]}" for i in row) for row in chosen]
    lengths = {len(ids) for ids in tokenizer(found)["input_ids"]}
    if lengths != {length}:
        raise RuntimeError(f"texts of {lengths} tokens, expected {length}")
    return found


def _of_shape(name: str, device: torch.device) -> Loaded:
    from transformers import AutoModelForCausalLM

    shape = _tiny_shape() if name == TINY else model_shape(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.to_config(), dtype=dtype)
    tokenizer = _word_tokenizer(shape.vocab_size)
    _end_with(model, tokenizer)
    return Loaded(model, tokenizer)


def _smollm2() -> Loaded:
    from powerflow_fast.models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    tokenizer.chat_template = None
    tokenizer.eos_token = END
    _end_with(model, tokenizer)
    return Loaded(model, tokenizer)


def _tiny_shape() -> ModelShape:
    (case,) = training_step.cases(torch.device("cpu"), 0, tiny=True)
    return replace(case.shape, vocab_size=VOCABULARY)


def _word_tokenizer(vocabulary: int):
    """Each word of a text is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", padding_side="left")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _end_with(model, tokenizer) -> None:
    """The tokenizer's end token is the model's only one."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
