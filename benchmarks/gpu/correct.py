"""Stage `correct`: every kernel against float64 at three odd shapes, then what only a GPU shows.

Buffers are poisoned with NaN, so that an element that no kernel wrote shows. Each error is stated
beside its bound.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.lines import Line
from benchmarks.gpu.shapes import ODD, ODD_TINY
from benchmarks.gpu.worker import Run
from benchmarks.peers import require
from benchmarks.results_file import FOLDER
from powerflow_fast import reference
from powerflow_fast.kernels.residual import residual_backward, residual_forward
from powerflow_fast.logprobs import triton_backend
from powerflow_fast.logprobs.backend import Upstream
from powerflow_fast.logprobs.options import HeadOptions
from powerflow_fast.logprobs.softmax_cache import new_softmax_cache
from tests.helpers.numerics import gradient_tolerance, logps_error_bound, relative_error
from tests.helpers.truth import DTYPES, Head, make_head, poison, statistics, unit_gradient

ROOT = FOLDER.parent.parent
CUDA_TESTS = ("tests/test_cuda.py", "tests/kernels/test_exp2.py")
KERNEL_TESTS = ("tests/kernels",)
TINY_TESTS = ("tests/kernels/test_exp2.py",)
COMPILES_FOR_OTHERS = "tests/kernels/test_machine_code.py"  # chips; no device is needed
TOLERANCE = 1e-2  # of the certified gradient


def kernels(run: Run) -> Iterator[None]:
    torch.zeros(1, device=run.device)
    yield
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        for n, h, v in ODD_TINY if run.tiny else ODD:
            for dtype in DTYPES[:1] if run.tiny else DTYPES:
                where = f"{str(dtype).removeprefix('torch.')}, N={n}, H={h}, V={v}"
                torch.manual_seed(0)
                for name, check in CHECKS.items():
                    run.case(f"{name}, {where}", lambda c=check: c(n, h, v, dtype, run.device))  # noqa: B023


def _bounded(errors: dict[str, tuple[float, float]]) -> Line:
    """Name -> (error, bound); raises ArithmeticError where one is over its bound."""
    over = [f"{k} {e:.2e} > {b:.2e}" for k, (e, b) in errors.items() if not e <= b]
    if over:
        raise ArithmeticError(", ".join(over))
    worst = max(errors.values(), key=lambda pair: pair[0] / pair[1])
    listed = {name: error for name, (error, _) in errors.items()}
    return {"error": worst[0], "bound": worst[1], "errors": listed}


def _largest(got: Tensor, truth: Tensor) -> float:
    """Absolute; NaN counts as infinite."""
    error = (got.double() - truth.double()).abs().max()
    return float("inf") if error.isnan() else error.item()


def _pair(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Line:
    policy, other = (make_head(n, h, v, dtype, device, bias=True) for _ in range(2))
    targets = torch.randint(v, (n,), device=device)
    options = HeadOptions(entropy=True)
    out = triton_backend.forward(policy.operands(), other.operands(), targets, options)
    logps, lse, entropy = statistics(policy, targets, options)
    ref_logps, _, _ = statistics(other, targets, options)
    bound = max(logps_error_bound(one.hidden, one.weight) for one in (policy, other)) + 1e-5
    truths = {"logps": (out.logps, logps), "lse": (out.lse, lse), "entropy": (out.entropy, entropy)}
    truths["ref_logps"] = (out.ref_logps, ref_logps)
    bounds = dict.fromkeys(truths, bound) | {"entropy": 10 * bound}
    return _bounded({k: (_largest(*pair), bounds[k]) for k, pair in truths.items()})


def _unit_gradient(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Line:
    head = make_head(n, h, v, dtype, device, spread=2.0)
    targets = torch.randint(v, (n,), device=device)
    out = triton_backend.forward(head.operands(), None, targets, UNIT_GRADIENT)
    error = relative_error(out.unit_gradient, unit_gradient(head, targets, PLAIN))
    return _bounded({"unit gradient": (error, max(torch.finfo(dtype).eps, 5e-6))})


def _gradients(head: Head, targets: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = head.double()
    logps, _, _ = statistics(leaves, targets, PLAIN)
    return torch.autograd.grad(logps, (leaves.hidden, leaves.weight), upstream.double())


def _backward(
    n: int, h: int, v: int, dtype: torch.dtype, device: torch.device, stored: bool
) -> Line:
    head = make_head(n, h, v, dtype, device)
    targets = torch.randint(v, (n,), device=device)
    upstream = torch.randn(n, device=device)
    operands, cache = head.operands(), None
    if stored:
        tiling = triton_backend.vocab_tiling(device)
        cache = new_softmax_cache(head.hidden, head.weight, tiling)
    out = triton_backend.forward(operands, None, targets, PLAIN, cache)
    rows = Upstream(upstream, None, targets, out.logps, out.lse, None)
    got = triton_backend.backward(operands, rows, PLAIN, (True, True, False), cache=cache)
    truth = _gradients(head, targets, upstream)
    bound = gradient_tolerance(dtype)
    pairs = zip(("hidden", "weight"), got[:2], truth, strict=True)
    return _bounded({name: (relative_error(*pair), bound) for name, *pair in pairs})


def _recomputed(*sizes) -> Line:
    return _backward(*sizes, stored=False)


def _stored(*sizes) -> Line:
    return _backward(*sizes, stored=True)


def _certified(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Line:
    """A sharp policy: each row within tolerance * max |W_v|, and the rounding of what is kept."""
    head = make_head(n, h, v, dtype, device, spread=40.0)
    targets = torch.distributions.Categorical(logits=head.logits(PLAIN)).sample()
    options = HeadOptions(grad_tolerance=TOLERANCE, route="sparse")
    out = triton_backend.forward(head.operands(), None, targets, options)
    norms = head.weight.double().norm(dim=1)
    rounding = 4 * gradient_tolerance(dtype) * (head.logits(PLAIN).softmax(-1) @ norms) + 1e-4
    bounds = TOLERANCE * norms.max() + rounding
    errors = (out.unit_gradient.double() - unit_gradient(head, targets, PLAIN)).norm(dim=1)
    columns, skipped, dense = out.sparsity.tolist()
    share = (errors / bounds).max().item()
    checked = _bounded({"unit gradient": (share, 1.0), "skipped": (skipped, TOLERANCE)})
    return checked | {"columns_kept": columns, "dense_blocks": dense}


def _residual(n: int, h: int, v: int, dtype: torch.dtype, device: torch.device) -> Line:
    """Residual of three sequences and its gradient, from log-probs of `n` tokens."""
    logps, ref_logps = -torch.rand(2, n, device=device) * 9
    cuts = [0, n // 3, n // 2, n]
    bounds = torch.tensor(cuts, dtype=torch.int32, device=device)
    starts, ends = bounds[:-1].clone(), bounds[1:].clone()
    alpha, psi = torch.rand(2, 3, device=device) + 1
    delta, l_pi, l_ref, lengths = residual_forward(
        logps, ref_logps, starts, ends, None, alpha, psi, "length"
    )
    leaf = logps.double().requires_grad_()
    filled = [s for s in range(3) if cuts[s] < cuts[s + 1]]
    parts = [slice(cuts[s], cuts[s + 1]) for s in filled]
    ones = torch.ones(3, dtype=torch.float64, device=device)
    _, residual = reference.tb_loss(
        [leaf[part] for part in parts],
        [ref_logps.double()[part] for part in parts],
        log_z=0 * ones[filled],
        alpha=alpha.double()[filled],
        psi=psi.double()[filled],
        weights=ones[filled],
    )
    truth = torch.zeros_like(ones).index_put((torch.tensor(filled, device=device),), residual)
    (gradient,) = torch.autograd.grad(truth.sum(), leaf)
    got = residual_backward(ones.float(), lengths, starts, ends, None, n, "length")
    return _bounded(
        {
            "residual": (_largest(delta, truth.detach()), 1e-4),
            "gradient": (_largest(got, gradient), 1e-6),
        }
    )


PLAIN, UNIT_GRADIENT = HeadOptions(), HeadOptions(route="unit_gradient")
CHECKS: dict[str, Callable[..., Line]] = {
    "log-probs of policy and reference": _pair,
    "unit gradient": _unit_gradient,
    "backward, logits recomputed": _recomputed,
    "backward, stored exp-logits": _stored,
    "certified unit gradient": _certified,
    "residual": _residual,
}


def on_cuda(run: Run) -> Iterator[None]:
    """Graphs, streams, synchronisation, memory: the tests of CUDA, a line for each."""
    yield
    _test(run, [], CUDA_TESTS)


def kernel_tests(run: Run) -> Iterator[None]:
    """The tests of the kernels, a line for each; processes compile side by side."""
    require("xdist", "pytest-xdist")
    yield
    processes = max(1, min(12, (os.cpu_count() or 1) - 2))
    options = ["-n", str(processes), f"--ignore={ROOT / COMPILES_FOR_OTHERS}"]
    _test(run, options, TINY_TESTS if run.tiny else KERNEL_TESTS)


def _test(run: Run, options: list[str], paths: Iterable[str]) -> None:
    class Lines:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when != "call" and report.passed:
                return
            line: Line = {"case": report.nodeid, "outcome": report.outcome}
            if report.failed:
                line["failed"] = report.longreprtext.strip().splitlines()[-1][:500]
            if report.skipped:
                line["skipped"] = report.longrepr[2].removeprefix("Skipped: ")
            run.write({"stage": run.stage, "part": run.part, **line, "seconds": report.duration})

    common = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    pytest.main([*common, *options, *(str(ROOT / path) for path in paths)], plugins=[Lines()])
