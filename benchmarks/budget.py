"""A time budget for a pytest run: what would start after it is skipped, and the end says what.

python -m pytest -p benchmarks.budget --budget 200 tests/kernels
"""

from __future__ import annotations

import time

import pytest


class Budget:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.start = time.monotonic()
        self.dropped: list[str] = []

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.monotonic() - self.start > self.seconds:
            self.dropped.append(item.nodeid)
            pytest.skip(f"dropped: the time budget of {self.seconds:g} s is spent")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.dropped:
            terminalreporter.section(f"dropped: {len(self.dropped)} after {self.seconds:g} s")
            for name in self.dropped:
                terminalreporter.line(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--budget", type=float, default=float("inf"), help="seconds after which cases are dropped"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(config.getoption("--budget")), "budget")
