"""The core at its edges: confident tokens, 16-bit sums, biases, other threads, what is kept."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm._monitor import TMonitor

from powerflow_fast import linear_logprobs, tb_loss
from powerflow_fast.logprobs import softmax_cache, torch_backend
from powerflow_fast.logprobs.torch_tiles import has_bf16_units
from tests.logprobs.test_vocab_parallel import dist, spawn

N, H, V = 5, 16, 300
GAPS = (0.0, 10.0, 20.0, 30.0, 40.0)  # nats of the target above the largest other logit


def confident(seed=0, bias=False):
    """hidden, weight, bias and targets; row n's target is GAPS[n] above the rest."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.3 * torch.randn(V, H, generator=generator)
    hidden = torch.randn(N, H, generator=generator)
    targets = torch.tensor([3, 290, 77, 150, 299])
    added = 0.1 * torch.randn(V, generator=generator) if bias else None
    z = hidden.double() @ weight.double().T + (0 if added is None else added.double())
    own = z.gather(1, targets[:, None])[:, 0]
    others = z.scatter(1, targets[:, None], -torch.inf).amax(1)
    for n, gap in enumerate(GAPS):  # one hidden unit for each target alone
        weight[:, n] = 0.0
        weight[targets[n], n] = 4.0
        hidden[n, n] = (others[n] + gap - own[n]) / 4.0
    return hidden, weight, added, targets


