"""Rollouts from a plain vLLM server that is sent the adapter alone, instead of merged weights.

For LoRA on a large base: a rank-16 adapter of a 70B model has 0.8 GB, the merged weights 141 GB.
Neither side changes the base. How to start the server (tried against a stand-in that speaks
its protocol, not against vLLM itself):

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 16 \
        --max-loras 2 --logprobs-mode processed_logprobs
"""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

import requests
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from trl.experimental.async_grpo.async_grpo_trainer import (
    save_lora_adapter,
    validate_lora_for_vllm_sync,
)
from trl.experimental.async_grpo.vllm_client import VLLMClient


class AdapterRollout(TrainerCallback):
    """`PowerFlowTrainer(rollout_func=AdapterRollout(url, folder))`, for a model with LoRA.

    Args:
        url: of the server, without data parallelism (an adapter reaches one replica only).
        folder: where adapters are handed over; trainer and server see it under the same path.
        timeout: seconds that one rollout may take.

    Raises:
        ValueError: for a url without http:// or https://; at the first rollout, for an adapter that
            vLLM cannot serve (DoRA, say).
        RuntimeError: where the server refuses the adapter or a request.
    """

    def __init__(self, url: str, folder: str, timeout: float = 3600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected one like http://localhost:8000, got {url!r}")
        self.client, self.timeout = VLLMClient(url), timeout
        self.folder = os.path.abspath(folder)
        self.name = ""  # of the adapter on the server
        # A server may keep what it computed for an adapter's name: none is ever used twice.
        self.run, self._count = uuid.uuid4().hex[:8], 0
        self._trainer: Any = None  # when it ends, the adapter leaves the server
        self._sent: tuple[Any, int] | None = None  # state and step of the adapter on the server

    def __call__(self, prompts: list, trainer) -> dict[str, Any]:
        """TRL's form of a rollout: prompt_ids and completion_ids, a list of token ids for each row,
        and logprobs, the sampler's [nats] of the completion's tokens, which become `old_logps`."""
        if self._trainer is not trainer:
            trainer.add_callback(self)
            self._trainer = trainer
        self._send(trainer)
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        request = {
            "model": self.name,
            "prompt": prompt_ids,
            "max_tokens": trainer.max_completion_length,
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            **(trainer.args.generation_kwargs or {}),
            "return_token_ids": True,
            "logprobs": 0,
        }
        url = f"{self.client.server_url}/v1/completions"
        response = requests.post(url, json=request, timeout=self.timeout)
        if response.status_code != 200:
            raise RuntimeError(f"{url}: {response.status_code}, {response.text}")
        choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }

    def _send(self, trainer) -> None:
        """Put this step's adapter on the server and take the last one off; all ranks together."""
        state, step = trainer.state, trainer.state.global_step
        if self._sent is not None and self._sent[0] is state and self._sent[1] == step:
            return
        name = f"powerflow-{broadcast_object_list([self.run])[0]}-{self._count}"
        policy, path = trainer.accelerator.unwrap_model(trainer.model), self._path(name)
        validate_lora_for_vllm_sync(policy)
        save_lora_adapter(policy, trainer.accelerator, "default", path)
        if trainer.accelerator.is_main_process:
            self.client.load_lora_adapter(name, path)
            self._unload()
        trainer.accelerator.wait_for_everyone()
        self.name, self._sent, self._count = name, (state, step), self._count + 1

    def _unload(self) -> None:
        """Take the adapter off the server, where there is one, and its folder."""
        if self.name:
            self.client.unload_lora_adapter(self.name)
            shutil.rmtree(self._path(self.name), ignore_errors=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close(self._trainer)

    def close(self, trainer) -> None:
        """Leave nothing on the server; the next rollout sends its adapter anew."""
        if trainer.accelerator.is_main_process:
            self._unload()
        self.name, self._sent = "", None

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)
