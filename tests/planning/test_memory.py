"""`powerflow-fast plan`: its counts against real steps, against each other, and its tables."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from powerflow_fast.cli import main  # noqa: E402
from powerflow_fast.models.shapes import FAMILIES, ModelShape, model_shape  # noqa: E402
from powerflow_fast.planning.memory import (  # noqa: E402
    Run,
    activation_bytes,
    backward_bytes,
    flops_per_token,
    largest_micro_batch,
    layer_activations,
    lora_parameters,
    plan,
)
from tests.helpers import plan_run, ranks, tiny  # noqa: E402
from tests.helpers.kept_tensors import kept_by_a_layer, peak_of_a_step  # noqa: E402

LLAMA = model_shape("Llama-3-70B")


@pytest.mark.parametrize(
    ("kind", "checkpointing", "fused", "prompt"),
    [
        ("llama", True, True, 0),
        ("llama", False, False, 0),
        ("phi3", True, True, 0),
        ("phi3", False, True, 0),
        ("llama", True, True, 160),
        ("llama", False, True, 160),
    ],
)
def test_counts_are_the_measured_peak_of_a_real_step(kind, checkpointing, fused, prompt, tmp_path):
    """Within -5 % and +20 %: a plan that errs should err on the safe side.

    Seen when this was written, with the combinations left out: -3 to +10 %.
    """
    found = tmp_path / "bytes"
    ranks.finish(1, partial(plan_run.measure, found, kind, checkpointing, fused, prompt), tmp_path)
    measured = int(found.read_text())
    memory = plan(plan_run.run_of(kind, checkpointing, prompt), plan_run.SEQUENCES, fused)
    counted = memory.activations + max(memory.head, memory.backward)
    print(f"counted {counted / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.95 < counted / measured < 1.2


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"gemma2"}))  # whose attention keeps scores
@pytest.mark.parametrize(("weights", "rank"), [("bf16", 8), ("fp32", 8), ("fp32", 0)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_layers_activations_are_those_that_autograd_keeps(kind, weights, rank, kv_heads):
    """Seen when this was written: 2 % below, without masks and means of norms, to 14 % above."""
    shape = ModelShape(kind, 96, 64, 2, 4, kv_heads, 32, 256)
    counted = layer_activations(Run(shape, weights=weights, lora_rank=rank))
    for padded in (False, True):
        kept = kept_by_a_layer(shape, weights, rank, padded)
        print(f"padded {padded}: counted {counted:.0f}, kept {kept:.0f} bytes a token")
        assert 0.98 < counted / kept < 1.15


@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_in_bf16_with_lora_take_what_a_step_takes(kind, checkpointing):
    """Seen when this was written: 1 to 5 % above."""
    shape = ModelShape(kind, 128, 64, 4, 4, 4 if kind == "phi3" else 2, 32, 384)
    run = Run(shape, lora_rank=8, tokens=1, checkpointing=checkpointing)
    of_the_states = run.width * shape.hidden_size  # their gradient, which comes from the head
    counted = activation_bytes(run, 1) + backward_bytes(run, 1) + of_the_states
    peak = peak_of_a_step(shape, "bf16", 8, checkpointing)
    print(f"counted {counted:.0f}, at the peak {peak:.0f} bytes a token")
    assert 0.99 < counted / peak < 1.1


def test_a_fused_layer_is_dequantised_whole():
    shape = model_shape("Phi-4")
    assert plan(Run(shape, weights="nf4"), 1).gathered == 2 * 5120 * 2 * 17920


@pytest.mark.parametrize("kind", plan_run.SHAPES)
def test_weights_and_adapter_are_those_of_the_model(kind):
    model = plan_run.build(kind, False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(plan_run.SHAPES[kind], 8) == trained
    memory = plan(plan_run.run_of(kind, False), 1)
    assert memory.weights == 4 * (sum(p.numel() for p in model.parameters()) - trained)
    assert memory.adapter == memory.gradients == memory.optimizer / 2 == 4 * trained
    for name in ("Llama-3-70B", "Qwen2.5-7B"):
        shape = model_shape(name)
        with torch.device("meta"):
            full = AutoModelForCausalLM.from_config(shape.to_config())
            full = get_peft_model(full, LoraConfig(r=16, target_modules="all-linear"))
        trained = sum(p.numel() for p in full.parameters() if p.requires_grad)
        assert lora_parameters(shape, 16) == trained


def test_seventy_billion_on_one_gpu():
    run = Run(LLAMA, weights="nf4", lora_rank=16, tokens=8192)
    memory = plan(run, 1)
    assert 39e9 < memory.weights < 40e9  # 68.5e9 at 4.127 bits and 2.1e9 at 16
    assert largest_micro_batch(run) >= 1
    assert largest_micro_batch(replace(run, weights="bf16")) == 0
    assert plan(run, 1, fused=False).head > 8 * memory.head
    no_checkpoints = replace(run, checkpointing=False)
    assert largest_micro_batch(no_checkpoints) == 0


def test_seventy_billion_on_two_gpus():
    resident = Run(LLAMA, gpus=2, sharding="fsdp")
    assert largest_micro_batch(resident) == 0  # half of 141 GB, and what is gathered
    offloaded = replace(resident, offload=True)
    assert largest_micro_batch(offloaded) >= 1
    memory = plan(offloaded, 1)
    assert memory.weights == memory.optimizer == 0 and memory.host > 141e9


def test_an_offloaded_reference_is_there_when_activations_are_not():
    run = Run(model_shape("Qwen2.5-7B"), lora_rank=0)
    kept, offloaded = plan(run, 4), plan(replace(run, offload_reference=True), 4)
    assert offloaded.reference == 0 and offloaded.host == kept.reference == kept.weights
    assert offloaded.scoring == kept.weights + kept.head
    step = kept.activations + max(kept.head, kept.backward)
    expected = kept.total - kept.weights - step + max(step, offloaded.scoring)
    assert offloaded.total == pytest.approx(expected) and offloaded.total < kept.total
    few = plan(replace(run, tokens=64, offload_reference=True), 1)  # the copy outweighs a step
    assert few.total == few.weights + few.gradients + few.optimizer + few.scoring


def test_the_largest_micro_batch_is_the_largest():
    for tokens in (512, 4096):
        run = Run(model_shape("Qwen2.5-7B"), memory_gb=40, tokens=tokens)
        fits = largest_micro_batch(run)
        assert plan(run, fits).total <= 0.95 * 40e9 < plan(run, fits + 1).total
        assert largest_micro_batch(run, fused=False) < fits


def test_the_command_answers(capsys, tmp_path):
    assert main(["plan", "Llama-3-70B", "--weights", "nf4"]) == 0
    out = capsys.readouterr().out
    assert "weights (nf4)" in out and "not measured" in out and "nan" not in out
    rows = re.findall(r"largest micro-batch +(\d+) +(\d+)", out)
    assert int(rows[0][0]) >= int(rows[0][1])
    tiny.model().save_pretrained(tmp_path / "model")
    argv = ["plan", str(tmp_path / "model"), "--tokens", "64", "--tflops", "100"]
    assert main(argv) == 0
    assert "100 TFLOP/s (given)" in capsys.readouterr().out
    argv = ["plan", "Llama-3-70B", "--gpus", "2", "--sharding", "fsdp", "--offload"]
    assert main(argv) == 0 and "main memory" in capsys.readouterr().out


def test_a_shared_prompt_counts_once_a_group(capsys):
    """256 tokens of prompt, 64 of completion, groups of 8: 768 of 2560 tokens."""
    each = Run(model_shape("SmolLM2-135M"), tokens=320, completions=8)
    once = replace(each, prompt_tokens=256, group=8)
    assert [once.computed_tokens(n) for n in (1, 8, 9, 16)] == [320, 768, 1088, 1536]
    assert each.computed_tokens(8) == 2560
    for checkpointing in (True, False):
        two = (replace(run, checkpointing=checkpointing) for run in (each, once))
        more, less = (activation_bytes(run, 8) for run in two)
        assert 2.2 < more / less < 3.4
    assert 2 < flops_per_token(each) / flops_per_token(once) < 3.6
    assert largest_micro_batch(once) > 2 * largest_micro_batch(each)
    argv = ["SmolLM2-135M", "--tokens", "320", "--prompt-tokens", "256", "--micro-batch", "8"]
    assert main(["plan", *argv]) == 0
    said = capsys.readouterr().out
    assert "8 completions share a prompt of 256 tokens: 768 of 2560 tokens are computed" in said


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["Llama-3-70B", "--memory-gb", "0"], "memory_gb"),
        (["Llama-3-70B", "--weights", "int3"], "invalid choice"),
        (["Llama-3-70B", "--weights", "nf4", "--lora-rank", "0"], "LoRA"),
        (["Llama-3-70B", "--offload"], "sharding"),
        (["Llama-3-70B", "--offload-reference"], "lora_rank=0"),
        (["Llama-3-70B", "--micro-batch", "-1"], "micro_batch: expected a number > 0"),
        (["Llama-3-70B", "--micro-batch", "0"], "micro_batch: expected a number > 0"),
        (["Llama-3-70B", "--memory-gb", "inf"], "memory_gb: expected a number > 0 and at most"),
        (["Llama-3-70B", "--memory-gb", "nan"], "memory_gb: expected a number > 0 and at most"),
        (["Llama-3-70B", "--tokens", "9" * 400], "tokens: expected a number > 0 and at most"),
        (["Llama-3-70B", "--lora-rank", "9" * 400], "lora_rank: expected 0 to"),
        (["Llama-3-70B", "--tflops", "0"], "tflops: expected a number > 0"),
        (["Llama-3-70B", "--tflops", "nan"], "tflops: expected a number > 0"),
        (
            ["Llama-3-70B", "--tokens", "64", "--prompt-tokens", "64"],
            "prompt_tokens: expected 0 to",
        ),
        (["Llama-3-70B", "--prompt-tokens", "-1"], "prompt_tokens: expected 0 to 8191"),
        (["Llama-3-70B", "--group", "0"], "group: expected a number > 0"),
    ],
)
def test_bad_questions_get_one_line(capsys, argv, word):
    assert main(["plan", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and word in err
