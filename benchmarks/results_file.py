"""Results files: one JSON per measurement and device under benchmarks/results/."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
FOLDER = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "liger-kernel",
    "cut-cross-entropy",
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
    """The checkout's commit, with a + where the tree differs from it."""
    git = ["git", "-C", str(FOLDER.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    )
    return (head.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")


def write(measurement: str, content: dict[str, Any]) -> Path:
    """Write `content` under the device's name, with date, commit and versions; returns the path."""
    device = device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    head = {
        "format": FORMAT,
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{measurement}-{slug}.json"
    path.write_text(json.dumps({**head, **content}, indent=1) + "\n")
    return path


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
        every.append(results)
    return every
