"""The same LA-TB step on every head that a user may have: each recipe is one small function.

A head maps (hidden, weight, targets) to log-probs; `tb_loss` does the rest, so that the heads alone
differ. Each runs the reference without a gradient, as its users would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from powerflow_fast import fused_linear_tb_loss, tb_loss

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
ALPHA = 4.0


class Unavailable(Exception):
    """This peer cannot run here; the message says why."""


def powerflow_fast(inputs: Inputs) -> Tensor:
    return fused_linear_tb_loss(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.ref_hidden,
        log_z=0.0,
        alpha=ALPHA,
        cu_seqlens=inputs.cu_seqlens,
    ).loss


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits in the input's type, softmax in float32."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@cache
def compiled_naive() -> Head:
    return torch.compile(naive, dynamic=False)


def linear_cross_entropy() -> Head:
    """`torch.nn.functional.linear_cross_entropy`, chunked, torch 2.13 and newer."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable("needs torch >= 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w, t: -function(x, w, t, reduction="none", options=options)


def trl() -> Head:
    """The chunked head that TRL's trainers call by default."""
    if find_spec("trl") is None:
        raise Unavailable("trl is not installed")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda x, w, t: ChunkedLogProbFunction.apply(
        x, w, None, t, 1.0, size, None, 1.0, ("log_probs",)
    )[0]


def cut_cross_entropy(device: torch.device) -> Head:
    """CCE: its Triton kernels (exact variant) on a GPU, its compiled PyTorch elsewhere."""
    if find_spec("cut_cross_entropy") is None:
        raise Unavailable("cut-cross-entropy is not installed")
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce_exact" if device.type == "cuda" else "torch_compile"
    return lambda x, w, t: -linear_cross_entropy(x, w, t, reduction="none", impl=impl)


def heads(device: torch.device) -> dict[str, Callable[[], Head]]:
    return {
        "naive PyTorch": lambda: naive,
        "torch.compile": compiled_naive,
        "F.linear_cross_entropy": linear_cross_entropy,
        "TRL fused head": trl,
        "cut-cross-entropy": lambda: cut_cross_entropy(device),
    }


def names() -> list[str]:
    return ["powerflow-fast", *heads(torch.device("cpu"))]


def loss_function(name: str, device: torch.device) -> Callable[[Inputs], Tensor]:
    """inputs -> LA-TB loss with the head of that name; raises Unavailable or KeyError."""
    if name == "powerflow-fast":
        return powerflow_fast
    head = heads(device)[name]()

    def loss(inputs: Inputs) -> Tensor:
        logps = head(inputs.hidden, inputs.weight, inputs.targets)
        with torch.no_grad():
            ref_logps = head(inputs.ref_hidden, inputs.weight, inputs.targets)
        return tb_loss(logps, ref_logps, log_z=0.0, alpha=ALPHA, cu_seqlens=inputs.cu_seqlens).loss

    return loss


def step(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Forward and backward; returns the gradient of hidden."""
    inputs.hidden.grad = inputs.weight.grad = None
    loss(inputs).backward()
    return inputs.hidden.grad


def bare_products(inputs: Inputs) -> Callable[[], None]:
    """The three products that no route can do without, in the faster of two types.

    Chips without bf16 units multiply bf16 slower than float32; the floor is the better one.
    """
    probabilities = torch.rand(
        len(inputs.targets), len(inputs.weight), device=inputs.hidden.device
    ).to(inputs.hidden.dtype)
    tensors = [inputs.hidden, inputs.weight, inputs.ref_hidden, probabilities]
    hidden, weight, ref_hidden, p = (x.detach() for x in tensors)
    if hidden.device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        hidden, weight, ref_hidden, p = (x.float() for x in (hidden, weight, ref_hidden, p))

    def products() -> None:
        torch.mm(hidden, weight.T)
        torch.mm(ref_hidden, weight.T)
        torch.mm(p, weight)

    return products
