"""Padding-free forward passes: the real tokens of a batch as one row, nothing else computed.

Position ids that start again at 0 tell transformers where a sequence begins: flash-attention runs
on the sequences' offsets, other kernels get a block-diagonal mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from powerflow_fast.models.lm_head import backbone, modes_kept, positions, trial_ids
from powerflow_fast.models.parameters import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_hidden_state(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, L, H] final hidden states of ids [B, L]; 0 where mask [B, L] is 0."""
    real = mask.bool()
    inputs = {"input_ids": ids[real][None], "position_ids": positions(mask)[real][None]}
    hidden = backbone(model)(**inputs, **_offsets(real), use_cache=False).last_hidden_state
    real = real.to(hidden.device)
    return hidden.new_zeros(*real.shape, hidden.shape[-1]).masked_scatter(real[..., None], hidden)


def _offsets(real: Tensor) -> dict[str, Any]:
    """Where sequences begin, for kernels that take it: flash-attn, linear attention."""
    lengths = real.sum(1)
    cu_seq_lens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max()) if len(lengths) else 0
    lens = {f"cu_seq_lens_{side}": cu_seq_lens for side in "qk"}
    return lens | {f"max_length_{side}": longest for side in "qk"}


def check_packing(model: PreTrainedModel) -> None:
    """ValueError where packed sequences of `model` see each other (recurrent layers, say).

    A model whose parameters are sharded already (ZeRO-3) is not tried: that would need a gather.
    """
    if is_sharded(model):
        return
    ids = trial_ids(model, rows=2)
    mask = torch.ones_like(ids)
    with modes_kept(model), torch.no_grad():
        model.eval()
        packed = packed_hidden_state(model, ids, mask)[1].float()
        alone = packed_hidden_state(model, ids[1:], mask[1:])[0].float()
    error = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if not error < 0.05:  # bf16 rounding stays far below, a leak far above
        raise ValueError(
            f"padding_free: in {type(model).__name__} packed sequences influence each other "
            f"(relative difference {error:.2g}); leave it off"
        )
