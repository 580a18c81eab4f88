"""`pytest benchmarks/`: device, and the results file that the README's figures come from."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "trl", "transformers", "liger-kernel", "cut-cross-entropy")
_rows: list[dict] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-results", action="store_true", help="write benchmarks/results/")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record():
    """Call with a row (a dict) to have it written to the results file."""
    return _rows.append


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found.group(1) if found else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name.strip()}, {capability}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not _rows or not session.config.getoption("--write-results"):
        return
    name = device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    head = {
        "format": FORMAT,
        "device": name,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
    }
    text = json.dumps({**head, "rows": _rows}, indent=1)
    (RESULTS / f"head-{slug}.json").write_text(text + "\n")
