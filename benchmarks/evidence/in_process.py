"""A sampler in the trainer's own process: rollouts of an exact age, without a server.

A rollout is drawn in the moment in which it is asked for, by the trainer's policy of that moment,
and waits until its update is due. So it is as stale as from a real server that runs ahead, and no
later update can have touched it. Nothing runs side by side: this measures learning, not speed.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from powerflow_fast.models.sampling import Sample, sample
from powerflow_fast.training.sampler import Asked, Sampler, done


class InProcess(Sampler):
    """Draws with transformers, and scores what it drew as the trainer itself would."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, dict[str, Tensor]] = {}  # adapters, by the name of their policy

    def check(self, args, rank: int) -> int | None:
        return None

    def put(self, trainer) -> str:
        """Keeps a copy of the adapter, so that the trainer can check a stale rollout exactly."""
        name = f"update {trainer.state.global_step}"
        policy = trainer.accelerator.unwrap_model(trainer.model)
        adapter = get_peft_model_state_dict(policy, save_embedding_layers=False)
        self.kept[name] = {key: value.detach().clone() for key, value in adapter.items()}
        return name

    def draw(self, prompt_ids: list[list[int]], seeds: list[int], trainer) -> list[Future]:
        """All rows with the first one's seed: runs of one seed share their random numbers."""
        width = max(map(len, prompt_ids))
        ids = torch.full((len(prompt_ids), width), trainer._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(prompt_ids):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])
            drawn = sample(
                trainer.accelerator.unwrap_model(trainer.model),
                ids,
                mask,
                max_new_tokens=trainer.max_completion_length,
                temperature=trainer.temperature,
                end_token_ids=trainer.eos_token_ids,
            )
        completions, counted = drawn.completion(width)
        logps = _scored(trainer, drawn, width)
        return [
            done({"token_ids": row[kept].tolist(), "logprobs": values[kept].tolist()})
            for row, kept, values in zip(completions, counted, logps, strict=True)
        ]

    def wait(self, asked: Asked) -> list[dict[str, Any]]:
        return [answer.result() for answer in asked.answers]

    def retire(self, needed: set[str]) -> None:
        self.kept = {name: adapter for name, adapter in self.kept.items() if name in needed}

    def weights(self, policy: str) -> dict[str, Tensor] | None:
        return self.kept.get(policy)

    def close(self) -> None:
        super().close()
        self.kept = {}


def _scored(trainer, drawn: Sample, width: int) -> Tensor:
    """[B, T] log-probs of the completions by the trainer's policy, at its temperature."""
    ids, mask = drawn.input_ids, drawn.attention_mask
    rollout = {
        "prompt_ids": ids[:, :width],
        "prompt_mask": mask[:, :width],
        "completion_ids": ids[:, width:],
        "completion_mask": mask[:, width:],
        "ref_per_token_logps": torch.zeros(ids[:, width:].shape),  # saves the reference's pass
    }
    return trainer._logps(trainer.model, rollout)[0]
