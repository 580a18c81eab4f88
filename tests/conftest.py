"""Shared set-up: without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Interpreted kernels take a GPU's tiles, too, which lead into other branches.
TILES = ("interpreter", "sm_90") if DEVICE == "cpu" else ("device",)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def use_tiles(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if chip != "device":
        from powerflow_fast.kernels import config

        monkeypatch.setattr(config, "chip_name", lambda device: chip)


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch) -> None:
    """For tests of kernels: they run once for each of TILES."""
    use_tiles(request.param, monkeypatch)


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
