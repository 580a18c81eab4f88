"""Bytes that autograd keeps in a small model, for test_plan.py: seen by hooks on saved tensors."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from powerflow_fast.model_head import base_model, last_hidden_state
from powerflow_fast.model_shapes import ModelShape

TOKENS = 24
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def kept_by_a_layer(shape: ModelShape, weights: str, rank: int, padded: bool) -> float:
    """Bytes per token that one more decoder layer keeps for its backward pass.

    Differences of batches and of layers leave out what does not grow with both: weights in another
    type, masks, what embedding and last norm keep.
    """
    kept = {
        (layers, sequences): _kept(shape, weights, rank, layers, sequences, padded)
        for layers in (1, 2)
        for sequences in (1, 3)
    }
    of_two, of_one = (kept[layers, 3] - kept[layers, 1] for layers in (2, 1))
    return (of_two - of_one) / (2 * TOKENS)


def _kept(shape, weights, rank, layers, sequences, padded) -> int:
    torch.manual_seed(0)
    config = shape.to_config(num_hidden_layers=layers, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[weights])
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    model.train()
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    storages = {}  # held, so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(1, shape.vocab_size, (sequences, TOKENS))
    mask = torch.ones_like(ids)
    mask[:, : TOKENS // 4 * padded] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "bf16"):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = last_hidden_state(base_model(model), ids, mask)
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in storages.values())
