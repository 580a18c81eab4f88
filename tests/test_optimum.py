"""LA-TB's optimum on a model small enough to enumerate, trained with the real loss."""

import pytest

from benchmarks.evidence.enumerable import Enumerable, optimum, total_variation


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_equal_lengths_reach_the_power_distribution(alpha):
    """log pi = alpha log p - |y| log Z', and |y| is the same for all: pi = p^alpha / Z."""
    model = Enumerable(vocab=3, length=4)
    table, log_z = optimum(model, alpha)
    policy = model.totals(table)
    assert policy.exp().sum().item() == pytest.approx(1.0)
    assert total_variation(policy, model.power(alpha)).item() < 1e-3
    log_partition = (alpha * model.totals(model.base)).logsumexp(-1).item()
    assert log_z.item() == pytest.approx(log_partition / 4, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_unequal_lengths_reach_the_exponential_length_tilt(alpha):
    """pi(y) = p(y)^alpha exp(-lambda |y|), lambda = log Z' (Prop. 3.2), which normalises it."""
    model = Enumerable(vocab=3, length=4, stop=True)
    table, log_z = optimum(model, alpha)
    policy = model.totals(table)
    unnormalised = alpha * model.totals(model.base) - log_z[:, None] * model.lengths
    assert policy.exp().sum().item() == pytest.approx(1.0)
    assert unnormalised.exp().sum().item() == pytest.approx(1.0, abs=1e-3)
    assert total_variation(policy, unnormalised).item() < 1e-3
    assert log_z.item() == pytest.approx(model.normalising_tilt(alpha).item(), abs=1e-3)
    untilted = total_variation(policy, model.power(alpha)).item()
    assert untilted > 1e-2  # the tilt is there to be seen


def test_trajectory_balance_reaches_the_power_distribution_at_any_length():
    model = Enumerable(vocab=3, length=4, stop=True)
    table, _ = optimum(model, 2.0, balance="trajectory")
    assert total_variation(model.totals(table), model.power(2.0)).item() < 1e-3
