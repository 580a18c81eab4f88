"""Checkpoints that are whole or absent, and a resume that goes on exactly where the run stood.

transformers saves adapter, optimizer, scheduler and random state. Added here: log Z', the buffered
rollouts and the position in them, running metrics, and a note of the model they belong to. A
checkpoint is written under a temporary name, flushed to disk and then renamed, so that a process
killed at any moment leaves the last one as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
    rotate_checkpoints,
)
from trl import GRPOTrainer

from powerflow_fast.models.lm_head import base_model
from powerflow_fast.models.parameters import trained_parameters
from powerflow_fast.training.agreement import on_every_rank
from powerflow_fast.training.sampler import Sampler

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)  # a full disk comes as any of them
STAGING = ".saving"
LOG_Z_FILE = "log_z.pt"
MODEL_FILE = "powerflow.json"
STATE_FILE = "powerflow_state_{rank}.pt"
CONFIG_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says why, and what is still there."""


class WholeCheckpoints(GRPOTrainer):
    """TRL's trainer with whole checkpoints; `PowerFlowTrainer` adds the objective."""

    args: Any  # a PowerFlowConfig
    health: Any
    sums: Any  # by mode, `MetricSums`
    _logged_step: int
    log_z: Any = None  # the learned log Z' with its optimizer, a `LearnedLogZ`
    replay: Any  # a `Replay`
    _made_for: dict[str, str]  # what `describe` says of the policy as it is trained
    _staging = False
    _sampler: Any = None  # TRL's, unless the data set is a stream

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As transformers'; "last" is the last checkpoint in `output_dir`, or a start from none."""
        checkpoint = resume_from_checkpoint
        if checkpoint is True or checkpoint == "last":
            found = last_checkpoint(self.args.output_dir)
            if found is None and checkpoint is True:
                raise ValueError(f"resume_from_checkpoint: none in {self.args.output_dir}")
            checkpoint = found
        if checkpoint:
            check_made_for(checkpoint, self._made_for)
        return super().train(checkpoint or None, *args, **kwargs)

    def _get_train_sampler(self, dataset=None):
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # transformers would take one step more
            return
        self._fix_order(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _fix_order(self, epoch: int) -> None:
        """An order fixed by seed and epoch alone, so that a resume finds its place in it."""
        if self._sampler is not None and self._sampler.shuffle:
            self._sampler.generator.manual_seed(self._sampler.seed + epoch)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # else uploads would race with the move
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        run = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = os.path.join(run, STAGING, name), os.path.join(run, name)
        save, main = super()._save_checkpoint, self.accelerator.is_main_process
        if main:
            shutil.rmtree(os.path.join(run, STAGING), ignore_errors=True)
        self.accelerator.wait_for_everyone()

        def write() -> None:
            self._staging = True
            try:
                save(model, trial)
                self._save_state(staged, final)
            finally:
                self._staging = False

        def publish() -> None:
            if main:
                note = self._made_for | {
                    "model_only": self.args.save_only_model,
                    "bytes": _sizes(staged),
                }
                with open(os.path.join(staged, MODEL_FILE), "w", encoding="utf-8") as file:
                    json.dump(note, file, indent=1)
                _flush(staged)
                _move(staged, final)

        self._on_every_rank(write, run, final)
        self._on_every_rank(publish, run, final)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(run, limit, best_model_checkpoint=best, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)

    def _on_every_rank(self, part: Callable[[], None], run: str, final: str) -> None:
        """Do `part`; CheckpointError on all ranks where it failed on one."""
        _, problem = on_every_rank(part, WRITE_ERRORS)
        if problem is not None:
            if self.accelerator.is_main_process:
                shutil.rmtree(os.path.join(run, STAGING), ignore_errors=True)
            last = last_checkpoint(run)
            rest = f"the last whole checkpoint is {last}" if last else "there is none before it"
            raise CheckpointError(
                f"could not write {final}: {problem.kind}: {problem.text}; {rest}"
            ) from problem.error

    def _save_state(self, staged: str, final: str) -> None:
        cycle = self.args.steps_per_generation * self.num_iterations
        state = {
            "shape": self._shape(),
            "step": self._step,
            "rollouts": self._buffered_inputs if self._step % cycle else None,
            "metrics": dict(self._metrics["train"]),
            "sums": self.sums["train"].state_dict(),
            "logged_step": self._logged_step,
            "health": self.health.state_dict(),
        }
        if self.args.replay:
            state["replay"] = self.replay.state_dict()
        if isinstance(self.rollout_func, Sampler):
            state["asked"] = self.rollout_func.state_dict()
        rank = self.accelerator.process_index
        torch.save(state, os.path.join(staged, STATE_FILE.format(rank=rank)))
        if self.args.should_save:
            if self.log_z is not None:
                torch.save(self.log_z.state_dict(), os.path.join(staged, LOG_Z_FILE))
            if self.state.best_model_checkpoint == staged:
                self.state.best_model_checkpoint = final
                self.state.save_to_json(os.path.join(staged, "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE.format(rank=self.accelerator.process_index))
        if not os.path.exists(path):
            path = os.path.join(checkpoint, STATE_FILE.format(rank=0))
        state = _load(path)
        if self.log_z is not None:
            self.log_z.load_state_dict(_load(os.path.join(checkpoint, LOG_Z_FILE)))
        self._metrics["train"] = defaultdict(list, state["metrics"])
        self.sums["train"].load_state_dict(state["sums"])
        self._logged_step = state["logged_step"]
        self.health.load_state_dict(state["health"])
        saved_shape, shape = state["shape"], self._shape()
        if saved_shape == shape:
            self._step = state["step"]
            self._buffered_inputs = send_to_device(state["rollouts"], self.accelerator.device)
            kept = send_to_device(state.get("replay", []), self.accelerator.device)
            self.replay.load_state_dict(kept)
            if isinstance(self.rollout_func, Sampler):
                self.rollout_func.load_state_dict(state.get("asked", {}))
            return
        # The next micro-batch begins a cycle of rollouts; step 0 marks the very first.
        cycle = self.args.steps_per_generation * self.num_iterations
        taken = self.state.global_step * self.args.gradient_accumulation_steps
        self._step = -(-taken // cycle) * cycle
        changed = ", ".join(
            f"{name} {saved_shape[name]} -> {size}"
            for name, size in shape.items()
            if saved_shape[name] != size
        )
        warnings.warn(
            f"resumed in another shape ({changed}): random numbers differ, and rollouts that were "
            "not used up are drawn again",
            stacklevel=2,
        )

    def _shape(self) -> dict[str, int]:
        """The set-up that a buffered rollout was cut for; any other needs a new rollout."""
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "steps_per_generation": args.steps_per_generation,
            "num_iterations": self.num_iterations,
            "num_generations": self.num_generations,
        }


def last_checkpoint(folder: str) -> str | None:
    """The newest whole checkpoint in `folder`, or None."""
    return get_last_checkpoint(folder) if os.path.isdir(folder) else None


def describe(policy) -> dict[str, str]:
    """What a checkpoint of `policy` fits: configuration, base weights, trainable parameters."""
    base = base_model(policy)
    names = sorted(
        f"{name} {list(getattr(p, 'ds_shape', p.shape))}"
        for name, p in trained_parameters(policy).items()
    )
    facts = config_facts(base.config)
    facts["trainable"] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    weight = base.get_input_embeddings().weight
    if weight.numel() and not weight.is_meta:  # else ZeRO-3 has taken it apart
        facts["embedding"] = f"{float(weight[:64].detach().double().abs().sum()):.6g}"
    return facts


def config_facts(config) -> dict[str, str]:
    """The part of `describe` that a configuration alone gives."""
    config = config.get_text_config()
    return {key: str(getattr(config, key, None)) for key in CONFIG_KEYS}


def check_made_for(checkpoint: str, expected: dict[str, str]) -> None:
    """Whether a run with the facts `expected` can go on from `checkpoint`.

    Warns where its optimizer was not saved.

    Raises:
        ValueError: for a checkpoint of another model or set-up, and for one that is not whole.
    """
    try:
        with open(os.path.join(checkpoint, MODEL_FILE), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} is not a checkpoint of this trainer, or not "
            f"whole ({MODEL_FILE}: {type(error).__name__})"
        ) from error
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} belongs to another model, adapter or "
                f"set-up: {key} is {found[key]} there and {value} here"
            )
    sizes = _sizes(checkpoint)
    for name, size in found.get("bytes", {}).items():
        if sizes.get(name) != size:
            state = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is not whole: {name} {state}, expected "
                f"{size} bytes"
            )
    if found.get("model_only"):
        warnings.warn(
            f"resume_from_checkpoint: {checkpoint} was saved with save_only_model: the optimizer "
            "starts anew, and the run is not the one that was stopped",
            stacklevel=3,
        )


def _sizes(checkpoint: str) -> dict[str, int]:
    """Bytes of each file that holds state of the run; files for readers are left out."""
    folder = Path(checkpoint)
    of_state = (".pt", ".pth", ".bin", ".safetensors", ".distcp")
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.suffix in of_state or path.name == "trainer_state.json"
    }


def _load(path: str) -> dict[str, Any]:
    # Through the plain CPU: torch cannot restore to, or from, gloo's device "cpu:0".
    return torch.load(path, map_location="cpu", weights_only=True)


def _move(staged: str, final: str) -> None:
    """Rename; a folder of that name, from an earlier try at this step, is moved away first."""
    if os.path.isdir(final):
        os.rename(final, staged + ".old")
    os.rename(staged, final)
    shutil.rmtree(os.path.dirname(staged), ignore_errors=True)


def _flush(folder: str) -> None:
    """Have the disk hold every file of `folder` before it gets its name."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
