"""The 70B step's script at a small fraction of the size, on a CPU."""

import pytest
import torch

pytest.importorskip("trl")

from benchmarks.llama_70b_step import PackedLinear, main  # noqa: E402


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.5 * 0.3039492), ("fp8", 2**-4)])
def test_packed_weights_are_near_and_their_product_exact(kind, error):
    """NF4's widest gap is 0.304 (-1 to -0.696) of a block's largest value, fp8 rounds by 2^-4."""
    dense = torch.randn(24, 128)
    layer = PackedLinear(dense, kind)
    blocks = dense.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((layer.unpacked() - dense).view(-1, 64).abs() <= error * blocks * 1.001).all()
    assert layer.packed.numel() == dense.numel() // (2 if kind == "nf4" else 1)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    (expected @ layer.unpacked().T).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
    assert layer.unpacked().unique().numel() > 20


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_steps_run_and_learn(tmp_path, capsys, kind):
    size = ["--scale", "20000", "--tokens", "16", "--steps", "2", "--device", "cpu"]
    rows = main([*size, "--weights", kind, "--output-dir", str(tmp_path)])
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > rows[0]["kl"]
    assert all(row["tokens_per_second"] > 0 and row["peak_gb"] > 0 for row in rows)
    assert "plan: weights" in capsys.readouterr().out
