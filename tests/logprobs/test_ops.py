"""The registered operators: opcheck, and torch.compile without a graph break."""

import pytest
import torch

from powerflow_fast import fused_linear_tb_loss, linear_logprobs
from powerflow_fast.logprobs.ops import head_forward
from powerflow_fast.logprobs.options import HeadOptions
from tests.test_head import draw


def test_compiles_without_graph_break():
    hidden, weight, targets, _ = draw()

    def loss(x, w):
        return linear_logprobs(2 * x, w, targets, temperature=0.9).square().sum()

    for trained_head in (False, True):
        grads = []
        for function in (loss, torch.compile(loss, fullgraph=True)):
            x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained_head)
            function(x, w).backward()
            grads.append(x.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained_head", [False, True])
def test_opcheck(trained_head):
    hidden, weight, targets, bias = draw(bias=True)
    hidden.requires_grad_(), weight.requires_grad_(trained_head)
    route = "recompute" if trained_head else "unit_gradient"
    options = HeadOptions(entropy=trained_head, route=route).encode()
    reference = (hidden.detach(), None, bias)
    torch.library.opcheck(head_forward, (hidden, weight, bias, targets, *reference, options))


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_with_numbers_that_change_from_call_to_call(dynamic):
    """As arguments of what is compiled they are symbols, from the first or the second call on."""
    weight, hidden = torch.randn(97, 16), torch.randn(8, 16)
    targets, old_logps = torch.randint(97, (8,)), -torch.rand(8)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)

    def loss(temperature, softcap, alpha, log_z, clip_eps, ignore_index):
        return fused_linear_tb_loss(
            hidden,
            weight,
            targets,
            0.9 * hidden,
            temperature=temperature,
            softcap=softcap,
            alpha=alpha,
            log_z=log_z,
            clip_eps=clip_eps,
            ignore_index=ignore_index,
            cu_seqlens=cu_seqlens,
            old_logps=old_logps,
        ).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for numbers in (
        (1.0, 30.0, 4.0, 0.5, 0.2, -100),
        (0.7, None, 2, -3, 0.1, -1),
        (2, 9, 1, 0, 1, 5),
    ):
        torch.testing.assert_close(compiled(*numbers), loss(*numbers))


def test_compiles_once_for_calls_of_any_size():
    weight = torch.randn(97, 16)
    compilations = 0

    def count(graph, _):
        nonlocal compilations
        compilations += 1
        return graph

    def loss(hidden, ref_hidden, targets, cu_seqlens, log_z):
        out = fused_linear_tb_loss(
            hidden, weight, targets, ref_hidden, log_z=log_z, alpha=4.0, cu_seqlens=cu_seqlens
        )
        return out.loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for ends in ((3, 8), (2, 5, 12), (4, 9, 11, 20)):
        n = ends[-1]
        cu_seqlens = torch.tensor((0, *ends), dtype=torch.int32)
        others = (torch.randn(n, 16), torch.randint(97, (n,)), cu_seqlens, torch.randn(len(ends)))
        hidden = torch.randn(n, 16, requires_grad=True)
        [expected] = torch.autograd.grad(loss(hidden, *others), hidden)
        [grad] = torch.autograd.grad(compiled(hidden, *others), hidden)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-7)
    assert compilations == 1
