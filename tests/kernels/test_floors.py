"""Floors are counted from the shapes, and printed for any shape and device."""

import subprocess
import sys

import pytest

from benchmarks.kernels.floors import DEVICES, floors

N, H, V = 1024, 512, 32000


def test_certified_route_needs_two_products_and_the_kept_share():
    product = 2 * N * H * V
    by_name = {floor.kernel.strip(): floor for floor in floors(N, H, V, kept=0.1)}
    exact = by_name["statistics, two models"].flops + by_name["unit gradient"].flops
    sparse = sum(
        by_name[name].flops
        for name in ("statistics, two models", "kept probabilities", "unit gradient of kept")
    )
    assert exact == 3 * product and sparse == pytest.approx(2.2 * product)


def test_bound_follows_the_device():
    one_token = floors(1, H, V, kept=0.1)[0]
    many = floors(1 << 16, 8192, V, kept=0.1)[0]
    for device in DEVICES.values():
        assert one_token.bound(device) == "memory" and many.bound(device) == "matrix"
        assert many.seconds(device) == many.flops / device.flops


@pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--kept", "1.5"], ["--device", "x"]])
def test_bad_arguments_say_what_was_expected(arguments):
    command = [sys.executable, "-m", "benchmarks.kernels.floors", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and arguments[0] in result.stderr
