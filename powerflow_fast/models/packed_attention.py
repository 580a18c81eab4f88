"""Attention over packed rows, through transformers' own registry of attention functions.

A packed row holds segments of several sequences one behind the other. A segment sees itself and, if
it has one, its prefix: the prompt that it shares with other segments. The model hands `Segments`
down to its attention function as the keyword PACKED. The function registered there is replaced by
one that reads the keyword, and without it does what it did. No model is patched.

flash-attention takes segments as they are, with the keys of the prefix gathered before a segment's
own, and so does PyTorch's `varlen_attn`, on a GPU in place of SDPA and FlexAttention. Any other
function is called for the segments of one prefix at a time, padded to the longest, with a mask
[queries, keys] of one segment.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "packed_segments"
EAGER = "eager_packed"  # "eager" itself cannot be registered: each model brings its own
EAGER_FUNCTION = "eager_attention_forward"  # its name in every family's file
MASKED = ("sdpa", "flex_attention")  # functions that take who is seen as a mask
SPECIAL = "softcap, s_aux (sinks) or position_bias"
VARLEN_OFFSETS = ("cu_seq_q", "cu_seq_k", "max_q", "max_k")  # its names for `Segments.offsets`
LONGEST_VARLEN_HEAD = 256  # dimensions of a head that varlen_attn takes
Tensors = tuple[Tensor, Tensor, Tensor]  # query, key, value: [1, heads, L, D]


class Block(NamedTuple):
    """Segments side by side in the row that have one prefix, or none."""

    start: int  # of the first
    lengths: tuple[int, ...]
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Segments:
    """Who sees whom in a packed row [1, L]; the blocks cover the row in order."""

    blocks: tuple[Block, ...]
    keys: Tensor | None  # [K] place of each segment's keys, prefix first; None: the row as it is
    cu_seq_lens_q: Tensor  # [S + 1] int32: the segments
    cu_seq_lens_k: Tensor  # [S + 1] int32: their keys
    max_length_q: int
    max_length_k: int
    # The modules that attended in this pass, each with its sliding window.
    windows: dict[nn.Module, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, blocks: tuple[Block, ...], device: torch.device) -> Segments:
        queries, keys, shared = [0], [0], any(block.prefix_length for block in blocks)
        places = []
        for block in blocks:
            prefix = torch.arange(block.prefix_start, block.prefix_start + block.prefix_length)
            for length in block.lengths:
                places += [prefix, torch.arange(queries[-1], queries[-1] + length)]
                queries.append(queries[-1] + length)
                keys.append(keys[-1] + block.prefix_length + length)
        q, k = (torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
        return cls(
            blocks,
            torch.cat(places).to(device) if shared else None,
            cu_seq_lens_q=q.to(device),
            cu_seq_lens_k=k.to(device),
            max_length_q=int(q.diff().max()) if len(q) > 1 else 0,
            max_length_k=int(k.diff().max()) if len(k) > 1 else 0,
        )

    def to(self, device: torch.device, **options: Any) -> Segments:
        """On `device`: a model split over several hands each its inputs."""
        return replace(
            self,
            keys=None if self.keys is None else self.keys.to(device, **options),
            cu_seq_lens_q=self.cu_seq_lens_q.to(device, **options),
            cu_seq_lens_k=self.cu_seq_lens_k.to(device, **options),
        )

    @property
    def offsets(self) -> dict[str, Any]:
        """As flash-attention and linear attention in transformers take them."""
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return {name: getattr(self, name) for name in names}


def accept_packed_rows(model: PreTrainedModel) -> None:
    """Let the attention of `model` take packed rows from now on; what it did before, it does still.

    Raises:
        ValueError: for an attention function that cannot.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config.get_text_config()._attn_implementation
    family = sys.modules[type(model).__module__]
    if name == EAGER:
        return
    if name == "eager":
        if not hasattr(family, EAGER_FUNCTION):
            raise ValueError(f"{type(model).__name__} does not attend by transformers' registry")
        AttentionInterface.register(EAGER, functools.partial(_attend, EAGER, None))
        AttentionMaskInterface.register(EAGER, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
        model.set_attn_implementation(EAGER)
        return
    if name is None or not (name in MASKED or "flash" in name):
        raise ValueError(f"attn_implementation={name!r} takes no packed rows")
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise ValueError(f"attn_implementation={name!r} is not registered with transformers")
    original = ALL_ATTENTION_FUNCTIONS[name]
    if getattr(original, "func", None) is not _attend:
        AttentionInterface.register(name, functools.partial(_attend, name, original))


def check_layers(model: PreTrainedModel, segments: Segments) -> None:
    """ValueError where, in the pass just done, a layer did not attend by the segments, or hid its
    window from them: the states are then wrong."""
    config, name = model.config.get_text_config(), type(model).__name__
    count, attended = config.num_hidden_layers, len(segments.windows)
    if attended != count:
        raise ValueError(
            f"{name} has {count} layers, of which {attended} attend by transformers' registry"
        )
    types = getattr(config, "layer_types", None)
    slides = bool(getattr(config, "sliding_window", None))
    for place, window in enumerate(segments.windows.values()):
        sliding = types[place] == "sliding_attention" if types else slides
        if sliding and window is None:
            raise ValueError(f"{name}: layer {place} does not say how far its window reaches")


def _attend(
    name: str,
    original: Callable | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: [B, heads, L, D] to [B, L, heads, D]."""
    if original is None:
        original = getattr(sys.modules[type(module).__module__], EAGER_FUNCTION)
    segments = options.pop(PACKED, None)
    if segments is None:
        return original(module, query, key, value, attention_mask, **options)
    if name == "flex_attention":  # its masks are compiled for each length; SDPA gives the same
        if not _is_plain(options):
            raise ValueError(f"attn_implementation={name!r} with {SPECIAL} takes no packed rows")
        from transformers.integrations.sdpa_attention import sdpa_attention_forward as original
    call = functools.partial(original, module, **options)
    return _attend_packed(name, call, module, (query, key, value), segments, options), None


@torch.compiler.disable  # lengths differ in every micro-batch
def _attend_packed(
    name: str,
    call: Callable,
    module: nn.Module,
    tensors: Tensors,
    segments: Segments,
    options: dict[str, Any],
) -> Tensor:
    """[1, L, heads, D] of queries, keys and values; `call` is the function without segments."""
    window = segments.windows[module] = options.get("sliding_window")
    if "flash" in name:
        return _flash(call, tensors, segments)
    if name in MASKED and _is_plain(options) and _takes_varlen(tensors[0], tensors[2]):
        return _varlen(tensors, segments, options.get("scaling"), window)
    return _by_blocks(call, tensors, segments, window, additive=name == EAGER)


def _flash(call: Callable, tensors: Tensors, segments: Segments) -> Tensor:
    """[1, L, heads, D] by flash-attention, which takes segments as they are."""
    query, key, value = tensors
    key, value = _gathered(segments, key), _gathered(segments, value)
    return call(query, key, value, None, **segments.offsets)[0]


def _by_blocks(
    call: Callable, tensors: Tensors, segments: Segments, window: int | None, additive: bool
) -> Tensor:
    """[1, L, heads, D], block by block, with a mask that is added to scores or says who is seen."""
    outputs = []
    for block in segments.blocks:
        query, key, value = (_padded(x, block) for x in tensors)
        if block.prefix_length:
            key = _with_prefix(key, tensors[1], block)
            value = _with_prefix(value, tensors[2], block)
        mask = _mask(query, key, window, query.dtype if additive else None)
        outputs.append(_unpadded(call(query, key, value, mask)[0], block))
    return torch.cat(outputs, 1)


def _gathered(segments: Segments, x: Tensor) -> Tensor:
    """[1, heads, K, D], by tokens in memory, as they are."""
    if segments.keys is None:
        return x
    return x.transpose(1, 2).index_select(1, segments.keys).transpose(1, 2)


def _padded(x: Tensor, block: Block) -> Tensor:
    """[n, heads, longest, D] of the block's n segments, from the row [1, heads, L, D]."""
    part = x[:, :, block.start : block.start + sum(block.lengths)]
    count = len(block.lengths)
    if len(set(block.lengths)) == 1:
        return part[0].unflatten(1, (count, -1)).transpose(0, 1)
    rows = part[0].transpose(0, 1).split(block.lengths)
    return pad_sequence(list(rows), batch_first=True).transpose(1, 2)


def _with_prefix(own: Tensor, row: Tensor, block: Block) -> Tensor:
    prefix = row[:, :, block.prefix_start : block.prefix_start + block.prefix_length]
    return torch.cat([prefix.expand(len(own), -1, -1, -1), own], 2)


def _unpadded(x: Tensor, block: Block) -> Tensor:
    """[1, tokens, heads, D] of [n, longest, heads, D]."""
    if len(set(block.lengths)) == 1:
        return x.flatten(0, 1)[None]
    return torch.cat([row[:n] for row, n in zip(x, block.lengths, strict=True)])[None]


def _mask(q: Tensor, k: Tensor, window: int | None, additive: torch.dtype | None) -> Tensor | None:
    """[1, 1, queries, keys], the last query beside the last key; None where SDPA needs none."""
    queries, keys = q.shape[2], k.shape[2]
    windowed = window is not None and keys > window
    if additive is None and queries == keys and not windowed:
        return None
    places = torch.arange(keys, device=q.device)
    own = places[keys - queries :, None]
    seen = places <= own
    if window is not None:
        seen &= places > own - window
    if additive is not None:
        least = torch.finfo(additive).min
        seen = torch.zeros_like(seen, dtype=additive).masked_fill(~seen, least)
    return seen[None, None]


@functools.cache
def _varlen_options() -> frozenset[str]:
    """What this PyTorch's `varlen_attn` can be told; empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether softmax(q k) v is all that is asked of attention."""
    given = (options.get(name) for name in ("softcap", "s_aux", "position_bias"))
    return not options.get("dropout") and all(value is None for value in given)


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    head = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and value.shape[-1] == head <= LONGEST_VARLEN_HEAD
        and {"window_size", "scale"} <= _varlen_options()
    )


def _varlen(
    tensors: Tensors, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """[1, L, heads, D] by PyTorch's own kernel for segments."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = tensors
    groups = query.shape[1] // key.shape[1]
    key, value = (_gathered(segments, x) for x in (key, value))
    native = groups > 1 and "enable_gqa" in _varlen_options()
    if groups > 1 and not native:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    left = -1 if window is None or segments.max_length_k <= window else window - 1
    options = dict(zip(VARLEN_OFFSETS, segments.offsets.values(), strict=True))
    options |= {"scale": scale, "window_size": (left, 0)} | ({"enable_gqa": True} if native else {})
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, D]
    out: Any = varlen_attn(query, key, value, **options)
    return out[None]
