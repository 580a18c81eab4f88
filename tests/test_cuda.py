"""What only a GPU shows: CUDA graphs, streams, a second device, no synchronisation, no [V, H]."""

import copy

import pytest
import torch

from powerflow_fast import fused_linear_tb_loss, linear_logprobs
from tests.helpers.numerics import relative_error
from tests.helpers.packed import states_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def case(device="cuda", n=256, h=128, v=5000, dtype=torch.bfloat16):
    torch.manual_seed(0)
    hidden, ref_hidden = torch.randn(2, n, h, device=device).to(dtype)
    weight = (torch.randn(v, h, device=device) * 0.3).to(dtype)
    targets = torch.randint(v, (n,), device=device)
    cu_seqlens = torch.arange(0, n + 1, 32, dtype=torch.int32, device=device)
    return hidden, weight, targets, ref_hidden, cu_seqlens


def loss_of(hidden, weight, targets, ref_hidden, cu_seqlens, **options):
    return fused_linear_tb_loss(
        hidden,
        weight,
        targets,
        ref_hidden,
        cu_seqlens=cu_seqlens,
        alpha=4.0,
        log_z="group",
        group_size=2,
        **options,
    ).loss


@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen", "trained"])
def test_captured_in_a_cuda_graph(trained_head):
    hidden, weight, *rest = case()
    hidden.requires_grad_(), weight.requires_grad_(trained_head)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels, which capture cannot
        for _ in range(3):
            loss_of(hidden, weight, *rest).backward()
    torch.cuda.current_stream().wait_stream(stream)
    hidden.grad = weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(hidden, weight, *rest)
        loss.backward()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    captured = hidden.grad.clone()
    fresh = hidden.detach().clone().requires_grad_()
    expected = loss_of(fresh, weight.detach().requires_grad_(trained_head), *rest)
    expected.backward()
    assert loss.item() == expected.item() and torch.equal(captured, fresh.grad)


@pytest.mark.parametrize("shift", [False, True])
def test_no_synchronisation(shift):
    arguments = case()
    arguments[0].requires_grad_()
    loss_of(*arguments, shift=shift).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(*arguments, shift=shift).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_do_not_disturb_each_other():
    arguments = case()
    expected = linear_logprobs(*arguments[:3])
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(linear_logprobs(*arguments[:3]))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device_while_the_first_is_current():
    hidden, weight, targets, *_ = case("cuda:1")
    logps = linear_logprobs(hidden, weight, targets)
    on_cpu = linear_logprobs(hidden.cpu().float(), weight.cpu().float(), targets.cpu())
    assert relative_error(logps.cpu(), on_cpu) <= 1e-5


def peak_bytes(hidden, *rest, **options) -> int:
    """Allocated by a step at its peak, the gradient of hidden included; the second step's."""
    for _ in range(2):
        hidden.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(hidden, *rest, **options).backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("grad_tolerance", [0.0, 1e-3])
def test_frozen_head_allocates_no_vocabulary_by_hidden(grad_tolerance):
    hidden, weight, *rest = case(n=128, h=1024, v=100_000)
    hidden.requires_grad_()
    extra = peak_bytes(hidden, weight, *rest, grad_tolerance=grad_tolerance)
    assert extra < weight.numel() * weight.element_size() / 2


@pytest.mark.parametrize(("grad_tolerance", "most"), [(0.0, 600e6), (1e-3, 150e6)])
def test_memory_beside_inputs_and_gradient(grad_tolerance, most):
    hidden, weight, targets, *rest = case(n=16384, h=4096, v=131072)
    hidden += weight[targets]  # a sharp policy: target logits are 4096 * 0.3^2 above the others
    hidden.requires_grad_()
    peak = peak_bytes(hidden, weight, targets, *rest, grad_tolerance=grad_tolerance)
    assert peak - hidden.grad.nbytes <= most


def test_two_runs_are_equal_bit_by_bit():
    grads = []
    for _ in range(2):
        hidden, weight, *rest = case(n=512, v=20_000)
        hidden.requires_grad_(), weight.requires_grad_()
        loss_of(hidden, weight, *rest).backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


SLIDING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
SHARED = {"Llama": {}, "Gemma3Text": SLIDING, "Gemma2": SLIDING}
FLASH = ("flash_attention_2", "flash_attention_4")


def packed_case():
    """Five rows of two prompts of 9 tokens: ids, mask, prompt lengths, what is scored."""
    torch.manual_seed(0)
    ids = torch.randint(1, 60, (5, 17))
    ids[1:3, :9], ids[4, :9] = ids[0, :9], ids[3, :9]
    mask = torch.ones_like(ids)
    mask[1, 14:], mask[2, 12:] = 0, 0  # padding within the window: eager attention needs a key
    return ids, mask, torch.full((5,), 9), mask[:, 9:].bool()


def built(name, dtype, head=16, **options):
    """A model on the device, and the same in float64 on the CPU."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        **dict(vocab_size=60, hidden_size=64, intermediate_size=64, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2),
        **dict(head_dim=head, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        **SHARED[name],
    )
    torch.manual_seed(0)
    make = transformers.AutoModelForCausalLM.from_config
    exact = make(copy.deepcopy(config)).double().eval()  # options are written into the config
    model = make(config, **options).to("cuda", dtype).eval()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())
    return model, exact


def assert_as_right_as_rows_apart(model, exact, dtype):
    case = packed_case()
    expected = states_and_gradients(exact, "padded", *case)
    apart, shared = (states_and_gradients(model, way, *case) for way in ("padded", "shared"))
    floor = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other, truth in zip(shared[:2], apart[:2], expected[:2], strict=True):
        assert relative_error(one, truth) < 2 * relative_error(other, truth) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHARED)
def test_a_prompt_computed_once(name, dtype):
    """In half precision by PyTorch's own kernel for segments."""
    model, exact = built(name, dtype)
    from powerflow_fast.models.packed_attention import _takes_varlen
    from powerflow_fast.models.packing_check import check_packing

    check_packing(model, "shared")
    query = torch.zeros(1, 4, 3, 16, device="cuda", dtype=dtype)
    assert _takes_varlen(query, query) is (dtype == torch.bfloat16)
    assert_as_right_as_rows_apart(model, exact, dtype)


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_a_prompt_computed_once_by_flash_attention(name, kernel):
    from powerflow_fast.models.packing_check import check_packing

    try:
        model, exact = built(name, torch.bfloat16, head=64, attn_implementation=kernel)
    except ImportError as error:
        pytest.skip(str(error).partition("\n")[0])
    check_packing(model, "shared")
    assert_as_right_as_rows_apart(model, exact, torch.bfloat16)
