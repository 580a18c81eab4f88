"""The 70B step's script at a small fraction of the size, on a CPU."""

import pytest
import torch

pytest.importorskip("trl")
bitsandbytes = pytest.importorskip("bitsandbytes")

from benchmarks.llama_70b_step import (  # noqa: E402
    Fp8Linear,
    arguments,
    build,
    main,
    make_trainer,
    nf4,
    scaled,
)
from powerflow_fast.models.shapes import model_shape  # noqa: E402


def nf4_unpacked(layer):
    return bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.5 * 0.3039492), ("fp8", 2**-4)])
def test_packed_weights_are_near_and_their_product_exact(kind, error):
    """NF4's widest gap is 0.304 (-1 to -0.696) of a block's largest value, fp8 rounds by 2^-4."""
    linear = torch.nn.Linear(128, 24, bias=False)
    dense = linear.weight.data.normal_().clone()
    layer = nf4(linear) if kind == "nf4" else Fp8Linear(dense)
    unpacked = nf4_unpacked(layer) if kind == "nf4" else layer.unpacked()
    blocks = dense.view(-1, 64).abs().amax(1, keepdim=True)
    # Doubly quantised scales are off by up to 1/100 of the largest of them.
    assert ((unpacked - dense).view(-1, 64).abs() <= (error + 0.02) * blocks.max()).all()
    packed = layer.weight if kind == "nf4" else layer.packed
    assert packed.nbytes == dense.numel() // (2 if kind == "nf4" else 1)
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    (expected @ unpacked.T).square().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)
    assert unpacked.unique().numel() > 20


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_steps_run_and_learn(tmp_path, kind):
    size = ["--scale", "20000", "--tokens", "16", "--steps", "2", "--device", "cpu"]
    facts, *rows = main([*size, "--weights", kind, "--output-dir", str(tmp_path)])
    assert facts["parameters"] > 0 and facts["planned_bytes"] > facts["planned_weights_bytes"]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > rows[0]["kl"]
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows)


def test_sequences_of_the_full_length_are_within_the_models_context(tmp_path):
    options = arguments(["--tokens", "8192", "--device", "cpu", "--output-dir", str(tmp_path)])
    shape = scaled(model_shape("Llama-3-70B"), 20000, None)
    model = build(shape, "bf16", torch.device("cpu"), torch.float32, options.tokens)
    trainer = make_trainer(model, options)
    prompt = trainer.train_dataset[0]["prompt"]
    assert len(trainer.processing_class(prompt)["input_ids"]) == 8192 // 8
    assert trainer.args.max_completion_length == 8192 - 8192 // 8
