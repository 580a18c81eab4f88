"""Parts of a stage that end in every way a part can end."""

import os
import time

import torch

from benchmarks.peers import Unavailable


def writes(run):
    yield
    run.case("first", lambda: {"seconds": 1.0})
    run.case("second", lambda: {"seconds": 2.0})


def aborts(run):
    """As a compiler does that gives up."""
    yield
    run.case("before", lambda: {})
    os.abort()


def aborts_early(run):
    os.abort()
    yield


def hangs(run):
    yield
    run.case("before", lambda: {})
    time.sleep(1000)


def hangs_early(run):
    time.sleep(1000)
    yield


def starts_a_program(run):
    yield
    os.system("sleep 1000")


def says_that_it_began(run):
    (run.folder / "began").touch()
    yield


def waits_for_the_other(run):
    yield
    deadline = time.monotonic() + 30
    while not (run.folder / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_absent(run):
    raise Unavailable("the package is not installed")
    yield


def goes_wrong(run):
    """Each case for itself."""
    yield

    def wrong():
        raise ArithmeticError("unit gradient 1e-1 > 1e-2")

    def too_large():
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    run.case("wrong", wrong)
    run.case("too large", too_large)
    run.case("larger than memory", wrong, needs_bytes=1e18)
    run.case("after", lambda: {"error": 1e-7})
