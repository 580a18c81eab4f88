"""The runs that test_two_processes_equal_one compares: `ddp_run.py FOLDER`.

One process, two with DDP, two with FSDP2; each leaves its losses and parameters.
"""

import faulthandler
import functools
import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from powerflow_fast import PowerFlowTrainer  # noqa: E402
from tests.helpers import ranks, tiny  # noqa: E402


def run(out: str, kind: str) -> None:
    faulthandler.dump_traceback_later(120, exit=True)  # a hang says where
    torch.set_num_threads(1)
    tiny.start_log_z_off_its_estimate()
    if kind == "fsdp2":
        ranks.shard_on_cpu()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    results = {"losses": [], "parameters": {}}
    # Micro-batches of whole groups, and groups that lie on both ranks.
    for log_z, per_rank in itertools.product(("group", "learned"), (8, 2)):
        seen = tiny.Gradients()
        trainer = PowerFlowTrainer(
            model=tiny.model(),
            args=tiny.config(
                f"{out}.run",
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
        policy = trainer.accelerator.unwrap_model(trainer.model)
        name = f"{log_z}{per_rank}"
        parts = {name: policy, f"{name}.head": trainer.log_z and trainer.log_z.head}
        for prefix, module in parts.items():
            for key, value in module.named_parameters() if module is not None else ():
                if value.requires_grad:
                    assert isinstance(value, DTensor) == (module is policy and kind == "fsdp2")
                    results["parameters"][f"{prefix}.{key}"] = ranks.whole(value)
    if trainer.accelerator.is_main_process:
        torch.save(results, out)
    if world > 1:
        torch.distributed.barrier()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind, world in (("one", 1), ("ddp", 2), ("fsdp2", 2)):
        work = functools.partial(run, str(folder / f"{kind}.pt"), kind)
        ranks.finish(world, work, folder / kind)
