"""Which back end computes, and the errors of one that cannot."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from powerflow_fast import linear_logprobs
from powerflow_fast.kernels import config
from powerflow_fast.logprobs.choice import choose_backend
from tests.test_head import draw


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_triton_without_a_gpu_is_refused_by_name():
    code = (
        "import torch\nfrom powerflow_fast import linear_logprobs\n"
        "try:\n"
        "    linear_logprobs(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]),"
        " backend='triton')\n"
        "except ValueError as error:\n    print(error)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout.startswith("backend: 'triton' needs a CUDA or ROCm device"), result.stderr


def test_without_a_gpu_or_the_interpreter_the_error_names_backend():
    code = """if True:
        import torch
        from powerflow_fast.kernels.operands import Head
        from powerflow_fast.logprobs import triton_backend
        from powerflow_fast.logprobs.options import HeadOptions
        x = torch.zeros(2, 8)
        try:
            triton_backend.forward(Head(x, x, None), None, torch.zeros(2).long(), HeadOptions())
        except ValueError as error:
            assert "backend" in str(error) and "cpu" in str(error)
        else:
            raise AssertionError("no error")
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((7, 5), torch.float16, "torch"),  # the kernels use bf16 and asynchronous copies
        ((8, 6), torch.bfloat16, "triton"),
        ((9, 0), torch.float64, "torch"),
        ((12, 0), torch.float32, "triton"),
    ],
)
def test_auto_on_a_gpu(capability, dtype, expected, compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    def chosen(x):
        name, _ = choose_backend("auto", torch.device("cuda"), dtype)
        return x if name == "triton" else -x

    if compiled:
        torch._dynamo.reset()
        chosen = torch.compile(chosen, fullgraph=True, backend="eager")
    assert chosen(torch.ones(1)).item() == (1 if expected == "triton" else -1)


@pytest.mark.parametrize(
    ("chip", "expected"),
    [("gfx942:sramecc+:xnack-", "triton"), ("gfx1151", "triton"), ("gfx1100", "torch")],
)
def test_auto_on_amd(chip, expected, monkeypatch):
    properties = SimpleNamespace(gcnArchName=chip)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    name, reason = choose_backend("auto", torch.device("cuda"), torch.bfloat16)
    assert name == expected
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if expected == "triton":
        assert config.chip_name(torch.device("cuda")) == chip.split(":")[0]
    else:
        assert chip in reason and "backend='torch'" in reason
        with pytest.raises(ValueError, match=chip):
            config.config_for(torch.device("cuda"), torch.float32)


def test_auto_is_torch_without_a_gpu():
    assert choose_backend("auto", torch.device("cpu"))[0] == "torch"
    hidden, weight, targets, _ = draw()
    auto = linear_logprobs(hidden, weight, targets)
    assert torch.equal(auto, linear_logprobs(hidden, weight, targets, backend="torch"))
