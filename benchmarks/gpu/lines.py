"""The results of a run on a GPU: one line of JSON per case, appended the moment the case ends.

The first line says what ran: device, date, commit, versions, stages. Every other line has a `stage`
and a `part`, and either a `case` with its figures, or with `skipped` or `failed` and the reason; or
`compiled`, how many kernels Triton compiled meanwhile; or `ended`, how the part's process ended.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks import results_file

FORMAT = 1
Line = dict[str, Any]


def start(folder: Path, header: Line) -> Path:
    """A new file in `folder` with its first line; FileExistsError if a run is there already."""
    if found := sorted(folder.glob("gpu-*.jsonl")):
        raise FileExistsError(
            f"expected a folder without a run, {folder} holds {found[0].name}; "
            "name another folder or move the file"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{results_file.slug(header['device'])}.jsonl"
    append(path, {"format": FORMAT, **header})
    return path


def append(path: Path, line: Line) -> None:
    """One write to the end of the file: a line is there whole or not at all."""
    data = (json.dumps(line) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[Line, list[Line]]:
    """The first line and the others; a last line that a crash of the machine cut is left out."""
    texts = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, text in enumerate(texts, 1):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            if number < len(texts):
                raise ValueError(f"{path.name}: line {number} is not JSON") from None
    if not found or found[0].get("format") != FORMAT:
        got = found[0].get("format") if found else "an empty file"
        raise ValueError(f"{path.name}: expected lines of format {FORMAT}, got {got!r}")
    return found[0], found[1:]


def load(folder: Path | None = None) -> list[tuple[Line, list[Line]]]:
    """Every device's run in the folder of results, in order of device."""
    folder = results_file.FOLDER if folder is None else folder
    return [read(path) for path in sorted(folder.glob("gpu-*.jsonl"))]
