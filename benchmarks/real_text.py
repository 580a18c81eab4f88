"""Hidden states and head of a real model on text that it wrote: what benchmarks should be fed.

Random inputs have flat next-token distributions; a language model's are sharp at most positions and
flat at a few. SmolLM2-135M-Instruct writes to open prompts at a given temperature, and its last
hidden states predict that text. Kept in benchmarks/.cache/, since it takes about a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from powerflow_fast.models.lm_head import last_hidden_state
from powerflow_fast.models.sampling import sample

CACHE = Path(__file__).parent / ".cache"
LENGTH = 64  # tokens of each completion


class RealText(NamedTuple):
    """N tokens in completions of LENGTH; the policy's logits are hidden @ weight.T."""

    hidden: Tensor  # [N, H] float32
    weight: Tensor  # [V, H] float32, the model's head
    targets: Tensor  # [N] int64, the tokens that were written


def real_text(tokens: int = 1024, temperature: float = 1.0, seed: int = 0) -> RealText:
    """`tokens` (rounded up to whole completions) sampled by SmolLM2 at `temperature`."""
    completions = -(-tokens // LENGTH)
    path = CACHE / f"smollm2-{completions}x{LENGTH}-t{temperature}-seed{seed}.pt"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(tuple(_write(completions, temperature, seed)), partial)
        partial.rename(path)
    return RealText(*torch.load(path))


@torch.no_grad()
def _write(completions: int, temperature: float, seed: int) -> RealText:
    from powerflow_fast.data.prompts import OPEN_PROMPTS, read_questions
    from powerflow_fast.models.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    # One line would end long before LENGTH tokens.
    prompts = [q.prompt.replace("one line", "an essay") for q in read_questions(OPEN_PROMPTS)]
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompts[index % len(prompts)]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for index in range(completions)
    ]
    torch.manual_seed(seed)
    inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    drawn = sample(
        model,
        inputs["input_ids"],
        inputs["attention_mask"],
        temperature=temperature,
        max_new_tokens=LENGTH,
        end_token_ids=(),
    )
    text = drawn.input_ids
    hidden = last_hidden_state(model, text, drawn.attention_mask)
    head = model.get_output_embeddings().weight
    return RealText(
        hidden[:, -LENGTH - 1 : -1].reshape(-1, hidden.shape[-1]).contiguous(),
        head.detach().clone(),
        text[:, -LENGTH:].reshape(-1),
    )
