"""Which layout a model's rows take, decided once by a trial on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from powerflow_fast.models.lm_head import TOKENS, modes_kept, trial_ids
from powerflow_fast.models.packed_attention import accept_packed_rows
from powerflow_fast.models.packing import Layout, lay_out
from powerflow_fast.models.parameters import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED_PROMPT = ("auto", "on", "off")  # the option of trainers
ATTENTION = {"full_attention", "sliding_attention"}  # layer types whose masks are known here
# Tokens times parameters of a layer, below which launching kernels takes longer than running them:
# segments launch more. H200, 1B and 8B shapes with LoRA (benchmarks/README.md, GPUs): 0.75 to 0.87x
# at 5.6e11 and below, 1.2 to 2.4x at 6.2e11 and above.
HOST_BOUND = 6e11
LEAK = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative; what comes in through a wrong mask
LEAK_HALF = 0.05  # rounding of bf16 stays far below, a leak far above


@dataclass(frozen=True)
class LayoutChoice:
    """The layout of a model's micro-batches."""

    best: Layout  # that the model can do, of those that were asked for
    plain: Layout = "padded"  # where the best does not pay
    least_tokens: float = 0  # of a micro-batch on a GPU, from which the best pays
    reason: str = ""  # where "auto" came to nothing

    def of(self, *ids: Tensor) -> Layout:
        """The layout of a micro-batch whose columns are in one tensor [B, W] or several."""
        few = sum(part.numel() for part in ids) < self.least_tokens
        return self.plain if few and ids[0].is_cuda else self.best


def choose_layout(
    model: PreTrainedModel, shared_prompt: str, padding_free: bool = False
) -> LayoutChoice:
    """Try what `model` can do.

    Args:
        model: the transformers model, unwrapped.
        shared_prompt: "on", "off", or "auto" for "on" where the model can and it pays.
        padding_free: compute real tokens only, also where prompts are not shared.

    Raises:
        ValueError: for a model that cannot do what is "on".
    """
    plain: Layout = "packed" if padding_free else "padded"
    reason = ""
    if shared_prompt != "off":
        try:
            check_packing(model, "shared")
        except ValueError as error:
            if shared_prompt == "on":
                raise ValueError(f"shared_prompt: {error}; leave it 'auto'") from error
            reason = f"shared_prompt: each completion computes its prompt: {error}"
        else:
            least = least_tokens(model) if shared_prompt == "auto" else 0
            return LayoutChoice("shared", plain, least)
    if padding_free:
        try:
            check_packing(model, "packed")
        except ValueError as error:
            raise ValueError(f"padding_free: {error}; leave it off") from error
    return LayoutChoice(plain, plain, reason=reason)


def least_tokens(model: PreTrainedModel) -> float:
    """Tokens of a micro-batch from which a GPU, not its host, sets the time of a step."""
    layers = model.config.get_text_config().num_hidden_layers
    parameters = model.num_parameters(exclude_embeddings=True)
    return HOST_BOUND * layers / parameters if parameters else 0.0  # ZeRO-3 hides them: many


def check_shared(model: PreTrainedModel) -> None:
    """`check_packing` for "shared", once for a model and its attention function."""
    if _sharing.get(model) != model.config._attn_implementation:
        check_packing(model, "shared")


_sharing: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def check_packing(model: PreTrainedModel, layout: Layout) -> None:
    """ValueError where `layout` would give `model` other states than a row for each sequence.

    A model whose parameters are sharded already (ZeRO-3) is judged by its configuration alone, as a
    trial would need a gather; its first pass then raises where a layer does not take part.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    if layout == "shared":
        others = sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
        if others:
            raise ValueError(f"{name} has layers of type {', '.join(others)}")
        capacity = [k for k, v in config.to_dict().items() if "capacity" in k and v is not None]
        if capacity:
            raise ValueError(f"{name} drops tokens by how many there are ({', '.join(capacity)})")
    before = model.config._attn_implementation
    accept_packed_rows(model)
    try:
        if not is_sharded(model):
            _try(model, layout)
    except Exception as error:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
        if isinstance(error, ValueError):
            raise
        line = str(error).partition("\n")[0]
        raise ValueError(f"{name} takes no packed rows ({type(error).__name__}: {line})") from error
    if layout == "shared":
        _sharing[model] = model.config._attn_implementation


def _try(model: PreTrainedModel, layout: Layout) -> None:
    """Two completions of one prompt and one of another, padded and packed."""
    ids, prompt = trial_ids(model, rows=3), TOKENS // 2
    ids[1, :prompt] = ids[0, :prompt]
    prompts = torch.full((len(ids),), prompt)

    def states(layout: Layout) -> Tensor:
        rows = lay_out(ids, torch.ones_like(ids), prompts, layout)
        return rows.first_states(rows.hidden_states(model), TOKENS).float()

    with modes_kept(model), torch.no_grad():
        model.eval()
        expected, got = states("padded"), states(layout)
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not error < LEAK.get(model.dtype, LEAK_HALF):
        raise ValueError(
            f"in {type(model).__name__} packed sequences influence each other (relative difference "
            f"{error:.2g})"
        )
