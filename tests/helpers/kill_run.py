"""Runs that are killed, or resumed by another number of processes, for test_checkpoint.py."""

import functools
import os
import random
import resource
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from powerflow_fast import PowerFlowTrainer
from powerflow_fast.training.vllm_adapter import AdapterRollout
from tests.helpers import ranks, tiny

KILL = dict(  # each rollout serves six steps; several epochs of shuffled data
    max_steps=16,
    per_device_train_batch_size=4,
    steps_per_generation=3,
    num_iterations=2,
    shuffle_dataset=True,
    save_steps=1,
    save_total_limit=2,
    lr_scheduler_type="linear",
)
RESIZE = dict(save_steps=2, optim="sgd", lr_scheduler_type="constant")


def train(
    folder: Path, world: int, sharded: bool = False, callbacks=(), url: str = "", **options
) -> None:
    """A rank of a run in `folder`, which goes on from the last checkpoint there. A server at `url`
    draws its rollouts; without one they are transformers'."""
    if sharded:
        ranks.shard_on_cpu()
    tiny.start_log_z_off_its_estimate()
    rollout: Any = tiny.rollout if options.get("optim") == "sgd" else None
    if url:
        rollout = AdapterRollout(url, str(folder / "adapters"))
    backend = {"ddp_backend": "gloo"} if world > 1 else {}
    trainer = PowerFlowTrainer(
        model=tiny.model(),
        args=tiny.config(folder, log_z="learned", save_strategy="steps", **options | backend),
        train_dataset=tiny.dataset(4 if rollout is tiny.rollout else world),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(),
        rollout_func=rollout,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint="last")
    policy = trainer.accelerator.unwrap_model(trainer.model)
    state = {n: ranks.whole(p) for n, p in policy.named_parameters() if p.requires_grad}
    state |= {f"log_z.{n}": p for n, p in trainer.log_z.head.state_dict().items()}
    if trainer.accelerator.is_main_process:
        torch.save(state, folder / "end.part")
        os.replace(folder / "end.part", folder / "end.pt")


def start(folder: Path, world: int, **options) -> list[BaseProcess]:
    folder.mkdir(parents=True, exist_ok=True)
    return ranks.start(world, functools.partial(train, folder, world, **options), folder.parent)


def finish(folder: Path, world: int, **options) -> dict:
    """Run to the end; the parameters."""
    ranks.finish(world, functools.partial(train, folder, world, **options), folder.parent)
    return torch.load(folder / "end.pt", weights_only=True)


def kill(folder: Path, world: int, kills: int, seed: int, **more) -> None:
    options = KILL | more
    draw, began = random.Random(seed), time.monotonic()
    expected = finish(folder / "whole", world, **options)
    length = time.monotonic() - began
    reached, runs = [], 0
    run = folder / "killed0"
    for _ in range(kills):
        running = start(run, world, **options)
        at = reached_step(run)
        wait_for(run, draw.randint(at, min(at + 5, KILL["max_steps"])))
        time.sleep(draw.uniform(0, 2 * length / KILL["max_steps"]))
        for rank in running:
            rank.kill()
        ranks.ended(running)
        reached.append(reached_step(run))
        if (run / "end.pt").exists():  # it was through: another run to kill
            same(torch.load(run / "end.pt", weights_only=True), expected)
            run = folder / f"killed{(runs := runs + 1)}"
    same(finish(run, world, **options), expected)
    saved = load_file(run / f"checkpoint-{KILL['max_steps']}" / "adapter_model.safetensors")
    adapter = {n.replace(".default.", "."): p for n, p in expected.items() if "lora" in n}
    same(saved, adapter)  # the whole of it, which PEFT can load
    print(f"last checkpoints when killed: {reached}; a whole run takes {length:.1f} s")


def reached_step(run: Path) -> int:
    """Of the last whole checkpoint."""
    return max([0, *(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))])


def wait_for(run: Path, step: int, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while reached_step(run) < step and time.monotonic() < end:
        time.sleep(0.005)


def resize(folder: Path) -> None:
    """Saved by 2 and loaded by 1, and the reverse, against a run of one process."""
    batch = {world: dict(RESIZE, per_device_train_batch_size=8 // world) for world in (1, 2)}
    expected = finish(folder / "one", 1, max_steps=4, **batch[1])
    finish(folder / "two", 2, max_steps=2, **batch[2])
    shutil.copytree(folder / "one" / "checkpoint-2", folder / "back" / "checkpoint-2")
    full(folder)
    same(finish(folder / "two", 1, max_steps=4, **batch[1]), expected, 2e-5)
    same(finish(folder / "back", 2, max_steps=4, **batch[2]), expected, 2e-5)


def full(folder: Path) -> None:
    """One of two ranks cannot write any more: both end, the other says why, and none hangs."""
    options = dict(RESIZE, per_device_train_batch_size=4, max_steps=4, callbacks=[FullDisk()])
    running = start(folder / "two", 2, **options)
    assert not ranks.ended(running)
    last = (folder / "log_0.txt").read_text().splitlines()[-1]  # rank 1 cannot even write its log
    assert "CheckpointError: could not write" in last and "checkpoint-2" in last, last


class FullDisk(tiny.TrainerCallback):
    """On rank 1, no file can grow beyond 100 bytes from step 3 on."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def same(got: dict, expected: dict, tolerance: float = 0.0) -> None:
    assert got.keys() == expected.keys() and got
    for name, value in expected.items():
        error = (got[name] - value).abs().max().item()
        assert error <= tolerance, (name, error)
