"""Runs whose rollouts a real vLLM server draws, for tests/vllm/."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file

from powerflow_fast import PowerFlowTrainer
from powerflow_fast.training.vllm_adapter import AdapterRollout
from tests.helpers import ranks, tiny
from tests.helpers.vllm_process import toy_model

WORDS = 64  # of a prompt: two blocks of vLLM's prefix cache, which keeps whole ones
GAP = "sampling/sampling_logp_difference/max"
EXACT = 1e-4  # nats; float32 gives 1e-5 here, another adapter 0.1 and more
OPTIONS = dict(
    temperature=0.7,
    learning_rate=2e-2,  # so that a few steps move the policy far
    lr_scheduler_type="constant",
    max_completion_length=16,
    stop_on_collapse=False,
    save_strategy="steps",
    save_steps=100,
)


def prompts() -> list[str]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(tiny.WORDS.split()), (4, WORDS), generator=draw)
    return tiny.tokenizer().batch_decode(ids)


def make(folder: Path, rollout: AdapterRollout | str, *, model=None, lora=None, **options):
    """A trainer in `folder`; a rollout given by its URL hands adapters over in a folder there."""
    if isinstance(rollout, str):
        rollout = AdapterRollout(rollout, str(folder / "adapters"), server_timeout=5.0)
    callbacks = options.pop("callbacks", [])
    return PowerFlowTrainer(
        model=model or toy_model(),
        args=tiny.config(folder, **OPTIONS | options),
        train_dataset=Dataset.from_dict({"prompt": prompts() * 4}),
        processing_class=tiny.tokenizer(),
        peft_config=lora or tiny.lora(),
        rollout_func=rollout,
        callbacks=callbacks,
    )


class Kills(tiny.TrainerCallback):
    """Ends its process after a step as SIGKILL does, with what it has asked for in flight."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, url: str, kill_at: int = 0, **options) -> None:
    """A process of a run, which goes on from the last checkpoint and says what it logged."""
    callbacks = [Kills(kill_at)] if kill_at else []
    timeout = options.pop("timeout", 60.0)
    rollout = AdapterRollout(url, str(folder / "adapters"), timeout, server_timeout=5.0)
    trainer = make(folder, rollout, callbacks=callbacks, **options)
    trainer.train(resume_from_checkpoint="last")
    if trainer.accelerator.is_main_process:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        state = {n: p.detach() for n, p in policy.named_parameters() if p.requires_grad}
        torch.save(state, folder / "end.pt")
        (folder / "steps.json").write_text(json.dumps(steps(trainer)))


def start(folder: Path, url: str, world: int = 1, **options) -> list[BaseProcess]:
    folder.mkdir(parents=True, exist_ok=True)
    if world > 1:
        options["ddp_backend"] = "gloo"
    return ranks.start(world, functools.partial(train, folder, url, **options), folder / "logs")


def said(folder: Path) -> str:
    """The end of what each process wrote."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("logs/log_*.txt")))


def finish(folder: Path, url: str, world: int = 1, **options) -> dict[str, torch.Tensor]:
    """A run in processes of its own; its parameters at the end."""
    assert ranks.ended(start(folder, url, world, **options)), said(folder)
    return end(folder)


def end(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "end.pt", weights_only=True)


def steps(trainer: PowerFlowTrainer) -> list[dict[str, float]]:
    """What each step logged."""
    return [row for row in trainer.state.log_history if "kl" in row]


def check(rows: list[dict[str, float]], name: str, count: int) -> None:
    """`count` steps, in which the policy moved, and the server's was the same at every step."""
    assert len(rows) == count
    gap = max(row[GAP] for row in rows if GAP in row)  # the others take up an earlier rollout
    moved = max(row["kl"] for row in rows)
    tell(name, f"gap max {gap:.1e} nats, KL up to {moved:.2g}")
    assert gap < EXACT and moved > 0.1, (gap, moved)


def tell(name: str, text: str) -> None:
    """A measured figure, which pytest shows with -s or -rP."""
    print(f"{name}: {text}", file=sys.stderr)


def read_steps(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "steps.json").read_text())


def adapter(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
