"""LogZHead."""

import pytest
import torch

from powerflow_fast import LogZHead


def test_starts_at_zero_and_after_warm_start_at_the_estimate():
    head = LogZHead(8)
    hidden, mask = torch.randn(3, 5, 8), torch.ones(3, 5)
    assert torch.equal(head(hidden, mask), torch.zeros(3))
    head.warm_start(torch.tensor([-1.0, -2.0]))
    assert torch.equal(head(hidden, mask), torch.full((3,), -1.5))
    head.warm_start(0.25)
    assert torch.equal(head(hidden[:, 0]), torch.full((3,), 0.25))


def test_pools_the_masked_mean_in_float32():
    head = LogZHead(8, num_layers=2)
    torch.nn.init.normal_(head.out.weight)
    hidden = torch.randn(2, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 0]])
    pooled = torch.stack([hidden[0, :3].mean(0), hidden[1, 1:3].mean(0)])
    expected = head(pooled)
    poisoned = hidden.masked_fill(mask[..., None] == 0, torch.nan)
    torch.testing.assert_close(head(poisoned, mask), expected)
    assert expected[0] != expected[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(hidden.to(torch.bfloat16), mask)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, head(hidden.to(torch.bfloat16).float(), mask))


def test_learns_a_function_of_the_prompt():
    head = LogZHead(8)
    prompts = torch.randn(16, 8)
    wanted = prompts[:, 0] - 2
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(200):
        loss = (head(prompts) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2


def test_bad_input_names_the_argument():
    head = LogZHead(8)
    with pytest.raises(ValueError, match="^hidden: expected"):
        head(torch.randn(3, 7))
    with pytest.raises(ValueError, match="^mask: expected"):
        head(torch.randn(3, 5, 8))
    with pytest.raises(ValueError, match="^mask: expected"):
        head(torch.randn(3, 5, 8), torch.ones(3, 4))
    for mask in ([[1] * 5] * 3, torch.full((3, 5), 0.5)):
        with pytest.raises(ValueError, match="^mask: expected"):
            head(torch.randn(3, 5, 8), mask)
    with pytest.raises(ValueError, match="^estimate: expected"):
        head.warm_start(float("nan"))
    with pytest.raises(ValueError, match="^hidden_size"):
        LogZHead(0)
