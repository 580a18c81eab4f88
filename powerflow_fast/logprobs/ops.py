"""The head as registered operators: what autograd, torch.compile and fake tensors see.

`HeadOptions.route` says how the gradient comes about. Where the head is frozen, d loss / d hidden_n
is upstream_n times the unit gradient, which the forward pass knows already: it saves that, [N, H],
and the backward pass scales rows. Weight, bias and entropy need d loss / d logits: the backward
pass forms them tile by tile, from the cached softmax of the first rows, and from logits that it
recomputes with the saved log-sum-exp. Where a tolerance allows it (torch_sparse.py), the gradient
of hidden is the unit gradient's, and those of weight and bias take the kept columns alone.

Operator schemas hold tensors and scalars only, so HeadOptions travels as a string and an absent
output is an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerflow_fast.kernels.operands import Head
from powerflow_fast.logprobs import vocab_parallel
from powerflow_fast.logprobs.backend import Backend, Upstream
from powerflow_fast.logprobs.choice import choose_backend
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import SoftmaxCache, new_softmax_cache
from powerflow_fast.logprobs.torch_tiles import exact_sparsity, num_blocks


def _backend_for(options: HeadOptions, hidden: Tensor) -> Backend:
    """The back end that computes for these hidden states."""
    name, _ = choose_backend(options.backend, hidden.device, hidden.dtype)
    if name == "triton":
        from powerflow_fast.logprobs import triton_backend

        return triton_backend
    from powerflow_fast.logprobs import torch_backend

    return torch_backend


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logps, ref_logps, entropy, lse, each [N], unit gradient [N, H], sparsity report [3],
    kept columns [blocks, V] bool (see torch_sparse.py), and the three tensors of SoftmaxCache.

    What `options` do not ask for is empty.
    """
    opts = HeadOptions.decode(options)
    backend = _backend_for(opts, hidden)
    weight, ref_weight = (_operand(backend, hidden, x) for x in (weight, ref_weight))
    policy, reference = Head(hidden, weight, bias), None
    if ref_hidden is not None:
        reference = Head(ref_hidden, weight if ref_weight is None else ref_weight, ref_bias)
    cache = _new_cache(backend, policy) if opts.route == "cache" else None
    with torch.autocast(hidden.device.type, enabled=False):
        if opts.group_name is None:
            out = backend.forward(policy, reference, targets, opts, cache)
        else:
            out = vocab_parallel.forward(backend, policy, reference, targets, opts)
    counted = targets != opts.ignore_index
    empty = out.logps.new_empty
    kept_columns = empty(0, dtype=torch.bool)
    if opts.route == "sparse":
        kept_columns = out.logps.new_ones(_kept_shape(hidden, weight), dtype=torch.bool)
        if out.kept_columns is not None:
            kept_columns[: len(out.kept_columns)] = out.kept_columns
    return (
        out.logps.where(counted, 0.0),
        empty(0) if out.ref_logps is None else out.ref_logps.where(counted, 0.0),
        empty(0) if out.entropy is None else out.entropy.where(counted, 0.0),
        out.lse,
        empty(0) if out.unit_gradient is None else out.unit_gradient,
        exact_sparsity(0, 1, out.logps) if out.sparsity is None else out.sparsity,
        kept_columns,
        *(_no_cache(hidden) if cache is None else cache),
    )


def _operand(backend: Backend, hidden: Tensor, weight: Tensor | None) -> Tensor | None:
    """The weight in its own type if the back end takes it so, else in hidden's, for one call."""
    if weight is None or backend.CONVERTS_TILES:
        return weight
    return weight.to(hidden.dtype)


