"""The head as registered operators: what autograd, torch.compile and fake tensors see.

Two routes to the gradient:

* exact: only `hidden` needs a gradient, and d loss / d hidden_n is upstream_n times a direction
  that the forward pass already knows. The forward saves it, [N, H], and the backward scales rows.
* d loss / d logits: weight, bias or entropy need gradients. The backward forms them tile by tile:
  of the first rows from the softmax numerators that the forward saved (softmax_cache.py), of the
  others, or where the entropy has a gradient, from logits that it recomputes with the saved
  log-sum-exp. Where a tolerance allows it (torch_sparse.py), the gradient of hidden is the
  direction's, and those of weight and bias take the kept columns alone.

Operator schemas hold tensors and scalars only, so HeadOptions travels as a string and an absent
output is an empty tensor.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from powerflow_fast.logprobs import vocab_parallel
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import Numerators, new_numerators
from powerflow_fast.logprobs.torch_sparse import exact_certificate, num_blocks


def backend_module(options: HeadOptions, hidden: Tensor) -> ModuleType:
    """The module that computes for these hidden states."""
    name, _ = choose_backend(options.backend, hidden.device, hidden.dtype)
    if name == "triton":
        from powerflow_fast.logprobs import triton_backend

        return triton_backend
    from powerflow_fast.logprobs import torch_backend

    return torch_backend


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """(name, reason) of the back end that `backend` means; "auto" is triton on a GPU."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "auto":
        return _automatic(device, dtype)
    if backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(
            f"backend: 'triton' needs a CUDA or ROCm device, got tensors on {device}; "
            "use backend='auto' (or TRITON_INTERPRET=1 to run the kernels in the interpreter)"
        )
    return backend, "asked for"


