"""`pytest benchmarks/`: the device, and rows for the results file."""

from __future__ import annotations

import pytest
import torch

from benchmarks import results_file

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


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _rows and session.config.getoption("--write-results"):
        results_file.write("head", {"rows": _rows})
