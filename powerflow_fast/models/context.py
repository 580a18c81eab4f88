"""How long the sequences of a run may be, by what a model's positions reach."""

from __future__ import annotations

from typing import Any


class Context:
    """The context of a model, against which the sequences of a run are checked one by one.

    Args:
        config: a model's configuration.
        limit: a further limit in tokens, the sampler's for one.
    """

    def __init__(self, config: Any, limit: int | None = None) -> None:
        text = config.get_text_config()
        limits = (getattr(text, "max_position_embeddings", None), limit)
        self.limit = min((n for n in limits if n and n > 0), default=None)  # XLNet: -1, for none
        self.switch = _switch(text)
        self._first: tuple[str, bool] | None = None  # sequence, and on which side of the switch

    def check(self, name: str, tokens: int, more: int = 0, advice: str = "") -> None:
        """Whether the model takes a sequence, `name`, of `tokens` tokens to which `more` may come.

        LongRoPE takes other positions for a whole batch as soon as one of its rows passes a length:
        rows would be scored by another distribution than they were drawn from. So all sequences of
        a run must lie on one side of that length.

        Raises:
            ValueError: for one that is too long, or on the other side; it ends with `advice`.
        """
        size = f"{name} has {tokens} tokens" + (f", and up to {more} to come" if more else "")
        if self.limit is not None and tokens + more > self.limit:
            raise ValueError(f"{size}: beyond the context of {self.limit}{advice}")
        if self.switch is None:
            return
        long = tokens > self.switch
        other, side = self._first = self._first or (name, long)
        if long == (tokens + more > self.switch) == side:
            return
        against = "" if other == name else f", unlike {other},"
        raise ValueError(
            f"{size}: it passes{against} {self.switch}, beyond which the model takes other "
            "positions for a whole batch (LongRoPE), so rows would be scored otherwise than they "
            f"were drawn; keep all sequences within that, or all prompts beyond{advice}"
        )


def _switch(text: Any) -> int | None:
    """The length beyond which a model of this configuration takes other positions."""
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope":
            return kind.get("original_max_position_embeddings")
    return None
