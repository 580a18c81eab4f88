"""Large vocabularies and token counts, and several threads at once."""

import threading

import pytest
import torch

from powerflow_fast import linear_logprobs, reference
from tests.helpers.numerics import (
    gradient_tolerance,
    logit_error_bound,
    logps_error_bound,
    relative_error,
)


@pytest.mark.parametrize(
    "n, h, v",
    [
        (3, 8, 262_144),  # Gemma's vocabulary
        (65_537, 4, 40),  # more rows than a grid's second axis has
        (1, 5, 1),
    ],
)
@pytest.mark.parametrize("grad_tolerance", [0.0, 1e-6])
def test_size(n, h, v, grad_tolerance):
    hidden, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h) * 3
    targets = torch.randint(v, (n,))
    logps = linear_logprobs(hidden, weight, targets, grad_tolerance=grad_tolerance)
    upstream = torch.randn(n)
    logps.backward(upstream)
    leaf = hidden.detach().double().requires_grad_()
    expected, _ = reference.linear_logprobs(leaf, weight, targets)
    expected.backward(upstream.double())
    assert (logps - expected).abs().max() <= logps_error_bound(hidden.detach(), weight)
    # An error of a logit is a relative error of its probability.
    bound = gradient_tolerance(torch.float32) + logit_error_bound(hidden.detach(), weight)
    assert relative_error(hidden.grad, leaf.grad) <= bound


def test_threads_do_not_disturb_each_other():
    cases = []
    for seed in range(6):
        torch.manual_seed(seed)
        cases.append((torch.randn(40, 16), torch.randn(300, 16), torch.randint(300, (40,))))
    expected = [linear_logprobs(*case) for case in cases]
    results: dict[int, torch.Tensor] = {}

    def run(index):
        for _ in range(5):
            results[index] = linear_logprobs(*cases[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(len(cases)))
