"""Names that a user picks from a fixed list: groups, stages, peers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def pick(given: Iterable[str], known: Collection[str]) -> set[str]:
    """The names in texts that separate them by commas; a name may hold a comma of its own.

    ValueError, with the nearest name, where one is not known.
    """
    names, unknown = set(), []
    for text in given:
        parts = [part.strip() for part in text.split(",")]
        while parts:
            lengths = range(len(parts), 0, -1)  # the longest name first
            taken = next((n for n in lengths if ", ".join(parts[:n]) in known), 0)
            if not taken:
                unknown.append(_unknown(parts[0], known))
            names.add(", ".join(parts[: max(taken, 1)]))
            del parts[: max(taken, 1)]
    if unknown:
        raise ValueError(f"expected some of {listed(known)}; got {', '.join(unknown)}")
    return names


def listed(known: Iterable[str]) -> str:
    """Names with commas between them, in quotes where a name holds a comma."""
    return ", ".join(f'"{name}"' if "," in name else name for name in known)


def _unknown(name: str, known: Collection[str]) -> str:
    folded = {one.casefold(): one for one in known}
    near = get_close_matches(name.casefold(), folded, n=1, cutoff=0.3)
    return f"{name} (nearest: {folded[near[0]]})" if near else name or "an empty name"
