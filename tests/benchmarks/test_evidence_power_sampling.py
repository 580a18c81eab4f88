"""The training-free rival: what its estimate is, and that it draws from p^alpha."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.evidence import power_sampling
from benchmarks.evidence.power_sampling import jackknifed, power_sample

ALPHA = 3.0


def test_the_estimate_without_noise_is_the_power():
    """Where every continuation has the same log-prob, nothing is left to chance or to correct."""
    log_p = torch.tensor([[0.5, 0.3, 0.2]]).log()
    ahead = torch.tensor([[-1.0, -0.5, -2.0]])[..., None].expand(1, 3, 4)
    expected = (ALPHA * log_p + (ALPHA - 1) * ahead[..., 0]).softmax(-1)
    torch.testing.assert_close(jackknifed(log_p, ahead, ALPHA), expected)


def test_the_jackknife_takes_bias_off():
    torch.manual_seed(0)
    log_p = torch.tensor([0.5, 0.5]).log().expand(20_000, 2)
    outcomes = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()  # p(rest), by candidate
    drawn = torch.stack([row.exp().multinomial(20_000 * 6, replacement=True) for row in outcomes])
    ahead = outcomes.gather(1, drawn).view(2, 20_000, 6).transpose(0, 1)
    zeta = (outcomes * ALPHA).exp().sum(1)
    expected = (zeta / zeta.sum())[0]
    plain = (ALPHA * log_p + ((ALPHA - 1) * ahead).logsumexp(-1)).softmax(-1)
    bias = abs(plain[:, 0].mean() - expected)
    assert abs(jackknifed(log_p, ahead, ALPHA)[:, 0].mean() - expected) < bias / 3


class Bigrams:
    """A language model whose next token depends on the last one alone; token 0 ends a text."""

    training = False
    eval = train = lambda self, *_: self

    def __init__(self, table):
        self.table = table  # [V, V] logits

    def __call__(self, input_ids, past_key_values=None, **_):
        cache = past_key_values or SimpleNamespace(batch_repeat_interleave=lambda times: None)
        return SimpleNamespace(logits=self.table[input_ids[:, -1:]], past_key_values=cache)


class Numbers:
    """Its tokenizer: a text is its tokens' numbers."""

    def __call__(self, prompts, **_):
        ids = torch.tensor([[int(word) for word in prompt.split()] for prompt in prompts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def batch_decode(self, rows, **_):
        return [" ".join(map(str, row)).partition("0")[0] for row in rows.tolist()]


def test_it_draws_from_the_power_of_the_model(monkeypatch):
    """And token by token at the temperature 1 / alpha, without zeta, is something else."""
    monkeypatch.setattr(power_sampling, "end_tokens", lambda *_: [0])
    vocabulary, length, samples = 4, 3, 4000
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(1))
    steps = table.log_softmax(-1)
    target, low = {}, {}
    for tokens in itertools.product(range(vocabulary), repeat=length):
        text = Numbers().batch_decode(torch.tensor([tokens]))[0]
        kept = tokens[: tokens.index(0) + 1] if 0 in tokens else tokens
        pairs = list(zip((2, *kept), kept, strict=False))
        target[text] = ALPHA * sum(steps[pair].item() for pair in pairs)
        low[text] = sum((ALPHA * steps).log_softmax(-1)[pair].item() for pair in pairs)
    whole = torch.tensor(list(target.values())).logsumexp(0).item()
    options = dict(alpha=ALPHA, candidates=vocabulary, lookaheads=16)
    drawn = power_sample(Bigrams(table), Numbers(), ["2"], samples, length, 0, **options)
    assert drawn.tokens == length + vocabulary * 16 * (2 + 1)  # its own, then the lookaheads
    shares = {text: drawn.texts.count(text) / samples for text in target}
    assert sum(shares.values()) == pytest.approx(1.0)

    def apart(other):
        return sum(abs(shares[text] - math.exp(other[text])) for text in target) / 2

    assert apart({text: value - whole for text, value in target.items()}) < 0.05
    assert apart(low) > 0.1


def test_one_lookahead_is_refused():
    with pytest.raises(ValueError, match="lookaheads: expected 2 or more.*got 1"):
        power_sample(None, None, [], 1, 1, 0, alpha=2.0, candidates=2, lookaheads=1)
