"""Each distinct prompt of a batch computed once, when transformers samples several completions.

`generate` computes a prompt for every row that begins with it. Its first forward pass, the prefill,
is given the distinct rows here; their cache and their logits are then repeated for all rows. The
loop after it, its random numbers and the number of forward passes, which ranks of ZeRO-3 and FSDP
must agree on, are those of `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

CACHES = ("past_key_values", "cache_params")  # the keywords that transformers passes a cache by
OF_ROWS = ("attention_mask", "position_ids", "token_type_ids")  # [rows, tokens] each


@contextmanager
def prompts_once(base: PreTrainedModel) -> Iterator[None]:
    """`base.generate` computes rows with one prompt once, for the time inside.

    What it returns is the same within rounding. Where `why_each` gives a reason, or all prompts
    differ, it does as ever.
    """
    own = getattr(base, "_prefill", None)  # not a public name: a later version may have another
    if own is None:
        yield
        return

    def prefill(
        input_ids: Tensor, generation_config: GenerationConfig, inputs: dict, *args: Any, **kw: Any
    ):
        if why_each(base, generation_config, inputs, len(input_ids)) is not None:
            return own(input_ids, generation_config, inputs, *args, **kw)
        first, place = _distinct(input_ids, inputs.get("attention_mask"))
        if len(first) == len(place):
            return own(input_ids, generation_config, inputs, *args, **kw)
        few = {k: v[first] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        outputs = own(input_ids[first], generation_config, few, *args, **kw)
        _cache(inputs).reorder_cache(place)
        outputs.logits = outputs.logits[:, -1:].index_select(0, place.to(outputs.logits.device))
        return outputs

    before = vars(base).get("_prefill")
    setattr(base, "_prefill", prefill)  # noqa: B010  # for its type, a module's attribute
    try:
        yield
    finally:
        del base._prefill
        if before is not None:
            setattr(base, "_prefill", before)  # noqa: B010


def why_each(
    base: PreTrainedModel, generation_config: GenerationConfig, inputs: dict[str, Any], rows: int
) -> str | None:
    """Why `generate` computes each of `rows` prompts; None: it computes the distinct ones.

    `inputs` are the keywords of the model's first forward pass, beside its token ids.
    """
    from transformers import DynamicCache

    config, cache = base.config, _cache(inputs)
    if config.is_encoder_decoder:
        return "an encoder has computed the prompts"
    capacity = [k for k, v in config.get_text_config().to_dict().items() if "capacity" in k and v]
    if capacity:
        return f"experts drop tokens by how many there are ({', '.join(capacity)})"
    if generation_config.num_beams > 1 or getattr(generation_config, "is_assistant", False):
        return "beams and assistants share rows among themselves"
    if generation_config.return_dict_in_generate:
        return "states of every row are to be returned"  # what the prefill gives beside logits
    if not generation_config.use_cache or cache is None:
        return "no cache to repeat"
    # A static cache is laid out for its rows, compiled code relies on its place, and a quantised
    # one has parts that are not selected.
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return f"a {type(cache).__name__} that is not repeated"
    if any(getattr(layer, "keys", None) is not None for layer in cache.layers) or getattr(
        cache, "_is_user_defined", False
    ):
        return "the cache was given"
    if (own := _own_state(base)) is not None:
        return f"{own} is kept outside the cache"
    for layer in cache.layers:
        kind = type(layer)
        if not kind.__module__.startswith("transformers.cache_utils") and (
            "reorder_cache" not in vars(kind)
        ):
            return f"{kind.__name__} does not say how its rows are selected"
    for name, value in inputs.items():
        known = value is None or name in CACHES or isinstance(value, (bool, int, float, str))
        if isinstance(value, dict):  # of a vision model's encoder: empty for text alone
            known = all(part is None for part in value.values())
        if name in OF_ROWS and isinstance(value, Tensor):
            known = value.ndim == 2 and len(value) == rows
        if not known:
            return f"{name} is not known to have a row for each prompt"
    return None


def _own_state(base: PreTrainedModel) -> str | None:
    """The attribute in which a module keeps what it remembers of the rows (RecurrentGemma).

    It is None at rest, so its name must tell. A buffer or a parameter is none of them.
    """
    for where, module in base.named_modules():
        for name, value in vars(module).items():
            if ("state" in name or name == "rope_deltas") and (
                value is None or isinstance(value, Tensor)
            ):
                return f"{where}.{name}"
    return None


def _cache(inputs: dict[str, Any]) -> Any:
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def _distinct(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numbers of the first rows of their kind, and for each row the place of its kind in them."""
    whole = input_ids if mask is None else torch.cat([input_ids, mask.to(input_ids)], 1)
    found: dict[bytes, int] = {}
    first: list[int] = []
    place: list[int] = []
    for number, row in enumerate(whole.cpu().numpy()):
        kind = found.setdefault(row.tobytes(), len(found))
        if kind == len(first):
            first.append(number)
        place.append(kind)
    device = input_ids.device
    return torch.tensor(first, device=device), torch.tensor(place, device=device)
