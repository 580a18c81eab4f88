"""LA-TB's optimum on a model small enough to enumerate, trained with the real loss."""

import itertools

import pytest
import torch

from powerflow_fast import tb_loss


class Enumerable:
    """All sequences over a small vocabulary and their probabilities under a tabular model.

    With `stop`, token 0 ends a sequence, so lengths run from 1 to `length`; else all are equal.
    """

    def __init__(self, vocab: int, length: int, stop: bool, scale: float = 0.7) -> None:
        self.vocab, self.length, self.stop = vocab, length, stop
        every = itertools.product(range(vocab), repeat=length)
        self.sequences = sorted({self._cut(sequence) for sequence in every})
        prefixes = sorted({s[:i] for s in self.sequences for i in range(len(s))})
        self.state = {prefix: i for i, prefix in enumerate(prefixes)}
        lengths = [len(s) for s in self.sequences]
        self.lengths = torch.tensor(lengths, dtype=torch.float64)
        self.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
        steps = [(self.state[s[:i]], s[i]) for s in self.sequences for i in range(len(s))]
        self.states, self.tokens = torch.tensor(steps).T
        self.base = torch.randn(len(prefixes), vocab, dtype=torch.float64) * scale

    def _cut(self, sequence):
        return sequence[: sequence.index(0) + 1] if self.stop and 0 in sequence else sequence

    def logps(self, table):
        """Packed token log-probs of every sequence."""
        return table.log_softmax(-1)[self.states, self.tokens]

    def totals(self, table):
        parts = self.logps(table).split(self.lengths.long().tolist())
        return torch.stack([part.sum() for part in parts])


def train(model, alpha, balance="length"):
    """Full-batch optimum of the loss over all sequences: policy table and one log Z'."""
    table = model.base.clone().requires_grad_()
    ref_logps = model.logps(model.base)
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table, log_z],
        max_iter=2000,
        max_eval=4000,
        history_size=50,
        tolerance_grad=1e-13,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        out = tb_loss(
            model.logps(table),
            ref_logps,
            log_z=log_z.expand(len(model.lengths)),
            alpha=alpha,
            cu_seqlens=model.cu_seqlens,
            balance=balance,
        )
        out.loss.backward()
        return out.loss

    loss = optimizer.step(closure)
    for _ in range(3):
        loss = optimizer.step(closure)
    return table.detach(), log_z.item(), loss.item()


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_equal_lengths_reach_the_power_distribution(alpha):
    """log pi = alpha log p - |y| log Z', and |y| is the same for all: pi = p^alpha / Z."""
    model = Enumerable(vocab=3, length=4, stop=False)
    table, log_z, loss = train(model, alpha)
    target = (alpha * model.totals(model.base)).softmax(0)
    policy = model.totals(table).exp()
    assert policy.sum().item() == pytest.approx(1.0)
    assert (policy - target).abs().sum() / 2 < 1e-3
    log_partition = torch.logsumexp(alpha * model.totals(model.base), 0).item()
    assert log_z == pytest.approx(log_partition / model.length, abs=1e-3)
    assert loss < 1e-8


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_unequal_lengths_reach_the_exponential_length_tilt(alpha):
    """pi(y) = p(y)^alpha exp(-lambda |y|), lambda = log Z' (Prop. 3.2), which normalises it."""
    model = Enumerable(vocab=3, length=4, stop=True)
    table, log_z, _ = train(model, alpha)
    tilted = alpha * model.totals(model.base) - log_z * model.lengths
    policy = model.totals(table).exp()
    assert policy.sum().item() == pytest.approx(1.0)
    assert tilted.exp().sum().item() == pytest.approx(1.0, abs=1e-3)
    assert (policy - tilted.exp()).abs().sum() / 2 < 1e-3
    untilted = (alpha * model.totals(model.base)).softmax(0)
    assert (policy - untilted).abs().sum() / 2 > 1e-2  # the tilt is there to be seen


def test_trajectory_balance_reaches_the_power_distribution_at_any_length():
    model = Enumerable(vocab=3, length=4, stop=True)
    table, _, _ = train(model, 2.0, balance="trajectory")
    target = (2.0 * model.totals(model.base)).softmax(0)
    assert (model.totals(table).exp() - target).abs().sum() / 2 < 1e-3
