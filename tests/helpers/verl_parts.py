"""What of verl is another on a CPU: three names of its modules, and the sampler.

verl loads this as an external module after `verl_platform`, in every process of a run.
"""

import os
from functools import partial
from pathlib import Path

import ray
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from verl.models.transformers import monkey_patch
from verl.utils import distributed
from verl.workers import engine_workers
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from tests.helpers.verl_completions import Server

# It asks for "cpu:gloo,cpu:gloo", and torch refuses a device that is named twice.
engine_workers.initialize_global_process_group_ray = partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)
# The reference is offloaded into pinned memory, which only an accelerator has.
transformer_impl.CPUOffloadPolicy = lambda pin_memory: CPUOffloadPolicy(pin_memory=False)
# Where TRL is installed, a class is imported from it that TRL 1.16 does not have.
monkey_patch.is_trl_available = lambda: False


class Replica(RolloutReplica):
    """In place of a vLLM server that all workers share."""

    async def launch_servers(self) -> None:
        self._server_handle = ray.remote(Server).remote()
        self._server_address = "none"
        self.servers = [self._server_handle]


class Rollout(base.BaseRollout):
    """A worker's side of the sampler: it keeps the weights that verl sends after each step."""

    async def resume(self, tags) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(self, weights, global_steps=None, **kwargs) -> None:
        whole = {name: weight.detach().clone() for name, weight in weights}
        rank = torch.distributed.get_rank()
        torch.save(whole, Path(os.environ["VERL_RUN"]) / f"weights-{global_steps}-{rank}.pt")


base._ROLLOUT_REGISTRY["fixed", "async"] = f"{__name__}.{Rollout.__name__}"
RolloutReplicaRegistry.register("fixed", lambda: Replica)
