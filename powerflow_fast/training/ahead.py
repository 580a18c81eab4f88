"""Rollouts ahead of the trainer: the next prompts are sampled while this update is computed.

Trajectory Balance is an off-policy objective (TBA, arXiv 2503.18929): a rollout may come from the
policy of some updates ago, whose log-probs it carries, and is weighed by the clipped ratio to the
policy of now. So trainer and sampler need not wait for each other.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import set_peft_model_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from powerflow_fast.models.parameters import is_sharded, trained_parameters
from powerflow_fast.training.sampler import Sampler, SamplerError


def check_ahead(args, rollout_func) -> None:
    """ValueError where nothing could draw rollouts beside the trainer."""
    if not args.rollout_ahead or isinstance(rollout_func, Sampler):
        return
    if args.use_vllm and args.vllm_mode == "server":
        why = "TRL changes the weights of its server in place, under the rollouts in flight"
    elif args.use_vllm:
        why = "a colocated vLLM samples on the trainer's own GPUs"
    elif rollout_func is not None:
        why = "this rollout_func answers at once, and is no Sampler"
    else:
        why = "transformers samples on the trainer's own device"
    raise ValueError(
        f"rollout_ahead: expected 0, got {args.rollout_ahead}: {why}. Rollouts ahead need a server "
        "of their own: AdapterRollout, or --adapter_server on the command line"
    )


class RolloutsAhead(GRPOTrainer):
    """TRL's trainer, which reads the prompts of coming rollouts `rollout_ahead` updates before."""

    args: Any  # a PowerFlowConfig
    rollout_func: Any
    health: Any
    _epoch = 0
    _loader: Any = None
    _save_checkpoint: Any
    _fix_order: Any

    def train(self, *args: Any, **kwargs: Any):
        """As transformers'. Where the sampler fails between two updates, what is trained so far is
        saved as a checkpoint first (unless save_strategy is "no")."""
        self._read: deque[Any] = deque()  # batches that no update has taken yet
        self._source: Iterator[Any] | None = None
        try:
            return super().train(*args, **kwargs)
        except SamplerError as error:
            if saved := self._save_at_the_end():
                raise SamplerError(
                    f"{error}. {saved} holds all that was trained: go on from there with "
                    "resume_from_checkpoint"
                ) from error
            raise
        finally:
            if isinstance(self.rollout_func, Sampler):
                self.rollout_func.close()

    def _save_at_the_end(self) -> str | None:
        """The checkpoint of the last update, made now unless it is there; None between updates."""
        step = self.state.global_step
        if not step or self._step % self.args.gradient_accumulation_steps:
            return None
        folder = os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if self.args.save_strategy != "no" and not os.path.isdir(folder):
            self._save_checkpoint(self.model, None)
        return folder if os.path.isdir(folder) else None

    def _cycle(self) -> int:
        """Passes (micro-batches) that one rollout serves."""
        return self.args.steps_per_generation * self.num_iterations

    def rollout_number(self) -> int:
        """Of the rollout that the next pass trains on."""
        return self._step // self._cycle()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._epoch, self._loader = kwargs["epoch"], kwargs["train_dataloader"]
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's. With rollout_ahead, the batches of the next updates are read too, and their
        rollouts asked for."""
        if not self.args.rollout_ahead:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._source is None:
            self._source, self._reading = epoch_iterator, self._epoch
        per_update = self.args.gradient_accumulation_steps
        updates = min(self.args.rollout_ahead, self.state.max_steps - self.state.global_step - 1)
        self._fill(num_batches + updates * per_update)
        for i, batch in enumerate(self._read):
            number, within = divmod(self._step + i, self._cycle())
            if not within and number not in self.rollout_func.asked:
                with self.health.phase("rollout"):
                    self.rollout_func.ask(number, [row["prompt"] for row in batch], self)
        return [self._read.popleft() for _ in range(min(num_batches, len(self._read)))], None

    def _fill(self, count: int) -> None:
        """Read until there are `count` batches, over the ends of epochs."""
        assert self._source is not None
        while len(self._read) < count:
            batch = next(self._source, None)
            if batch is None:  # the next epoch's order follows from its number alone
                self._reading += 1
                self._fix_order(self._reading)
                self._loader.set_epoch(self._reading)
                self._source = iter(self._loader)
                batch = next(self._source)
            self._read.append(batch)


def is_whole(policy) -> bool:
    """Whether every rank holds all of the policy's trained parameters."""
    trained = trained_parameters(policy).values()
    return not is_sharded(policy) and not any(isinstance(p, DTensor) for p in trained)


@contextmanager
def as_sent(policy, weights: dict[str, Tensor]) -> Iterator[None]:
    """The policy with the adapter of an earlier update, for the time inside; bit for bit as it was
    afterwards. `weights` are the adapter's, by PEFT's names."""
    trained = trained_parameters(policy)
    now = {name: parameter.detach().clone() for name, parameter in trained.items()}
    try:
        set_peft_model_state_dict(policy, weights)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(now[name])
