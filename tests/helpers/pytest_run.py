"""pytest as a user starts it, in a fork that has imported torch already."""

import contextlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import ranks


def run(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """`pytest OPTIONS` in the repository's root; `folder` takes its output."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks.finish(1, partial(_main, folder, options), folder)
    code = int((folder / "code").read_text())
    output = ((folder / name).read_text() for name in ("log_0.txt", "stderr"))
    return subprocess.CompletedProcess(["pytest", *options], code, *output)


def _main(folder: Path, options: tuple[str, ...]) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        # pytest-benchmark would take itself for a worker of this run's xdist, and write nothing.
        del os.environ[name]
    os.chdir(ranks.ROOT)
    sys.argv[1:] = options
    with (folder / "stderr").open("w") as stderr, contextlib.redirect_stderr(stderr):
        code = pytest.main(list(options))
    (folder / "code").write_text(str(int(code)))
