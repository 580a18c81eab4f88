"""A rank of test_two_ranks_train_as_one: `offline_run.py OUT`; rank 0 keeps the weights."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from tests.integrations.test_transformers import offline, weights  # noqa: E402

if __name__ == "__main__":
    out = sys.argv[1]
    trainer = offline(
        f"{out}.run",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        optim="sgd",
        learning_rate=0.1,
        max_steps=2,
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(weights(trainer.accelerator.unwrap_model(trainer.model)), out)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can hang the interpreter's exit
