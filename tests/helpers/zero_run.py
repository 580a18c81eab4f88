"""A rank of the runs that test_zero compares: one process, and two with DeepSpeed.

The trainer with an adapter and with everything trained (whose head is recomputed or kept in
backward), and a patched model in a loop of its own. The limits on live parameters are those of a
model that does not fit: no weight stays gathered for longer than its own layer needs it.
"""

import os
from pathlib import Path

import deepspeed
import torch

from powerflow_fast import PowerFlowTrainer
from powerflow_fast.integrations.transformers import patch_head
from tests.helpers import tiny

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at run time
LIMITS = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")


def config(stage: int) -> dict:
    zero = {"stage": stage, "stage3_prefetch_bucket_size": 0}
    return {
        "zero_optimization": zero | {f"stage3_{name}": 0 for name in LIMITS},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def parameters(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shards = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(shards, enabled=bool(shards)):
                found[name] = parameter.detach().clone()
    return found


def train(folder: Path, stage: int, world: int, adapter: bool, tied: bool) -> dict:
    model = tiny.model(tie_word_embeddings=tied)
    if not adapter:  # the reference is loaded from the model's path
        model.save_pretrained(folder / f"model-{tied}")
        model = type(model).from_pretrained(folder / f"model-{tied}")
    seen = tiny.Gradients()
    trainer = PowerFlowTrainer(
        model=model,
        args=tiny.config(
            folder / "run",
            max_steps=2,
            per_device_train_batch_size=16 // world,
            optim="sgd",
            lr_scheduler_type="constant",
            deepspeed=config(stage) if stage else None,
            ddp_backend="gloo" if world > 1 else None,
        ),
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if adapter else None,
        rollout_func=tiny.rollout,
        callbacks=[seen],
    )
    trainer.train()
    policy = trainer.accelerator.unwrap_model(trainer.model)
    saved = [row["tokens/saved"] for row in seen.logs]
    losses = [row["loss"] for row in seen.logs]
    return {"losses": losses, "saved": saved, "parameters": parameters(policy)}


def loop(stage: int, world: int) -> dict:
    """Two steps of a patched model on rows of unequal length, half of them on each rank."""
    rank = int(os.environ.get("RANK", "0"))
    model = tiny.model()
    patch_head(model)
    ids = torch.arange(2, 18).reshape(2, 8)
    labels = ids.where(torch.arange(8) < torch.tensor([[8], [6]]), -100)
    own = slice(rank, rank + 1) if world > 1 else slice(None)
    if stage:
        settings = config(stage) | {"train_micro_batch_size_per_gpu": 1}
        settings.pop("gradient_accumulation_steps")
        deepspeed.init_distributed(dist_backend="gloo")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    else:
        engine, optimizer = model, torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        out = engine(input_ids=ids[own], labels=labels[own], fused_lm_head=True)
        loss = -out.log_probs.sum() * world  # DeepSpeed averages gradients over ranks
        if stage:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": [], "parameters": parameters(model)}


def run(folder: Path, stage: int, world: int, case: str) -> None:
    if case == "loop":
        result = loop(stage, world)
    else:
        result = train(folder, stage, world, adapter=case == "adapter", tied=case == "tied")
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(result, folder / f"{case}-{stage}.pt")
