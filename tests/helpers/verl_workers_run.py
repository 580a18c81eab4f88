"""The driver of a run that test_verl_ray compares: verl's worker group, with its older trainer.

`python -m tests.helpers.verl_workers_run settings.json`. A step calls the methods that
`RayPPOTrainer.fit` calls once there are samples and rewards.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ray
import torch
from hydra import compose, initialize_config_module
from torch.nn.utils.rnn import pad_sequence
from verl import DataProto
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo import ray_trainer
from verl.workers.engine_workers import ActorRolloutRefWorker

WORKERS = 2


def start_workers(config) -> RayWorkerGroup:
    pool = RayResourcePool([WORKERS], use_gpu=False, max_colocate_count=1)
    worker = RayClassWithInitArgs(
        ray.remote(ActorRolloutRefWorker), config=config, role="actor_rollout_ref"
    )
    group = RayWorkerGroup(pool, worker, device_name="cpu")
    group.init_model()
    return group


def padded(rows: list[list[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] token ids and their mask."""
    side = "left" if left else "right"
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in part], batch_first=True, padding_side=side)
        for part in (rows, [[1] * len(row) for row in rows])
    )
    return ids, mask


def batch_of(samples: list[dict], temperature: float) -> DataProto:
    """As verl's sampler returns it: prompts padded on the left, responses on the right."""
    prompts, prompt_mask = padded([s["prompt"] for s in samples], left=True)
    responses, response_mask = padded([s["completion"] for s in samples])
    attention_mask = torch.cat([prompt_mask, response_mask], dim=1)
    scores = torch.zeros(responses.shape)
    scores[:, 0] = torch.tensor([s["psi"] for s in samples])
    tensors = dict(
        prompts=prompts,
        responses=responses,
        response_mask=response_mask,
        input_ids=torch.cat([prompts, responses], dim=1),
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        token_level_scores=scores,
        token_level_rewards=scores,
    )
    uid = np.array([str(s["prompt"]) for s in samples], dtype=object)
    tokens = {"global_token_num": attention_mask.sum(1).tolist(), "temperature": temperature}
    return DataProto.from_dict(tensors, non_tensors={"uid": uid}, meta_info=tokens)


def step(trainer, samples: list[dict]) -> dict:
    """The metrics of one step, of each update."""
    own, config = ray_trainer.RayPPOTrainer, trainer.config
    batch = batch_of(samples, config.actor_rollout_ref.rollout.temperature)
    old, _ = own._compute_old_log_prob(trainer, batch)
    batch = batch.union(old).union(own._compute_ref_log_prob(trainer, batch))
    batch = ray_trainer.compute_advantage(
        batch, adv_estimator=config.algorithm.adv_estimator, config=config.algorithm
    )
    return own._update_actor(trainer, batch).meta_info["metrics"]


def main(settings: dict) -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=settings["overrides"])
    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        object_store_memory=100_000_000,
        _temp_dir=settings["ray"],
    )
    group = start_workers(config.actor_rollout_ref)
    trainer = SimpleNamespace(
        config=config, actor_rollout_wg=group, ref_policy_wg=group, ref_in_actor=False
    )
    log = Path(os.environ["VERL_FILE_LOGGER_PATH"])
    for number, samples in enumerate(settings["steps"], 1):
        metrics = {name: np.mean(values) for name, values in step(trainer, samples).items()}
        with log.open("a") as file:
            print(json.dumps({"step": number, "data": metrics}), file=file)
        ray.get(group.update_weights(global_steps=number, mode="naive"))
    ray.shutdown()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
