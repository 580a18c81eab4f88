"""Forecasts against the optimum of LA-TB, found by listing every completion."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from powerflow_fast import tb_loss  # noqa: E402
from powerflow_fast.data.prompts import Question  # noqa: E402
from powerflow_fast.evaluation.forecast import forecast, forecast_table, power_weights  # noqa: E402
from powerflow_fast.evaluation.scores import Sampling, complete  # noqa: E402
from tests.helpers import tiny  # noqa: E402


def completions(model, prompt: str):
    """(ids, log-prob) of every completion of at most two tokens."""
    ids = torch.tensor([tiny.tokenizer()(prompt)["input_ids"]])
    tokens = torch.arange(len(tiny.WORDS.split()))
    with torch.no_grad():
        first = model(ids).logits[0, -1].double().log_softmax(-1)
        longer = torch.cat([ids.expand(len(tokens), -1), tokens[:, None]], 1)
        second = model(longer).logits[:, -1].double().log_softmax(-1)
    for a in tokens.tolist():
        if a == tiny.EOS:
            yield [a], first[a].item()
        else:
            yield from (([a, b], (first[a] + second[a, b]).item()) for b in tokens.tolist())


def optimum(model, prompt: str, alpha: float):
    """[completions] probabilities p^alpha e^(-lambda |y|), their lengths and texts, and lambda."""
    ids, logps = zip(*completions(model, prompt), strict=True)
    power = alpha * torch.tensor(logps, dtype=torch.float64)
    lengths = torch.tensor([len(y) for y in ids], dtype=torch.float64)
    low, high = -50.0, 50.0
    for _ in range(100):
        tilt = (low + high) / 2
        too_large = (power - tilt * lengths).logsumexp(0) > 0
        low, high = (tilt, high) if too_large else (low, tilt)
    texts = tiny.tokenizer().batch_decode(ids, skip_special_tokens=True)
    return (power - tilt * lengths).exp(), lengths, texts, tilt


@pytest.fixture
def model():
    """Ends early often enough that lengths matter."""
    model = tiny.model().eval()
    with torch.no_grad():
        model.lm_head.weight[tiny.EOS] = model.lm_head.weight[5] * 1.1
    return model


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_equals_the_optimum_of_the_loss(model, alpha):
    prompt = "the capital of France is"
    p, lengths, texts, _ = optimum(model, prompt, alpha)
    answer = max(zip(p, texts, strict=True), key=lambda pair: pair[0] * bool(pair[1]))[1].split()[0]
    sampling = Sampling(samples=6000, max_new_tokens=2, batch_size=2000)
    drawn = complete(model, tiny.tokenizer(), [prompt], sampling)
    [found] = forecast(drawn, [Question(prompt, (answer,))], 6000, [alpha])
    right = torch.tensor([answer in text.split() for text in texts])
    assert found.accuracy == pytest.approx(float(p[right].sum()), abs=0.03)
    assert found.mean_length == pytest.approx(float((p * lengths).sum()), abs=0.03)
    assert 1 < float((p * lengths).sum()) < 2
    per_token = float((p * p.log()).sum() / (p * lengths).sum())
    assert found.policy_logp == pytest.approx(per_token, abs=0.03)
    if alpha >= 1:
        assert found.likeliest == (texts[int(p.argmax())],)
    if alpha == 1:
        assert found.effective_samples == pytest.approx(6000)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_loss_is_0_at_that_optimum(model, alpha):
    p, lengths, _, tilt = optimum(model, "rain", alpha)
    logps = [logp for _, logp in completions(model, "rain")]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

    def per_token(sums):
        return (sums / lengths).repeat_interleave(lengths.long())

    reference = per_token(torch.tensor(logps, dtype=torch.float64))
    log_z = torch.full_like(lengths, tilt)
    out = tb_loss(per_token(p.log()), reference, alpha=alpha, log_z=log_z, cu_seqlens=cu_seqlens)
    assert float(out.loss) < 1e-12


def test_weights_by_hand():
    logps = torch.tensor([[-1.0, -2.0, -2.0], [-1.0, -60.0, -60.0]])
    even = power_weights(logps, torch.ones(2, 3), 3.0)
    torch.testing.assert_close(even.sum(1), torch.ones(2, dtype=torch.float64))
    assert float(even[0, 0] / even[0, 1]) == pytest.approx(torch.e**2)
    assert float(even[1, 0]) == pytest.approx(1.0)
    # Weights 1/4 a token each average 1 at lambda = -log 4: lengths do not matter then.
    lengths = torch.tensor([[1.0, 2.0, 3.0]])
    assert power_weights(-lengths * torch.tensor(4.0).log(), lengths, 2.0).tolist() == [
        pytest.approx([1 / 3] * 3)
    ]


def test_report_without_answers(model):
    questions = [Question("rain"), Question("the sea")]
    sampling = Sampling(samples=4, max_new_tokens=3)
    drawn = complete(model, tiny.tokenizer(), [q.prompt for q in questions], sampling)
    found = forecast(drawn, questions, 4, [1.0, 4.0])
    lines = forecast_table(found, 4).splitlines()
    assert lines[0].split() == ["alpha", "1", "4"]
    assert lines[1].split() == ["accuracy", "-", "-"]
    assert lines[5].split()[:7] == ["samples", "that", "carry", "it,", "of", "4", "4.0"]
    assert all(len(f.likeliest) == 2 for f in found)
