"""What no kernel can go below: operations and bytes of each, and the time they take at the least.

`python -m benchmarks.kernels.floors --tokens 16384 --hidden 4096 --vocab 131072 --device h100`

A floor is the larger of operations over the matrix unit's rate and bytes over the memory's, with
every operand read once and every result written once. The rates are the vendors' (dense bf16); what
a device really sustains is lower, and benchmarks measure it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Device(NamedTuple):
    """Vendor's figures: dense bf16 matrix rate [FLOP/s], memory bandwidth [byte/s]."""

    flops: float
    bandwidth: float


DEVICES = {
    "a100": Device(312e12, 2.04e12),  # A100 SXM 80 GB
    "h100": Device(989e12, 3.35e12),  # H100 SXM
    "h200": Device(989e12, 4.8e12),
    "b200": Device(2.25e15, 8.0e12),
    "mi300x": Device(1.307e15, 5.3e12),
}
BLOCK = 128  # rows that share one choice of columns on the certified route
TILE = 256  # columns of one row's softmax statistics


class Floor(NamedTuple):
    kernel: str
    flops: float
    bytes: float

    def seconds(self, device: Device) -> float:
        return max(self.flops / device.flops, self.bytes / device.bandwidth)

    def bound(self, device: Device) -> str:
        matrix = self.flops / device.flops > self.bytes / device.bandwidth
        return "matrix" if matrix else "memory"


def floors(n: int, h: int, v: int, kept: float, itemsize: int = 2) -> list[Floor]:
    """Each kernel over all N tokens, policy and reference sharing a frozen head.

    Args:
        n, h, v: tokens, hidden size, vocabulary.
        kept: share of the columns that the certified route keeps, in [0, 1].
        itemsize: bytes of one number of hidden and weight.
    """
    product = 2.0 * n * h * v
    states, head = float(n * h * itemsize), float(v * h * itemsize)
    statistics = 4.0 * n * (v / TILE)  # the total of each row and tile, one model
    exp_logits, unit_gradient = float(n * v * itemsize), 4.0 * n * h
    column_max = 2.0 * (n / BLOCK) * v
    pair = Floor("statistics, two models", 2 * product, 2 * states + head + 2 * statistics)
    return [
        pair,
        pair._replace(kernel="  and exp-logits", bytes=pair.bytes + exp_logits),
        pair._replace(kernel="  and candidate columns", bytes=pair.bytes + column_max),
        Floor("combine, two models", 0.0, 2 * statistics),
        Floor("unit gradient", product, exp_logits + head + unit_gradient),
        Floor("choose columns", 0.0, column_max),
        Floor("kept probabilities", kept * product, states + head + kept * exp_logits),
        Floor("unit gradient of kept", kept * product, kept * exp_logits + head + unit_gradient),
        Floor("d logits (trained head)", product, states + head + exp_logits),
        Floor("d logits of the softmax cache", 0.0, 2 * exp_logits),
    ]


def table(n: int, h: int, v: int, kept: float, name: str) -> str:
    device = DEVICES[name]
    lines = [
        f"floors on {name}, {device.flops / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e12:.2f} TB/s: "
        f"N={n}, H={h}, V={v}, bf16, {kept:.0%} of columns kept",
        f"{'kernel':28} {'TFLOP':>8} {'GB':>8} {'ms':>8}  bound by",
    ]
    for floor in floors(n, h, v, kept):
        lines.append(
            f"{floor.kernel:28} {floor.flops / 1e12:>8.2f} {floor.bytes / 1e9:>8.2f} "
            f"{floor.seconds(device) * 1e3:>8.2f}  {floor.bound(device)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="operations, bytes and least time of each kernel")
    for name, default in (("tokens", 16384), ("hidden", 4096), ("vocab", 131072)):
        parser.add_argument(f"--{name}", type=_positive, default=default)
    parser.add_argument("--kept", type=_share, default=0.1, help="share of columns kept")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    arguments = parser.parse_args()
    print(
        table(arguments.tokens, arguments.hidden, arguments.vocab, arguments.kept, arguments.device)
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text}")
    return value


if __name__ == "__main__":
    main()