def truth(hidden, weight, bias, targets, softcap=None):
    """logps and entropy [N] float64, from the rest of the vocabulary and the target apart."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    own = z.gather(1, targets[:, None])[:, 0]
    rest = z.scatter(1, targets[:, None], -torch.inf)
    log_rest = rest.logsumexp(1)
    gap = log_rest - own
    logps = -torch.where(gap > 30, gap, gap.exp().log1p())
    log_others = gap + logps
    inner = rest - log_rest[:, None]
    entropy_of_rest = -(inner.exp() * inner.clamp_min(-1e9)).sum(1)
    entropy = log_others.exp() * (entropy_of_rest - log_others) - logps.exp() * logps
    return logps, entropy


def assert_digits(got, expected, places=1e-3):
    """Row by row, of what a row is: small numbers have as many digits as large ones."""
    got, expected = got.double().reshape(len(got), -1), expected.reshape(len(expected), -1)
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= places, error


ROUTES = {
    "frozen": dict(train=("hidden",)),
    "cached": dict(train=("hidden", "weight", "bias")),
    "recomputed": dict(train=("hidden", "weight", "bias"), rows=0),
    "cached in part": dict(train=("hidden", "weight", "bias"), rows=2),
    "through the entropy": dict(train=("hidden", "weight", "bias"), entropy=True),
    "of the bias alone": dict(train=("bias",)),
}


@pytest.mark.parametrize("softcap", [None, 120.0], ids=["", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("route", ROUTES)
def test_confident_tokens_keep_their_digits(route, bias, softcap, monkeypatch):
    options = ROUTES[route]
    if "rows" in options:
        monkeypatch.setattr(softmax_cache, "LARGEST_BYTES", options["rows"] * V * 4)
    hidden, weight, added, targets = confident(bias=bias)
    named = {"hidden": hidden, "weight": weight, "bias": added}
    train = [n for n in options["train"] if named[n] is not None]
    if not train:
        pytest.skip("no bias")
    through_entropy = options.get("entropy", False)
    for row in range(N):  # one row's gradient at a time: those of others are far larger
        leaves = {
            n: None if x is None else x.clone().requires_grad_(n in train) for n, x in named.items()
        }
        wide = {
            n: None if x is None else x.double().requires_grad_(n in train)
            for n, x in named.items()
        }
        logps, entropy = linear_logprobs(
            leaves["hidden"],
            leaves["weight"],
            targets,
            bias=leaves["bias"],
            softcap=softcap,
            backend="torch",
            return_entropy=True if through_entropy else "detached",
        )
        wide_logps, wide_entropy = truth(
            wide["hidden"], wide["weight"], wide["bias"], targets, softcap
        )
        assert_digits(logps.detach(), wide_logps.detach())
        assert_digits(entropy.detach(), wide_entropy.detach())
        loss, wide_loss = logps[row], wide_logps[row]
        if through_entropy:
            loss, wide_loss = loss + entropy[row], wide_loss + wide_entropy[row]
        loss.backward()
        wide_loss.backward()
        for name in train:
            # The weight's row of the target, and all others, are of one size each.
            got, expected = leaves[name].grad, wide[name].grad
            assert_digits(got.reshape(1, -1), expected.reshape(1, -1))


CUTS = (slice(0, 150), slice(150, 300))


def confident_worker(rank):
    results, group = {}, dist.group.WORLD
    for route in ("frozen", "trained", "entropy"):
        found = []
        for row in range(N):
            hidden, weight, bias, targets = confident(bias=True)
            hidden.requires_grad_()
            own, own_bias = weight[CUTS[rank]].clone(), bias[CUTS[rank]].clone()
            own.requires_grad_(route != "frozen")
            options = dict(bias=own_bias, process_group=group, backend="torch")
            logps, entropy = linear_logprobs(hidden, own, targets, return_entropy=True, **options)
            (logps[row] + (entropy[row] if route == "entropy" else 0.0)).backward()
            found.append(hidden.grad[row])
        results[route, rank] = logps.detach(), entropy.detach(), found
    # A vocabulary padded with -inf, of which a rank has nothing else.
    hidden, weight, bias, targets = confident(bias=True)
    bias[150:] = -torch.inf
    targets = targets.clamp(max=149)
    for trained in (False, True):
        x, own = hidden.clone().requires_grad_(), weight[CUTS[rank]].clone()
        own.requires_grad_(trained)
        options = dict(bias=bias[CUTS[rank]], process_group=group, return_entropy=True)
        logps, entropy = linear_logprobs(x, own, targets, backend="torch", **options)
        logps.sum().backward()
        results["padded", trained, rank] = logps.detach(), entropy.detach(), x.grad
    return results


def test_ranks_keep_the_digits_and_a_slice_of_nothing_has_no_share(tmp_path):
    results = spawn(confident_worker, tmp_path)
    hidden, weight, bias, targets = (
        x.double() if x.is_floating_point() else x for x in confident(bias=True)
    )
    for route in ("frozen", "trained", "entropy"):
        expected = []
        for row in range(N):
            x = hidden.clone().requires_grad_()
            wide_logps, wide_entropy = truth(x, weight, bias, targets)
            (wide_logps[row] + (wide_entropy[row] if route == "entropy" else 0.0)).backward()
            expected.append(x.grad[row])
        for rank in range(2):
            logps, entropy, gradients = results[route, rank]
            assert_digits(logps, wide_logps.detach())
            assert_digits(entropy, wide_entropy.detach())
            for got, wanted in zip(gradients, expected, strict=True):
                assert_digits(got[None], wanted[None])
    targets = targets.clamp(max=149)
    x = hidden.clone().requires_grad_()
    wide_logps, wide_entropy = truth(x, weight[:150], bias[:150], targets)
    wide_logps.sum().backward()
    for trained in (False, True):
        for rank in range(2):
            logps, entropy, gradient = results["padded", trained, rank]
            torch.testing.assert_close(logps.double(), wide_logps.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                entropy.double(), wide_entropy.detach(), rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(gradient.double(), x.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_sums_of_half_precision_log_probs_are_float32(dtype, packed):
    torch.manual_seed(0)
    logps, ref_logps = -torch.rand(2, 2, 8192).to(dtype)
    logps = logps.requires_grad_()
    expected = tb_loss(logps.double(), ref_logps.double(), log_z=0.1, alpha=1.5)
    options = {}
    given = logps, ref_logps, logps.detach()
    if packed:
        given = tuple(x.reshape(-1) for x in given)
        options = {"cu_seqlens": torch.tensor([0, 8192, 16384], dtype=torch.int32)}
    out = tb_loss(*given[:2], log_z=0.1, alpha=1.5, old_logps=given[2], **options)
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-4, atol=0)
    assert out.loss.dtype == out.logps.dtype == torch.float32
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert gradient.dtype == dtype and gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_float32_bias_is_not_rounded_to_the_models_type():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    bias, targets = (20 * torch.randn(40)).requires_grad_(), torch.arange(6)
    logps = linear_logprobs(hidden, weight, targets, bias=bias, backend="torch")
    z = hidden.double() @ weight.double().T + bias.double()
    expected = z.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=1e-4)
    logps.sum().backward()
    assert bias.grad.dtype == torch.float32
    with pytest.raises(
        ValueError, match="bias: expected float32, bfloat16 or float16, got torch.int64"
    ):
        linear_logprobs(hidden, weight, targets, bias=torch.zeros(40, dtype=torch.int64))


def test_alpha_and_psi_get_no_gradient():
    logps = (-torch.rand(3, 4)).requires_grad_()
    alpha, psi = torch.rand(2, 3).add(1).requires_grad_().unbind()
    out = tb_loss(logps, -torch.rand(3, 4), log_z=0.0, alpha=alpha, psi=psi)
    assert torch.autograd.grad(out.loss, logps, retain_graph=True)[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(out.loss, alpha)


@pytest.mark.parametrize("trained", [False, True])
def test_a_second_derivative_is_an_error(trained):
    hidden = torch.randn(4, 8).requires_grad_()
    weight = torch.randn(20, 8).requires_grad_(trained)
    logps = linear_logprobs(hidden, weight, torch.arange(4), backend="torch")
    (gradient,) = torch.autograd.grad(logps.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative|no autograd formula"):
        gradient.square().sum().backward()


def kept_bytes(**options) -> int:
    """What autograd keeps for the backward pass of one call, beside hidden and weight as given."""
    hidden = torch.randn(1500, 64, dtype=options.pop("dtype", torch.float32)).requires_grad_()
    weight = torch.randn(2000, 64)
    seen: dict[int, int] = {}
    given = {hidden.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=options.pop("autocast", False)):
            out = linear_logprobs(
                hidden, weight, torch.zeros(1500).long(), backend="torch", **options
            )
    del out
    return sum(seen.values())


@pytest.mark.parametrize("options", [{}, {"autocast": True}, {"dtype": torch.bfloat16}])
def test_a_frozen_head_keeps_its_direction_alone(options):
    unit_gradient, rows = 1500 * 64 * 4, 1500 * 8
    for entropy in (False, "detached"):
        kept = kept_bytes(**options, return_entropy=entropy)
        assert kept <= unit_gradient + 2 * rows, (entropy, kept, unit_gradient)


@pytest.mark.skipif(not has_bf16_units(torch.device("cpu")), reason="no bf16 units")
def test_products_of_other_threads_stay_float32():
    left, right = torch.randn(2, 256, 256).unbind()
    expected, wrong = left @ right, []
    stop = threading.Event()

    def multiply():
        while not stop.is_set():
            wrong.append(not torch.equal(left @ right, expected))

    other = threading.Thread(target=multiply)
    other.start()
    hidden, weight = torch.randn(512, 256).bfloat16(), torch.randn(8192, 256).bfloat16()
    targets = torch.zeros(512).long()
    for _ in range(20):
        linear_logprobs(hidden, weight, targets, backend="torch", return_entropy=True)
    stop.set()
    other.join()
    assert len(wrong) > 20 and not any(wrong)


@pytest.mark.skipif(not has_bf16_units(torch.device("cpu")), reason="no bf16 units")
def test_bf16_units_are_used_where_nothing_else_can_see_it(monkeypatch):
    """A thread that tqdm starts watches its bars: every trainer with a bar has it."""
    running = [threading.current_thread(), TMonitor.__new__(TMonitor)]
    monkeypatch.setattr(threading, "enumerate", lambda: running)
    with torch_backend._bf16_products(torch.float32, torch.zeros(1, dtype=torch.bfloat16)):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"
    running.append(threading.Thread())
    with torch_backend._bf16_products(torch.float32, torch.zeros(1, dtype=torch.bfloat16)):
        assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return out


def within(context, function):
    def inside(*args, **kwargs):
        with context:
            return function(*args, **kwargs)

    return inside


MIXED = {
    "autocast": (torch.float32, torch.float32),
    "wide weight": (torch.bfloat16, torch.float32),
    "wide hidden": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("entropy", [False, True])
def test_a_weight_in_another_type_is_never_converted_whole(kind, entropy, monkeypatch):
    largest = Largest()
    for name in ("forward", "backward"):  # to the dispatcher the whole operator is one operation
        monkeypatch.setattr(torch_backend, name, within(largest, getattr(torch_backend, name)))
    hidden_dtype, weight_dtype = MIXED[kind]
    hidden = torch.randn(20, 16, dtype=hidden_dtype, requires_grad=True)
    weight = torch.randn(100_000, 16, dtype=weight_dtype)
    with largest:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            out = linear_logprobs(
                hidden, weight, torch.arange(20), backend="torch", return_entropy=entropy
            )
        sum(x.sum() for x in (out if entropy else [out])).backward()
    assert hidden.grad.isfinite().all() and largest.bytes <= weight.numel() * 2 / 4


SAME_DIGITS = [
    ("torch", {}),
    ("torch", {"return_entropy": True}),
    ("torch", {"softcap": 9.0}),
    ("torch", {"grad_tolerance": 0.1}),
    ("torch", {"round_logits": True}),
    ("triton", {}),
]


@pytest.mark.parametrize(("backend", "options"), SAME_DIGITS, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_it_counts_with_the_digits_of_the_product(backend, options, trained):
    """Bit by bit what a weight that was converted before gives, its gradient as wide as itself."""
    found = []
    for before in (False, True):
        torch.manual_seed(0)
        hidden = (3 * torch.randn(70, 16)).bfloat16().requires_grad_()
        weight = torch.randn(300, 16)
        weight = (weight.bfloat16().float() if before else weight).requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear_logprobs(hidden, weight, torch.arange(70), backend=backend, **options)
        out = out if isinstance(out, tuple) else (out,)
        sum(x.sum() for x in out).backward()
        if trained:
            assert weight.grad.dtype == torch.float32
        found.append([*out, hidden.grad, *([weight.grad] if trained else [])])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
