"""The frozen head as attention: against float64, at every edge of its tiles and threads."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from powerflow_fast import linear_logprobs, paired_linear_logprobs, reference
from powerflow_fast.logprobs import products, torch_attention, torch_backend, torch_tiles
from tests.helpers.numerics import gradient_tolerance, logps_error_bound, relative_error

KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The route of the CPUs that it is for, with tiles smaller than the inputs."""
    for module in (products, torch_attention):
        monkeypatch.setattr(module, "is_intel", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for dtype in torch_attention.TILES:
        monkeypatch.setitem(torch_attention.TILES, dtype, (8, 32))
    monkeypatch.setattr(torch_backend, "ROUNDED_TILES", ((8, 32), (8, 16)))
    monkeypatch.setattr(torch_tiles, "_ROUNDED_PASS", 100)
    monkeypatch.setattr(torch_tiles, "_CPU_TILE", (8, 32))


def draw(dtype, n=21, h=24, v=97):
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(n, h, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(v, h, generator=generator).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[3], targets[4:6] = -100, torch.tensor([v - 1, 0])
    return hidden.requires_grad_(), weight, targets, ref_hidden


def truth(hidden, weight, targets):
    leaf = hidden.detach().double().requires_grad_()
    logps, _ = reference.linear_logprobs(leaf, weight.double(), targets)
    logps.sum().backward()
    return logps.detach(), leaf.grad


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("v", [1, 2, 32, 33, 64, 65, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pair_and_gradient_against_float64(dtype, v, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    hidden, weight, targets, ref_hidden = draw(dtype, v=v)
    logps, ref_logps = paired_linear_logprobs(hidden, weight, targets, ref_hidden)
    logps.sum().backward()
    for out, states in ((logps, hidden), (ref_logps, ref_hidden)):
        expected, gradient = truth(states, weight, targets)
        assert (out - expected).abs().max() <= 4 * logps_error_bound(states.detach(), weight)
        if states is hidden:
            assert relative_error(hidden.grad, gradient) <= gradient_tolerance(dtype) or v == 1
            assert (hidden.grad[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_confident_target_keeps_its_digits(dtype):
    hidden, weight, targets, _ = draw(dtype)
    with torch.no_grad():
        hidden.copy_(0.5 * weight[targets.clamp(min=0)])
    logps = linear_logprobs(hidden, weight, targets)
    expected, _ = truth(hidden, weight, targets)
    counted = targets >= 0
    assert expected[counted].max() > -1e-3  # p near 1: log p would be 0 after a rounding of p
    error = (logps - expected)[counted] / expected[counted]
    assert error.abs().max() <= 1e-3


@pytest.mark.parametrize("scale", [{"temperature": 0.7}, {"logit_scale": -0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_and_logit_scale(dtype, scale):
    hidden, weight, targets, _ = draw(dtype)
    logps = linear_logprobs(hidden, weight, targets, **scale)
    logps.sum().backward()
    leaf = hidden.detach().double().requires_grad_()
    expected, _ = reference.linear_logprobs(leaf, weight.double(), targets, **scale)
    expected.sum().backward()
    assert (logps - expected).abs().max() <= 4 * logps_error_bound(hidden.detach(), weight)
    assert relative_error(hidden.grad, leaf.grad) <= gradient_tolerance(dtype)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_reference_of_its_own_and_strided_inputs(weight_dtype):
    hidden, weight, targets, ref_hidden = draw(torch.float32)
    ref_weight = (2 * weight).T.contiguous().T.to(weight_dtype)
    hidden = hidden.detach().T.contiguous().T.requires_grad_()
    weight = torch.cat([weight, weight], 1)[:, :24]
    logps, ref_logps = paired_linear_logprobs(hidden, weight, targets, ref_hidden, ref_weight)
    logps.sum().backward()
    expected, gradient = truth(hidden, weight, targets)
    ref_expected, _ = truth(ref_hidden, ref_weight.float(), targets)
    bound = 4 * logps_error_bound(hidden.detach(), 2 * weight)
    assert (logps - expected).abs().max() <= bound
    assert (ref_logps - ref_expected).abs().max() <= bound
    assert relative_error(hidden.grad, gradient) <= gradient_tolerance(torch.float32)


@pytest.mark.skipif(not products.has_bf16_units(torch.device("cpu")), reason="no bf16 units")
@pytest.mark.parametrize("n", [7, 21])
@pytest.mark.parametrize("scale", [{}, {"temperature": 0.7}], ids=str)
def test_rounded_logits(n, scale):
    hidden, weight, targets, ref_hidden = draw(torch.bfloat16, n=n)
    options = scale | {"round_logits": True}
    both = paired_linear_logprobs(hidden, weight, targets, ref_hidden, **options)
    both[0].sum().backward()
    leaf = hidden.detach().float().requires_grad_()
    for out, states in zip(both, (leaf, ref_hidden.float()), strict=True):
        rounded = (states @ weight.float().T).bfloat16().double() / scale.get("temperature", 1.0)
        expected = rounded.log_softmax(1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        counted = targets >= 0
        # Sums in another order: a few logits fall on the other side of a rounding.
        assert (out - expected)[counted].abs().max() <= 2**-8 * rounded.abs().max()
        assert (out - expected)[counted].abs().mean() <= 1e-3
    exact, gradient = truth(hidden, weight, targets)
    if not scale:
        assert relative_error(hidden.grad, gradient) <= 2e-2


class Operations(TorchDispatchMode):
    """Names of the operations that return as many numbers as a tile of logits has, views aside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name == KERNEL or (
            isinstance(out, torch.Tensor)
            and out.numel() >= 8 * 32
            and not function.is_view
            and name not in ("_to_copy", "empty_like", "zeros", "new_zeros", "cat")
        ):
            self.names.append(name)
        return out


@pytest.mark.parametrize("dtype,others", [(torch.bfloat16, 2), (torch.float32, 4)], ids=str)
def test_few_passes_over_a_tile(dtype, others, monkeypatch):
    """Threads meet after each: on a busy machine that, not arithmetic, is the time of a step."""
    operations, forward = Operations(), torch_backend.forward

    def counted(*args):
        with operations:
            return forward(*args)

    monkeypatch.setattr(torch_backend, "forward", counted)
    hidden, weight, targets, ref_hidden = draw(dtype, n=16, h=8, v=64)
    paired_linear_logprobs(hidden, weight, targets.clamp(min=0), ref_hidden)
    tiles = 4 * 2  # of 8 x 32 in 32 x 64, policy and reference stacked
    assert operations.names.count(KERNEL) == tiles
    assert len(operations.names) <= (1 + others) * tiles
