#!/usr/bin/env bash
# PowerFlow on a Ray cluster, with verl 0.9: bash recipes/verl/run.sh [more settings of verl]
#
# The objective is the paper's (arXiv 2603.18363): LA-TB with alpha = 4, samples at temperature 1
# with nothing truncated, token-mean importance weights clipped to 1 -+ 0.2, psi = -0.5 without a
# \boxed{} answer; log Z' is the mean over a prompt's completions. Sizes are a start for 8 GPUs of
# 80 GB: set them for yours.
#
# verl is to be installed as verl[vllm]: its trainer needs TransferQueue. It looks into TRL, where
# that is installed, for a class that TRL 1.16 does not have, and then does not start.
#
# On a cluster, start every node with the variable below already in its environment
# (`ray start` passes it to all workers), and run this on the head node.
set -euo pipefail
cd "$(dirname "$0")"

MODULES=${VERL_USE_EXTERNAL_MODULES:-}  # of yours, which come first
export VERL_USE_EXTERNAL_MODULES=${MODULES:+$MODULES,}powerflow_fast.integrations.verl_plugin

MODEL=${MODEL:-Qwen/Qwen2.5-7B}
TRAIN=${TRAIN:?a parquet file with a column prompt (a list of messages); no answers are read}
VALIDATION=${VALIDATION:-$TRAIN}
NODES=${NODES:-1}
GPUS=${GPUS:-8}
ALPHA=${ALPHA:-4.0}

exec "${PYTHON:-python}" -m verl.trainer.main_ppo \
    algorithm.adv_estimator=la_tb \
    +algorithm.alpha="$ALPHA" \
    algorithm.use_kl_in_reward=False \
    data.train_files="$TRAIN" \
    data.val_files="$VALIDATION" \
    data.train_batch_size=128 \
    data.max_prompt_length=1024 \
    data.max_response_length=3072 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.model.use_remove_padding=True \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.model.use_fused_kernels=True \
    actor_rollout_ref.model.fused_kernel_options.impl_backend=triton \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.policy_loss.loss_mode=la_tb \
    actor_rollout_ref.actor.clip_ratio=0.2 \
    actor_rollout_ref.actor.use_kl_loss=True \
    actor_rollout_ref.actor.kl_loss_coef=0.0 \
    actor_rollout_ref.actor.entropy_coeff=0.0 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.temperature=1.0 \
    actor_rollout_ref.rollout.top_p=1.0 \
    actor_rollout_ref.rollout.top_k=-1 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True \
    reward.custom_reward_function.path="$PWD/format_term.py" \
    reward.custom_reward_function.name=psi \
    reward.reward_manager.source=importlib \
    reward.reward_manager.module.path="$PWD/format_term.py" \
    reward.reward_manager.name=WithoutAnswers \
    trainer.nnodes="$NODES" \
    trainer.n_gpus_per_node="$GPUS" \
    trainer.total_epochs=1 \
    trainer.save_freq=50 \
    trainer.test_freq=-1 \
    trainer.val_before_train=False \
    trainer.project_name=powerflow \
    trainer.experiment_name=la_tb \
    "$@"
