"""The command `powerflow-fast info`: versions, devices and the back end in use."""

from __future__ import annotations

import argparse


def add_info(commands: argparse._SubParsersAction) -> None:
    """`info` has no options."""
    info = commands.add_parser("info", help="versions, devices and the back end in use")
    info.set_defaults(run=_info)


def _info(_: argparse.Namespace) -> int:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from powerflow_fast import __version__
    from powerflow_fast.logprobs.choice import choose_backend

    print(f"powerflow-fast {__version__}, Python {platform.python_version()}")
    for name in ("torch", "triton", "transformers", "trl", "peft", "accelerate", "vllm"):
        try:
            print(f"{name:<14} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<14} not installed")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        backend, reason = choose_backend("auto", device)
        print(f"{device!s:<14} {name}: back end {backend} ({reason})")
    return 0
