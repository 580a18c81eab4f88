"""One step of TRL's GRPO, loss and backward, with its own head and with ours.

    pytest benchmarks/test_grpo_step.py -s

Each figure comes from a process of its own: time is the median of several steps, memory the peak
of a step beside what is resident before it (on a GPU, the allocator's peak).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks import memory

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3
CPU = dict(vocab=49152, hidden=576, batch=8, length=48)
GPU = dict(vocab=151936, hidden=4096, batch=16, length=512)


def build(sizes: dict[str, int], adapter: bool, folder: str):
    """A GRPOTrainer around a random model of two layers, and the inputs of one step."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig, GRPOTrainer

    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=2 * sizes["hidden"],
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16 if gpu else torch.float32)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "word": 2}, unk_token="word"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    args = GRPOConfig(
        folder,
        use_cpu=not gpu,
        bf16=False,
        per_device_train_batch_size=sizes["batch"],
        num_generations=sizes["batch"],
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["word"]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if adapter else None,
    )
    shape, device = (sizes["batch"], sizes["length"]), trainer.accelerator.device
    ids = torch.randint(2, sizes["vocab"], (2, *shape), device=device)
    mask = torch.ones(shape, dtype=torch.long, device=device)
    mask[::2, sizes["length"] // 2 :] = 0  # half of the completions are half as long
    inputs = dict(
        prompt_ids=ids[0],
        prompt_mask=torch.ones_like(mask),
        completion_ids=ids[1] * mask,
        completion_mask=mask,
        advantages=torch.randn(sizes["batch"], device=device),
        num_items_in_batch=mask.sum(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, inputs


def measure(what: str, head: str, adapter: bool, sizes: dict[str, int]) -> dict[str, float]:
    """The loss, and of a step the median "seconds" or the extra "bytes" at its peak."""
    from powerflow_fast.integrations.trl import install_head

    with (
        tempfile.TemporaryDirectory() as folder,
        install_head() if head == "ours" else nullcontext(),
    ):
        trainer, inputs = build(sizes, adapter, folder)

    def step() -> float:
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.item()  # waits for a GPU

    loss = step()  # loads libraries, starts threads, allocates gradients
    if what == "seconds":
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return {"loss": loss, what: statistics.median(times)}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return {"loss": loss, what: torch.cuda.max_memory_allocated() - before}
    memory.reset_resident_peak()
    before = memory.resident("VmRSS")
    step()
    return {"loss": loss, what: memory.resident("VmHWM") - before}


def in_child_processes(head: str, adapter: bool, sizes: dict[str, int]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for what in ("seconds", "bytes"):
        # As glibc frees blocks it raises this threshold and then keeps them: they would not count.
        # Below it every block is new pages, which would count as time.
        env = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if what == "bytes" else {})
        arguments = [what, head, str(int(adapter)), json.dumps(sizes)]
        command = [sys.executable, "-m", "benchmarks.test_grpo_step", *arguments]
        run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        figures |= json.loads(run.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "full"])
def test_grpo_is_no_slower_and_no_larger_with_this_head(adapter, session):
    sizes = GPU if torch.cuda.is_available() else CPU
    theirs, ours = (in_child_processes(head, adapter, sizes) for head in ("trl", "ours"))
    for name, row in (("TRL's head", theirs), ("this head", ours)):
        cost = f"{row['seconds']:.2f} s a step, {row['bytes'] / 1e6:.0f} MB extra"
        session.notes.append(f"GRPO with {name}: {cost}")
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2, abs=1e-3)
    assert ours["seconds"] <= theirs["seconds"]
    assert ours["bytes"] <= theirs["bytes"]


if __name__ == "__main__":
    what, head, adapter, sizes = sys.argv[1:]
    print(json.dumps(measure(what, head, adapter == "1", json.loads(sizes))))
