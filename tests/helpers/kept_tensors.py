"""Bytes of a small model's tensors, for test_memory.py: kept by autograd, and at a step's peak.

Both are per token, by differences that leave out what does not grow with a batch (weights in
another type, masks) and, for a layer, with the number of layers.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from powerflow_fast.models.lm_head import base_model, last_hidden_state
from powerflow_fast.models.shapes import ModelShape

TOKENS = 24
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def kept_by_a_layer(shape: ModelShape, weights: str, rank: int, padded: bool) -> float:
    """That one more decoder layer keeps for its backward pass."""

    def kept(layers: int, sequences: int) -> int:
        model = _build(shape, weights, rank, num_hidden_layers=layers)
        own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        storages = {}  # held, so that no address is used twice

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _states(model, shape, weights, sequences, padded)
        return sum(storage.nbytes() for storage in storages.values())

    of_two, of_one = (kept(layers, 3) - kept(layers, 1) for layers in (2, 1))
    return (of_two - of_one) / (2 * TOKENS)


def peak_of_a_step(shape: ModelShape, weights: str, rank: int, checkpointing: bool) -> float:
    """At the peak of forward and backward pass, without the head's."""

    def peak(sequences: int) -> int:
        model = _build(shape, weights, rank)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        with _Live() as live:
            states = _states(model, shape, weights, sequences, padded=False)
            states.backward(torch.ones_like(states))
        return live.peak

    return (peak(16) - peak(8)) / (8 * TOKENS)  # so many that the peak is not one of weights


class _Live(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there: the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._made = 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # not a view, nor written in place
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return out


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _build(shape: ModelShape, weights: str, rank: int, **sizes):
    torch.manual_seed(0)
    config = shape.to_config(pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[weights])
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    return model.train()


def _states(model, shape: ModelShape, weights: str, sequences: int, padded: bool) -> torch.Tensor:
    """Of the last layer, as the trainer computes them: bf16 under autocast."""
    ids = torch.randint(1, shape.vocab_size, (sequences, TOKENS))
    mask = torch.ones_like(ids)
    mask[:, : TOKENS // 4 * padded] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == "bf16"):
        return last_hidden_state(base_model(model), ids, mask)
