"""Shared set-up: without a GPU, Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from powerflow_fast.kernels import config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Triton's interpreter has small tiles of its own, so that small tests have several. What it runs
# must be right with those of a GPU too: float32's of 64 rows, and Hopper's of 128.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["interpreter", "sm_90"] if INTERPRETED else ["device"])
def tiles(request, monkeypatch):
    """Runs a test with every set of tiles that can be tried here."""
    if request.param == "sm_90":
        monkeypatch.setattr(config, "chip_name", lambda device: "sm_90")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)
