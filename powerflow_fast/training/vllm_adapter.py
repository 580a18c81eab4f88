"""Rollouts from a plain vLLM server that is sent the adapter alone, instead of merged weights.

For LoRA on a large base: a rank-16 adapter of a 70B model has 0.8 GB, the merged weights 141 GB.
Neither side changes the base. How to start the server (tried with vLLM 0.32):

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 16 \
        --max-loras 2 --logprobs-mode processed_logprobs
"""

from __future__ import annotations

import atexit
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from trl.experimental.async_grpo.async_grpo_trainer import (
    save_lora_adapter,
    validate_lora_for_vllm_sync,
)

from powerflow_fast.models.parameters import is_sharded
from powerflow_fast.training.agreement import on_every_rank
from powerflow_fast.training.sampler import Asked, Sampler, SamplerError
from powerflow_fast.training.vllm_server import VLLMServer

ADAPTER = "default"  # the one that is trained
PROBLEMS = (OSError, RuntimeError, SafetensorError, ValueError)  # a full disk comes as any of them


class AdapterRollout(Sampler):
    """`PowerFlowTrainer(rollout_func=AdapterRollout(url, folder))`, for a model with LoRA.

    Every update's adapter gets a name that is never used again: a server may keep what it computed
    for a name. A completion is a request of its own with a seed of its own, so that a resumed run
    draws what the interrupted one would have.

    Args:
        url: of the server, without data parallelism (an adapter reaches one replica only).
        folder: where adapters are handed over; trainer and server see it under the same path. One
            run at a time.
        timeout: seconds that a rollout may take from when it is asked for; with rollout_ahead,
            beside the others in flight.
        server_timeout: seconds to wait for a server that is still starting.
        api_key: of the server, where it wants one; default: the variable VLLM_API_KEY.

    Raises:
        ValueError: for a url without http:// or https://; when the trainer is made, for a server
            that cannot serve the run and a folder that another run uses; at the first rollout, for
            an adapter that vLLM cannot serve (DoRA, say).
        SamplerError: from `train()`, where the server refuses, is gone, hangs or answers wrongly.
    """

    def __init__(
        self,
        url: str,
        folder: str,
        timeout: float = 3600.0,
        *,
        server_timeout: float = 240.0,
        api_key: str | None = None,
    ) -> None:
        super().__init__()
        self.server = VLLMServer(url, api_key)
        self.timeout, self.server_timeout = timeout, server_timeout
        self.folder = os.path.abspath(folder)
        self.run = ""  # in the names of adapters; the same on all ranks
        self._count = 0
        self._limit: int | None = None  # what `check` found
        self._lock = FileLock(os.path.join(self.folder, ".lock"))
        self._loaded: list[str] = []  # adapters on the server; known to the first rank

    def check(self, args, rank: int) -> int:
        if self._limit is not None:  # before the model was loaded
            return self._limit
        self.server.wait_until_ready(self.server_timeout)
        if args.process_index:
            self._limit = int(self.server.base()["max_model_len"])
            return self._limit
        parent = os.path.dirname(self.folder)
        new = [path for path in (self.folder, parent) if not os.path.isdir(path)]
        self._take_folder()
        try:
            self._limit = self.server.check(rank, self.folder, args.temperature)
        finally:
            self._lock.release()
            if new:  # leave no trace: the run may be refused for something else, and tried again
                os.unlink(self._lock.lock_file)
            for path in new:
                os.rmdir(path)
        return self._limit

    def _take_folder(self) -> None:
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"folder: {self.folder} is in use by another run") from None
        except OSError as error:
            raise ValueError(f"folder: {self.folder} cannot be written: {error}") from error

    def put(self, trainer) -> str:
        accelerator = trainer.accelerator
        policy, main = accelerator.unwrap_model(trainer.model), accelerator.is_main_process
        if is_sharded(policy):
            raise ValueError("rollout_func: ZeRO-3 takes the adapter apart; use FSDP2, or ZeRO-2")
        rank = validate_lora_for_vllm_sync(policy).r
        if not self.run:
            self._together(lambda: self._start(main), "")
        name = f"powerflow-{self.run}-{self._count}"
        self._count += 1
        path = self._path(name)
        save = partial(save_lora_adapter, policy, accelerator, ADAPTER, path)
        self._together(save, f"folder: {self.folder} could not take an adapter: ")
        self._together(lambda: self._load(name, rank, main), "")
        return name

    def _together(self, part: Callable[[], None], lead: str) -> None:
        """Do `part` on every rank; SamplerError on all where it failed on one."""
        _, problem = on_every_rank(part, PROBLEMS)
        if problem is not None:
            self.failed = True
            raise SamplerError(lead + problem.text) from problem.error

    def _start(self, main: bool) -> None:
        """Clear away what a killed run left in the folder and on the server."""
        (self.run,) = broadcast_object_list([uuid.uuid4().hex[:8]])
        if not main:
            return
        self._take_folder()
        atexit.register(self.close)
        for name in self.server.adapters_in(self.folder):
            self.server.unload(name)
        for name in os.listdir(self.folder):
            if name.lstrip(".").startswith(("powerflow-", "trial-")):
                shutil.rmtree(self._path(name), ignore_errors=True)

    def _load(self, name: str, rank: int, main: bool) -> None:
        if main:
            self.server.load(name, self._path(name), rank)
            self._loaded.append(name)

    def draw(self, prompt_ids: list[list[int]], seeds: list[int], trainer) -> list[Future]:
        options = {
            "model": self.policy,
            "max_tokens": trainer.max_completion_length,
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            "stop_token_ids": trainer.eos_token_ids,
            **(trainer.args.generation_kwargs or {}),
            "return_token_ids": True,
            "logprobs": 0,
        }
        rows = zip(prompt_ids, seeds, strict=True)
        bodies = [{**options, "prompt": ids, "seed": seed} for ids, seed in rows]
        return self.server.complete(bodies, self.timeout)

    def wait(self, asked: Asked) -> list[dict[str, Any]]:
        return self.server.collect(asked.answers, asked.at + self.timeout, self.timeout)

    def retire(self, needed: set[str]) -> None:
        for name in [name for name in self._loaded if name not in needed]:
            if problem := self.server.unload(name):
                warnings.warn(
                    f"{self.server.url}: adapter {name} stays on the server: {problem}",
                    stacklevel=2,
                )
            self._loaded.remove(name)
            shutil.rmtree(self._path(name), ignore_errors=True)

    def weights(self, policy: str) -> dict[str, Any] | None:
        path = os.path.join(self._path(policy), "adapter_model.safetensors")
        return load_file(path) if policy and os.path.isfile(path) else None

    def close(self) -> None:
        super().close()
        if self._lock.is_locked:  # the first rank's
            if not self.server.is_healthy():
                self._loaded.clear()  # nobody to tell
            self.retire(set())
            if self.run and os.path.isdir(self.folder):
                for name in os.listdir(self.folder):
                    if self.run in name:
                        shutil.rmtree(self._path(name), ignore_errors=True)
            self._lock.release()
            atexit.unregister(self.close)
        self.run = ""

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)
