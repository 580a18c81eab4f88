"""The public API gives the same on the triton back end (interpreted without a GPU) as on torch."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from powerflow_fast import fused_linear_tb_loss, linear_logprobs
from tests.helpers.numerics import gradient_tolerance, relative_error


def inputs(device, dtype=torch.float32):
    hidden, ref_hidden = torch.randn(2, 3, 7, 32, device=device).to(dtype)
    weight = (torch.randn(75, 32, device=device) * 0.3).to(dtype)
    targets = torch.randint(0, 75, (3, 7), device=device)
    mask = torch.ones(3, 7, dtype=torch.bool, device=device)
    mask[0, 4:] = mask[2, 2:] = False
    return hidden, weight, targets, ref_hidden, mask


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_fused_loss(device, dtype, trained_head, entropy):
    hidden, weight, targets, ref_hidden, mask = inputs(device, dtype)
    bias = torch.randn(75, device=device).to(dtype)
    results = []
    for backend in ("torch", "triton"):
        x = hidden.detach().clone().requires_grad_()
        w = weight.detach().clone().requires_grad_(trained_head)
        b = bias.detach().clone().requires_grad_(trained_head)
        out = fused_linear_tb_loss(
            x,
            w,
            targets,
            ref_hidden,
            bias=b,
            mask=mask,
            log_z=torch.tensor([0.5, -0.2, 0.1], device=device),
            alpha=4.0,
            temperature=0.8,
            softcap=6.0,
            return_entropy=entropy,
            backend=backend,
        )
        loss = out.loss + (out.entropy.square().mean() if entropy else 0.0)
        loss.backward()
        grads = [leaf.grad for leaf in (x, w, b) if leaf.requires_grad]
        results.append([out.logps, out.ref_logps, out.residual, *grads])
    tolerance = 2 * gradient_tolerance(dtype)  # each side's own
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(theirs, ours) <= tolerance


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
def test_compiles_without_graph_break(device, trained_head):
    hidden, weight, targets, ref_hidden, mask = inputs(device)

    def loss(x, w):
        return fused_linear_tb_loss(
            2 * x, w, targets, ref_hidden, mask=mask, log_z=0.1, alpha=2.0, backend="triton"
        ).loss

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x = hidden.detach().clone().requires_grad_()
        function(x, weight.detach().clone().requires_grad_(trained_head)).backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) <= gradient_tolerance(torch.float32)


def test_opcheck_of_the_epilogue(device):
    from powerflow_fast.logprobs.ops import sequence_residual

    logps = torch.randn(10, device=device, requires_grad=True)
    starts = torch.tensor([0, 4], dtype=torch.int32, device=device)
    ends = torch.tensor([4, 10], dtype=torch.int32, device=device)
    ones = torch.ones(2, device=device)
    args = (logps, logps.detach() - 1, starts, ends, None, ones, 0 * ones, "length")
    torch.library.opcheck(sequence_residual, args)


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
    from powerflow_fast.logprobs.choice import choose_backend

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
    from powerflow_fast.kernels import config
    from powerflow_fast.logprobs.choice import choose_backend

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
    from powerflow_fast.logprobs.choice import choose_backend

    assert choose_backend("auto", torch.device("cpu"))[0] == "torch"
    hidden, weight, targets, _, _ = inputs("cpu")
    auto = linear_logprobs(hidden, weight, targets)
    assert torch.equal(auto, linear_logprobs(hidden, weight, targets, backend="torch"))
