"""A rank of the runs that test_two_processes_equal_one compares.

One process, two with DDP, two with FSDP2; each run leaves its losses and parameters.
"""

import itertools
import os
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from powerflow_fast import PowerFlowTrainer
from tests.helpers import ranks, tiny


def run(folder: Path, kind: str) -> None:
    tiny.start_log_z_off_its_estimate()
    if kind == "fsdp2":
        ranks.shard_on_cpu()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    results = {"losses": [], "saved": [], "parameters": {}}
    # Micro-batches of whole groups, and groups that lie on both ranks.
    for log_z, per_rank in itertools.product(("group", "learned"), (8, 2)):
        seen = tiny.Gradients()
        trainer = PowerFlowTrainer(
            model=tiny.model(),
            args=tiny.config(
                folder / kind,
                log_z=log_z,
                max_steps=2,
                per_device_train_batch_size=per_rank,
                gradient_accumulation_steps=16 // (per_rank * world),
                optim="sgd",
                lr_scheduler_type="constant",
                ddp_backend="gloo" if world > 1 else None,
            ),
            train_dataset=tiny.dataset(),
            processing_class=tiny.tokenizer(),
            peft_config=tiny.lora(),
            rollout_func=tiny.rollout,
            callbacks=[seen],
        )
        assert trainer.accelerator.num_processes == world
        trainer.train()
        results["losses"] += [row["loss"] for row in seen.logs]
        results["saved"] += [row["tokens/saved"] for row in seen.logs]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        name = f"{log_z}{per_rank}"
        parts = {name: policy, f"{name}.head": trainer.log_z and trainer.log_z.head}
        for prefix, module in parts.items():
            for key, value in module.named_parameters() if module is not None else ():
                if value.requires_grad:
                    assert isinstance(value, DTensor) == (module is policy and kind == "fsdp2")
                    results["parameters"][f"{prefix}.{key}"] = ranks.whole(value)
    if trainer.accelerator.is_main_process:
        torch.save(results, folder / f"{kind}.pt")