def _automatic(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    from importlib.util import find_spec

    if device.type != "cuda":
        return "torch", f"no Triton kernels for device type {device.type!r}"
    if dtype == torch.float64:
        return "torch", "the kernels have no float64"
    if find_spec("triton") is None:
        return "torch", "triton is not installed"
    from powerflow_fast.kernels.config import compilers_name, table_row

    try:
        table_row(compilers_name(device))
    except ValueError as refusal:
        return "torch", str(refusal)
    return "triton", "a GPU, and triton is installed"


# Dynamo cannot trace it, nor has to. This is what torch.compiler.assume_constant_result sets, which
# would import Dynamo with this module.
_automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("powerflow_fast::head_forward", mutates_args=())
def head_forward(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    ref_hidden: Tensor | None,  # [N, H]
    ref_weight: Tensor | None,  # [V, H]; None shares weight
    ref_bias: Tensor | None,  # [V]
    options: str,
    want_direction: bool,
    want_kept: bool,
    want_numerators: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logps, ref_logps, entropy, lse, each [N], direction [N, H], certificate [3], kept, and the
    three tensors of Numerators.

    kept is bool [blocks, V], see torch_sparse.py; the certificate of an exact route is (1, 0, 0).
    What is not wanted is empty.
    """
    opts = HeadOptions.decode(options)
    backend = backend_module(opts, hidden)
    weight, ref_weight = (_operand(backend, hidden, x) for x in (weight, ref_weight))
    ref = None
    if ref_hidden is not None:
        ref = (ref_hidden, weight if ref_weight is None else ref_weight, ref_bias)
    layout = backend.numerators_layout(hidden.device)
    numerators = new_numerators(hidden, weight, layout, want_numerators)
    with torch.autocast(hidden.device.type, enabled=False):
        if opts.group_name is None:
            to_fill = numerators if want_numerators else None
            arguments = (hidden, weight, bias, targets, ref, opts, want_direction, to_fill)
            out = backend.forward(*arguments, want_kept)
        else:
            out = vocab_parallel.forward(
                backend, hidden, weight, bias, targets, ref, opts, want_direction
            )
    counted = targets != opts.ignore_index
    empty = out.logps.new_empty(0)
    kept = torch.empty(0, dtype=torch.bool, device=hidden.device)
    if want_kept:
        kept = torch.ones(_kept_shape(hidden, weight), dtype=torch.bool, device=hidden.device)
        if out.kept is not None:
            kept[: len(out.kept)] = out.kept
    return (
        out.logps.where(counted, 0.0),
        empty if out.ref_logps is None else out.ref_logps.where(counted, 0.0),
        empty.clone() if out.entropy is None else out.entropy.where(counted, 0.0),
        out.lse,
        empty.clone() if out.direction is None else out.direction,
        exact_certificate(0, 1, out.logps) if out.certificate is None else out.certificate,
        kept,
        *numerators,
    )


def _operand(backend: ModuleType, hidden: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weight in its own type if the back end takes it so, else in hidden's, for one call."""
    if weight is None or backend.CONVERTS_TILES:
        return weight
    return weight.to(hidden.dtype)


def _kept_shape(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    return num_blocks(hidden.shape[0]), weight.shape[0]


@head_forward.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    ref_hidden,
    ref_weight,
    ref_bias,
    options,
    want_direction,
    want_kept,
    want_numerators,
):
    opts = HeadOptions.decode(options)
    backend = backend_module(opts, hidden)
    layout = backend.numerators_layout(hidden.device)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n = hidden.shape[0]
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(0 if ref_hidden is None else n, dtype=dtype),
        hidden.new_empty(n if opts.entropy else 0, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(
            hidden.shape if want_direction else 0,
            dtype=backend.direction_dtype(hidden, opts) if want_direction else dtype,
        ),
        hidden.new_empty(3, dtype=dtype),
        hidden.new_empty(_kept_shape(hidden, weight) if want_kept else 0, dtype=torch.bool),
        *new_numerators(hidden, weight, layout, want_numerators),
    )


@torch.library.custom_op("powerflow_fast::head_backward", mutates_args=())
def head_backward(
    grad_logps: Tensor,  # [N], 0 on ignored rows
    grad_entropy: Tensor | None,  # [N], likewise
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    targets: Tensor,  # [N] int64
    lse: Tensor,  # [N]
    entropy: Tensor | None,  # [N]
    kept: Tensor | None,  # [blocks, V] bool
    values: Tensor | None,  # [rows, columns] of Numerators, as are the next two
    factors: Tensor | None,  # [pieces, rows]
    own: Tensor | None,  # [rows]
    logps: Tensor,  # [N]
    options: str,
    needs: list[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    opts = HeadOptions.decode(options)
    backend = backend_module(opts, hidden)
    dtype, weight = weight.dtype, _operand(backend, hidden, weight)
    head = (hidden, weight, bias, targets, logps, lse, entropy)
    arguments = (grad_logps, grad_entropy, *head, opts, needs)
    with torch.autocast(hidden.device.type, enabled=False):
        if opts.group_name is None:
            numerators = None if values is None else Numerators(values, factors, own)
            grads = backend.backward(*arguments, kept, numerators)
        else:
            grads = vocab_parallel.backward(backend, *arguments)
    grad_hidden, grad_weight, grad_bias = (
        hidden.new_empty(0) if grad is None else grad for grad in grads
    )
    grad_weight = grad_weight.to(dtype) if needs[1] else grad_weight
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


@head_backward.register_fake
def _(
    grad_logps,
    grad_entropy,
    hidden,
    weight,
    bias,
    targets,
    lse,
    entropy,
    kept,
    values,
    factors,
    own,
    logps,
    options,
    needs,
):
    inputs = (hidden, weight, bias)
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip(inputs, needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, _, _, _, options, *wants = inputs
    logps, ref_logps, entropy, lse, direction, certificate, kept, *numerators = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ref_logps, lse, direction, certificate, kept, *numerators)
    ctx.options = options
    ctx.want_direction, ctx.want_kept, ctx.want_numerators = wants
    ctx.hidden_dtype = hidden.dtype
    opts = HeadOptions.decode(options)
    through_entropy = opts.entropy and not opts.detach_entropy
    if opts.detach_entropy:
        ctx.mark_non_differentiable(entropy)
    ctx.recomputes = ctx.want_kept or not ctx.want_direction or through_entropy
    recompute = (hidden, weight, bias, logps, lse, entropy, kept, *numerators)
    ctx.save_for_backward(targets, direction, *(recompute if ctx.recomputes else ()))


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient of the head that is asked for with a graph: using that graph is an error."""

    @staticmethod
    def forward(ctx, gradient: Tensor, grad_logps: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "linear_logprobs: expected one backward pass, got a second derivative, which the fused "
            "head does not form; leave create_graph off, or use a head in plain PyTorch"
        )


def _backward(ctx, grad_logps, _grad_ref, grad_entropy, *_):
    nothing = (None,) * 11
    options = HeadOptions.decode(ctx.options)
    grad_entropy = grad_entropy if options.entropy and not options.detach_entropy else None
    if grad_logps is None and grad_entropy is None:
        return nothing
    targets, direction, *saved = ctx.saved_tensors
    # The direction is that of logps; an entropy that is only read leaves it to be.
    use_direction = ctx.want_direction and grad_entropy is None

    def counted_only(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.where(targets != options.ignore_index, 0.0)

    if grad_logps is None:
        grad_logps = torch.zeros(targets.shape, dtype=grad_entropy.dtype, device=targets.device)
    grad_logps = counted_only(grad_logps)
    needs = list(ctx.needs_input_grad[:3])
    grads = [None, None, None]
    if use_direction and needs[0]:
        grads[0], needs[0] = torch.empty_like(direction, dtype=ctx.hidden_dtype), False
        # Cast as it is written, which keeps no graph.
        torch.mul(direction, grad_logps.detach()[:, None], out=grads[0])
        if torch.is_grad_enabled() and grad_logps.requires_grad:
            grads[0] = _OnceDifferentiable.apply(grads[0], grad_logps)
    if any(needs):
        hidden, weight, bias, logps, lse, entropy, kept, *numerators = saved
        if not ctx.want_numerators or grad_entropy is not None:
            numerators = (None, None, None)
        recomputed = head_backward(
            grad_logps,
            counted_only(grad_entropy),
            hidden,
            weight,
            bias,
            targets,
            lse,
            entropy if options.entropy else None,
            kept if ctx.want_kept and use_direction else None,
            *numerators,
            logps,
            ctx.options,
            needs,
        )
        grads = [
            new if need else old for new, need, old in zip(recomputed, needs, grads, strict=True)
        ]
    return *grads, *nothing[3:]


head_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("powerflow_fast::sequence_residual", mutates_args=())
def sequence_residual(
    logps: Tensor,  # [N] float32
    ref_logps: Tensor,  # [N] float32
    starts: Tensor,  # [S] int32
    ends: Tensor,  # [S] int32
    mask: Tensor | None,  # [N] bool
    alpha: Tensor,  # [S] float32
    psi: Tensor,  # [S] float32
    balance: str,
) -> tuple[Tensor, Tensor]:
    """The Triton epilogue: l_pi - alpha (l_ref + psi) and counted tokens of each sequence, [S]."""
    from powerflow_fast.logprobs import triton_backend

    delta0, _, _, lengths = triton_backend.sequence_residual_forward(
        logps, ref_logps, starts, ends, mask, alpha, psi, balance
    )
    return delta0, lengths


@sequence_residual.register_fake
def _(logps, ref_logps, starts, ends, mask, alpha, psi, balance):
    return torch.empty_like(alpha), torch.empty_like(starts)


@torch.library.custom_op("powerflow_fast::sequence_residual_backward", mutates_args=())
def sequence_residual_backward(
    grad_delta0: Tensor,  # [S]
    lengths: Tensor,  # [S] int32
    starts: Tensor,  # [S] int32
    ends: Tensor,  # [S] int32
    mask: Tensor | None,  # [N] bool
    num_tokens: int,
    balance: str,
) -> Tensor:  # [N]
    """The coefficient of every token; 0 where it does not count."""
    from powerflow_fast.logprobs import triton_backend

    return triton_backend.sequence_residual_backward(
        grad_delta0, lengths, starts, ends, mask, num_tokens, balance
    )


@sequence_residual_backward.register_fake
def _(grad_delta0, lengths, starts, ends, mask, num_tokens, balance):
    return grad_delta0.new_empty(num_tokens)


def _residual_context(ctx, inputs, output):
    logps, _, starts, ends, mask, _, _, ctx.balance = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.num_tokens = len(logps)
    ctx.save_for_backward(output[1], starts, ends, mask)


def _residual_backward(ctx, grad_delta0, _grad_lengths):
    lengths, starts, ends, mask = ctx.saved_tensors
    grad = sequence_residual_backward(
        grad_delta0, lengths, starts, ends, mask, ctx.num_tokens, ctx.balance
    )
    return grad, *(None,) * 7


sequence_residual.register_autograd(_residual_backward, setup_context=_residual_context)