def _kept_shape(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    return num_blocks(hidden.shape[0]), weight.shape[0]


def _new_cache(backend: Backend, policy: Head) -> SoftmaxCache:
    tiling = backend.vocab_tiling(policy.hidden.device)
    return new_softmax_cache(policy.hidden, policy.weight, tiling)


def _no_cache(hidden: Tensor) -> SoftmaxCache:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    factors, one_minus_p = (hidden.new_empty(0, dtype=dtype) for _ in range(2))
    return SoftmaxCache(hidden.new_empty(0), factors, one_minus_p)


@head_forward.register_fake
def _(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, options):
    opts = HeadOptions.decode(options)
    backend = _backend_for(opts, hidden)
    policy, n = Head(hidden, weight, bias), hidden.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    gradient_type = backend.unit_gradient_dtype(hidden, opts)
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(0 if ref_hidden is None else n, dtype=dtype),
        hidden.new_empty(n if opts.entropy else 0, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(hidden.shape, dtype=gradient_type)
        if opts.wants_unit_gradient
        else hidden.new_empty(0, dtype=dtype),
        hidden.new_empty(3, dtype=dtype),
        hidden.new_empty(
            _kept_shape(hidden, weight) if opts.route == "sparse" else 0, dtype=torch.bool
        ),
        *(_new_cache(backend, policy) if opts.route == "cache" else _no_cache(hidden)),
    )


@torch.library.custom_op("powerflow_fast::head_backward", mutates_args=())
def head_backward(
    upstream: list[Tensor | None],  # the six of Upstream
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    kept_columns: Tensor | None,  # [blocks, V] bool
    cache: list[Tensor],  # the three of SoftmaxCache, or none
    options: str,
    needs: list[bool],  # hidden, weight, bias
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not needed."""
    opts = HeadOptions.decode(options)
    backend = _backend_for(opts, hidden)
    head = Head(hidden, _operand(backend, hidden, weight), bias)
    arguments = (head, Upstream(*upstream), opts, needs)
    with torch.autocast(hidden.device.type, enabled=False):
        if opts.group_name is None:
            filled = SoftmaxCache(*cache) if cache else None
            grads = backend.backward(*arguments, kept_columns, filled)
        else:
            grads = vocab_parallel.backward(backend, *arguments)
    grad_hidden, grad_weight, grad_bias = (
        hidden.new_empty(0) if grad is None else grad for grad in grads
    )
    grad_weight = grad_weight.to(weight.dtype) if needs[1] else grad_weight
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


@head_backward.register_fake
def _(upstream, hidden, weight, bias, kept_columns, cache, options, needs):
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, *_, ctx.options = inputs
    logps, ref_logps, entropy, lse, unit_gradient, sparsity, kept_columns, *cache = output
    options = HeadOptions.decode(ctx.options)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ref_logps, lse, unit_gradient, sparsity, kept_columns, *cache)
    if options.detach_entropy:
        ctx.mark_non_differentiable(entropy)
    ctx.hidden_dtype = hidden.dtype
    recomputed = (hidden, weight, bias, logps, lse, entropy, kept_columns, *cache)
    if options.route == "unit_gradient" and options.reads_entropy_only:
        recomputed = ()
    ctx.save_for_backward(targets, unit_gradient, *recomputed)


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
    options = HeadOptions.decode(ctx.options)
    grad_entropy = None if options.reads_entropy_only else grad_entropy
    if grad_logps is None and grad_entropy is None:
        return (None,) * 8
    targets, unit_gradient, *saved = ctx.saved_tensors
    # The unit gradient belongs to logps; a gradient of the entropy needs logits.
    use_unit_gradient = options.wants_unit_gradient and grad_entropy is None

    def counted_only(grad: Tensor | None) -> Tensor | None:
        return None if grad is None else grad.where(targets != options.ignore_index, 0.0)

    if grad_logps is None:
        grad_logps = torch.zeros(targets.shape, dtype=grad_entropy.dtype, device=targets.device)
    grad_logps = counted_only(grad_logps)
    needs = list(ctx.needs_input_grad[:3])
    grads = [None, None, None]
    if use_unit_gradient and needs[0]:
        grads[0], needs[0] = torch.empty_like(unit_gradient, dtype=ctx.hidden_dtype), False
        # Cast as it is written, which keeps no graph.
        torch.mul(unit_gradient, grad_logps.detach()[:, None], out=grads[0])
        if torch.is_grad_enabled() and grad_logps.requires_grad:
            grads[0] = _OnceDifferentiable.apply(grads[0], grad_logps)
    if any(needs):
        hidden, weight, bias, logps, lse, entropy, kept_columns, *cache = saved
        recomputed = head_backward(
            [
                grad_logps,
                counted_only(grad_entropy),
                targets,
                logps,
                lse,
                entropy if options.entropy else None,
            ],
            hidden,
            weight,
            bias,
            kept_columns if options.route == "sparse" and use_unit_gradient else None,
            cache if options.route == "cache" and grad_entropy is None else [],
            ctx.options,
            needs,
        )
        grads = [
            new if need else old for new, need, old in zip(recomputed, needs, grads, strict=True)
        ]
    return *grads, *(None,) * 5


head_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("powerflow_fast::sequence_residual", mutates_args=())
def sequence_residual(
    logps: Tensor,  # [N] float32
    ref_logps: Tensor,  # [N] float32
    starts: Tensor,  # [S] int32, ascending: cu_seqlens[:-1], or b * T for padded rows
    ends: Tensor,  # [S] int32
    mask: Tensor | None,  # [N] bool
    alpha: Tensor,  # [S] float32
    psi: Tensor,  # [S] float32
    balance: str,
) -> tuple[Tensor, Tensor]:
    """The Triton epilogue: l_pi - alpha (l_ref + psi) and counted tokens of each sequence, [S]."""
    from powerflow_fast.kernels.residual import residual_forward

    vectors = (x.contiguous() for x in (logps, ref_logps, starts, ends))
    mask = None if mask is None else mask.contiguous()
    delta0, _, _, lengths = residual_forward(
        *vectors, mask, alpha.contiguous(), psi.contiguous(), balance
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
    from powerflow_fast.kernels.residual import residual_backward

    vectors = (x.contiguous() for x in (grad_delta0, lengths, starts, ends))
    mask = None if mask is None else mask.contiguous()
    return residual_backward(*vectors, mask, num_tokens, balance)


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
