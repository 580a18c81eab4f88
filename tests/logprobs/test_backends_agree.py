"""The public API gives the same on the triton back end (interpreted without a GPU) as on torch."""

import pytest
import torch

from powerflow_fast import fused_linear_tb_loss
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
