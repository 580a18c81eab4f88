"""The same log-probs and LA-TB step on every head that a user may have: one function per peer.

A head maps (hidden [N, H], weight [V, H], targets [N]) to log-probs [N]. `Composed` puts the rest
on top of it, so that the heads alone differ: the reference runs without a gradient, as its users
run it, and `tb_loss` is the loss. A peer with several settings gets the one that is fastest here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.inputs import Inputs
from powerflow_fast import (
    fused_linear_tb_loss,
    linear_logprobs,
    paired_linear_logprobs,
    tb_loss,
)
from powerflow_fast.loss import TBOutput

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
ALPHA = 4.0


class Unavailable(Exception):
    """This peer cannot run here; the message says why."""


class Composed:
    """What a user of `head` would write."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def logps(self, inputs: Inputs) -> Tensor:
        return self.head(inputs.hidden, inputs.weight, inputs.targets)

    def pair(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ref_logps = self.head(inputs.ref_hidden, inputs.weight, inputs.targets)
        return self.logps(inputs), ref_logps

    def tb(self, inputs: Inputs) -> TBOutput:
        return tb_loss(*self.pair(inputs), **_objective(inputs))


def _objective(inputs: Inputs) -> dict:
    """log Z' is 0, or each group's own mean where the inputs have groups."""
    if inputs.group is None:
        log_z: dict = {"log_z": 0.0}
    else:
        log_z = {"log_z": "group", "group_size": inputs.group}
    return {"alpha": ALPHA, "cu_seqlens": inputs.cu_seqlens, **log_z}


class PowerflowFast(Composed):
    """Ours, through the calls made for each; `options` are further keywords."""

    def __init__(self, **options) -> None:
        super().__init__(partial(linear_logprobs, **options))
        self.options = options

    def pair(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        both = (inputs.hidden, inputs.weight, inputs.targets, inputs.ref_hidden)
        logps, ref_logps = paired_linear_logprobs(*both, **self.options)
        return logps, ref_logps

    def tb(self, inputs: Inputs) -> TBOutput:
        both = (inputs.hidden, inputs.weight, inputs.targets, inputs.ref_hidden)
        return fused_linear_tb_loss(*both, **_objective(inputs), **self.options)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N, V] logits in the input's type, softmax in float32."""
    logits = (hidden @ weight.T).float()
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@cache
def _compiled_naive() -> Head:
    return torch.compile(naive, dynamic=False)


def compiled(device: torch.device) -> dict[str, Head]:
    return {"": _compiled_naive()}


def compiled_chunks(device: torch.device) -> dict[str, Head]:
    """Chunks of rows, each compiled and recomputed in backward, so that one chunk is alive."""

    def head(rows: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        function = _compiled_naive()
        chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
        parts = [checkpoint(function, x, weight, t, use_reentrant=False) for x, t in chunks]
        return torch.cat(parts)

    return {f"{rows} rows": partial(head, rows) for rows in _chunk_rows(device)}


def _chunk_rows(device: torch.device) -> tuple[int, ...]:
    return (1024, 4096) if device.type == "cuda" else (128,)


def linear_cross_entropy(device: torch.device) -> dict[str, Head]:
    """PyTorch's own, whole or in chunks of rows.

    Its default chunk for such heads is a few rows, which reads the weight once for each: slower.
    """
    function = getattr(functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"needs torch >= 2.13, this is {torch.__version__}")

    def head(options, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -function(hidden, weight, targets, reduction="none", options=options)

    settings = {"no chunks": partial(head, None)}
    for rows in _chunk_rows(device):
        chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        settings[f"{rows} rows"] = partial(head, chunks)
    return settings


def trl(device: torch.device) -> dict[str, Head]:
    """The chunked head that TRL's trainers call, with its own chunk size and a smaller one."""
    require("trl")
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def head(columns: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        arguments = (hidden, weight, None, targets, 1.0, columns, None, 1.0, ("log_probs",))
        return ChunkedLogProbFunction.apply(*arguments)[0]

    sizes = (_CHUNKED_LOGPROB_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE // 4)
    return {f"{columns} columns": partial(head, columns) for columns in sizes}


def liger_grpo(device: torch.device) -> dict[str, Head]:
    """The log-probs of `chunked_loss`'s GRPO loss; the loss itself has no trajectory balance."""
    require("liger_kernel")
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    forward = LigerFusedLinearPPOBase.chunk_forward
    return {"": lambda hidden, weight, targets: forward(hidden[None], weight, targets[None])[0]}


def liger_cross_entropy(device: torch.device) -> dict[str, Head]:
    """Fused linear cross-entropy by token, with its own chunks of logits and larger ones.

    Without a reduction its gradients wait for backward, which forms the logits again.
    """
    if device.type != "cuda":
        raise Unavailable("its Triton kernels need a GPU")
    require("liger_kernel")
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    apply = LigerFusedLinearCrossEntropyFunction.apply
    before = (None, None, -100, 0.0, 0.0, "none")  # bias to reduction
    after = (None, False, None, False, False, False, None, None)  # softcap to the kernel's choice

    def head(factor: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -apply(hidden, weight, targets, *before, *after, factor)[0]

    return {f"logits of {factor} x [N, H]": partial(head, factor) for factor in (1, 8)}


def liger_scaled(device: torch.device) -> dict[str, Head]:
    """Fused linear scaled cross-entropy: its CuTe kernel on SM90, chunked PyTorch elsewhere.

    Without its check of the targets, which waits for the device. It forms the weight's gradient
    whether asked or not.
    """
    require("liger_kernel")
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as module

    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        require("cutlass", "nvidia-cutlass-dsl, which Liger's CuTe kernel needs on SM90,")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
    return {"": lambda hidden, weight, targets: -apply(hidden, weight, targets)}


def cce(device: torch.device, **options) -> dict[str, Head]:
    """cut-cross-entropy: Triton with its filter of small gradients or without, or compiled."""
    require("cut_cross_entropy")
    if options["impl"] == "cce" and device.type != "cuda":
        raise Unavailable("its Triton kernels need a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return {"": lambda x, w, t: -linear_cross_entropy(x, w, t, reduction="none", **options)}


def verl(device: torch.device) -> dict[str, Head]:
    """verl's Triton kernel; it forms the entropy and the weight's gradient whether asked or not."""
    if device.type != "cuda":
        raise Unavailable("its Triton kernel needs a GPU")
    require("verl")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return {"": lambda x, w, t: linear_cross_entropy(x, w, t, 1.0, "none", None)[0]}


def quack(device: torch.device) -> dict[str, Head]:
    """quack's linear cross-entropy for per-token losses: one product and its softmax kernel.

    Its chunked form reduces to a scalar inside, so a loss over sequences cannot be put on top.
    """
    if device.type != "cuda":
        raise Unavailable("its CuTe kernels need a GPU of SM90 or newer")
    require("quack", "quack-kernels")
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return {"": lambda x, w, t: -linear_cross_entropy_func(x, w, None, t, reduction="none")}


def quack_scaled_exp(device: torch.device) -> dict[str, Head]:
    """quack's chunked pipelines, which form the input's gradient in the forward pass.

    Their public function reduces to a scalar; the pipelines under it give the loss of each token
    and its gradient, and backward scales the rows. For a frozen head. The reference, which has no
    gradient, takes the path that forms the loss alone.
    """
    if device.type != "cuda":
        raise Unavailable("its CuTe kernels need a GPU of SM90 or newer")
    require("quack", "quack-kernels")
    from quack import linear_cross_entropy as module

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, targets, rows):
            supported = module.scaled_exp_lce_supported(hidden, weight, rows, "sum")
            if supported and not ctx.needs_input_grad[0]:
                return -module._scaled_exp_lce_loss_only(hidden, weight, targets, -100)
            if supported:
                pipeline = module.scaled_exp_linear_cross_entropy_fwd
            else:
                pipeline = module.chunked_linear_cross_entropy_fwd
            needs = dict(need_dx=ctx.needs_input_grad[0], need_dw=False)
            loss, grad_hidden, *_ = pipeline(hidden, weight, targets, rows, **needs)
            ctx.save_for_backward(grad_hidden)
            return -loss[: len(hidden)]

        @staticmethod
        def backward(ctx, grad):
            (grad_hidden,) = ctx.saved_tensors
            scaled = grad_hidden[: len(grad)] * -grad[:, None].to(grad_hidden.dtype)
            return scaled, None, None, None

    def head(rows: int, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if weight.requires_grad:
            raise Unavailable("its log-probs by token have no gradient for the head")
        if not torch.is_grad_enabled():
            hidden = hidden.detach()  # needs_input_grad does not know of no_grad
        return Function.apply(hidden, weight, targets, rows)

    # Not 4096: where a chunk has as many rows as hidden has columns, it cannot tell the two apart.
    return {f"{rows} rows": partial(head, rows) for rows in (4224, 2048)}


def unsloth_zoo(device: torch.device) -> dict[str, Head]:
    """unsloth-zoo's fused linear log-probs, with its own chunks of rows; on a CPU also smaller.

    On a GPU a given chunk would turn off the fastest of its routes. The module is read from its
    file: the package itself wants unsloth and patches other libraries when it is imported.
    """
    require("unsloth_zoo", "unsloth-zoo")
    # The module asks it for the free memory, and takes its own default where it is missing.
    sys.modules.setdefault("unsloth_zoo.tiled_mlp", None)  # type: ignore[arg-type]
    module = sys.modules.get("unsloth_zoo_fused_linear")
    if module is None:
        package = Path(next(iter(find_spec("unsloth_zoo").submodule_search_locations)))
        path = package / "fused_losses" / "fused_linear.py"
        if not path.exists():
            raise Unavailable("this unsloth-zoo has no fused_losses/fused_linear.py")
        spec = spec_from_file_location("unsloth_zoo_fused_linear", path)
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
    head = module.fused_linear_logprobs
    chunks = _chunk_rows(device) if device.type == "cpu" else ()
    return {"": head} | {f"{rows} rows": partial(head, rows_per_chunk=rows) for rows in chunks}


def require(module: str, package: str | None = None) -> None:
    """Raises Unavailable where the module is not installed."""
    if find_spec(module) is None:
        raise Unavailable(f"{package or module} is not installed")


@dataclass(frozen=True)
class Peer:
    heads: Callable[[torch.device], dict[str, Head]]  # by setting
    logit_bytes: int = 0  # bytes alive per [token, vocabulary] pair at the peak; 0: chunks
    approximate: bool = False  # leaves gradients out by design: its error is shown, not bounded


OURS = "powerflow-fast"
ROUNDED = "powerflow-fast, round_logits"  # on a CPU with bf16 units: what the others round, too
# The bytes are those of float32 logits, log-probs and their gradients, plus 16-bit copies.
PEERS: dict[str, Peer] = {
    OURS: Peer(lambda device: {"": linear_logprobs}),
    ROUNDED: Peer(lambda device: {"": partial(linear_logprobs, round_logits=True)}),
    "naive PyTorch": Peer(lambda device: {"": naive}, logit_bytes=14),
    "torch.compile": Peer(compiled, logit_bytes=10),
    "compiled chunks": Peer(compiled_chunks),
    "F.linear_cross_entropy": Peer(linear_cross_entropy, logit_bytes=14),
    "TRL fused head": Peer(trl),
    "Liger GRPO head": Peer(liger_grpo),
    "Liger fused CE": Peer(liger_cross_entropy),
    "Liger scaled CE": Peer(liger_scaled),
    "CCE": Peer(partial(cce, impl="cce"), approximate=True),
    "CCE exact": Peer(partial(cce, impl="cce", filter_eps=None)),
    "CCE torch_compile": Peer(partial(cce, impl="torch_compile"), logit_bytes=10),
    "verl": Peer(verl),
    "quack": Peer(quack, logit_bytes=6),
    "quack chunked": Peer(quack_scaled_exp),
    "unsloth-zoo": Peer(unsloth_zoo),
}


def methods(name: str, device: torch.device) -> dict[str, Composed]:
    """Ways to run a peer, by setting; raises Unavailable with the reason."""
    if name == ROUNDED:
        return {"": PowerflowFast(round_logits=True)}
    if name == OURS:
        tuned = device.type == "cuda" and os.environ.get("POWERFLOW_TUNE") == "1"
        return {"tuned tiles" if tuned else "": PowerflowFast()}
    return {setting: Composed(head) for setting, head in PEERS[name].heads(device).items()}
