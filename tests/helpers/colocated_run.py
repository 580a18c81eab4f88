"""A process that trains with vLLM inside it, for tests/vllm/test_colocated.py.

    python -m tests.helpers.colocated_run FOLDER adapter|full

writes FOLDER/adapter.json or full.json. vLLM must be on PYTHONPATH. Runs in one folder share the
model's path, and with it what vLLM has compiled.
"""

import json
import sys
from pathlib import Path

import torch
import vllm.model_executor.layers.utils as vllm_layers
from datasets import Dataset

from powerflow_fast import PowerFlowTrainer
from powerflow_fast.training.health import TrainingStopped
from tests.helpers import tiny

WORDS = 140  # of a prompt: more than a block of vLLM's cache, which has 128 tokens on a CPU
GAP = "sampling/sampling_logp_difference"
KEPT = {"kl": "kl", "gap": f"{GAP}/mean", "max": f"{GAP}/max"}


def keep_weights(layer, remove_weight: bool) -> None:
    """In place of vLLM's choice of a CPU product, which packs weights and drops the parameters that
    TRL sends the next ones to. A GPU's layers keep theirs."""
    layer.cpu_linear = torch.nn.functional.linear


def make(folder: Path, adapter: bool) -> PowerFlowTrainer:
    vllm_layers.dispatch_cpu_unquantized_gemm = keep_weights
    # The smallest head that vLLM's attention takes on a CPU has 32 dimensions.
    size = dict(hidden_size=64, intermediate_size=128, max_position_embeddings=256)
    tiny.model(**size, initializer_range=0.22).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tiny.WORDS.split()), (4, WORDS), generator=draw)
    prompts = tiny.tokenizer().batch_decode(ids)
    args = tiny.config(
        folder / "run",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=256,
        temperature=0.7,
        lr_scheduler_type="constant",
        learning_rate=2e-2 if adapter else 3e-3,  # so that a few steps move the policy far
        max_completion_length=16,
        per_device_train_batch_size=16,
        stop_on_collapse=False,
    )
    return PowerFlowTrainer(
        str(folder / "model"),
        args,
        Dataset.from_dict({"prompt": prompts * 4}),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if adapter else None,
    )


def run(trainer: PowerFlowTrainer, steps: int) -> list[dict[str, float]]:
    """What each step logged."""
    trainer.args.max_steps = steps
    trainer.train()
    logged = [row for row in trainer.state.log_history if "kl" in row]
    assert len(logged) == steps
    return [{short: row[name] for short, name in KEPT.items()} for row in logged]


def scores(trainer: PowerFlowTrainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of policy and reference, of the same tokens at each call."""
    draw = torch.Generator().manual_seed(1)
    rollout = {}
    for part, length in (("prompt", 8), ("completion", 8)):
        size = (4, length)
        rollout[f"{part}_ids"] = torch.randint(2, len(tiny.WORDS.split()), size, generator=draw)
        rollout[f"{part}_mask"] = torch.ones(size, dtype=torch.long)
    return trainer._score(rollout)


def fixed(trainer: PowerFlowTrainer) -> dict[str, torch.Tensor]:
    """Copies of the reference's parameters: a model of its own, or the base under the adapter."""
    named = (trainer.ref_model or trainer.model).named_parameters()
    return {n: p.detach().clone() for n, p in named if trainer.ref_model or not p.requires_grad}


def main(folder: Path, kind: str) -> None:
    adapter = {"adapter": True, "full": False}[kind]
    trainer = make(folder, adapter)
    before, (_, reference) = fixed(trainer), scores(trainer)
    steps = [run(trainer, count) for count in ((1, 1, 3) if adapter else (2,))]
    after, (policy, reference_now) = fixed(trainer), scores(trainer)
    figures = {
        "steps": sum(steps, []),
        "fixed": len(before),
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
        "reference_moved": (reference_now - reference).abs().max().item(),
        "policy_moved": (policy - reference).abs().mean().item(),
    }
    if adapter:  # last, for it spoils the trainer
        trainer.vllm_generation.llm.reset_prefix_cache = lambda: True
        try:
            run(trainer, 6)
        except TrainingStopped as error:
            figures["stopped"] = str(error)
    (folder / f"{kind}.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
