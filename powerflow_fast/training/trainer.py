"""`PowerFlowTrainer`: TRL's GRPOTrainer with PowerFlow's LA-TB loss (arXiv 2603.18363, eq. 10).

TRL keeps what it does well: rollouts (transformers or vLLM), sampling order, logging, checkpoints.
Replaced are the reward (here an optional format term psi), the loss, and log Z'. Left out on
purpose, and refused with a message: vision models, the MoE auxiliary loss, and the options of
GRPO's loss listed in `config.NOT_HONOURED`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl.trainer.grpo_trainer import RewardFunc

from powerflow_fast.evaluation.curves import Curves
from powerflow_fast.evaluation.record import RunRecord
from powerflow_fast.loss import TBOutput
from powerflow_fast.models.lm_head import base_model
from powerflow_fast.models.parameters import disable_dropout, keep_gradient, trained_parameters
from powerflow_fast.models.sampling import end_tokens
from powerflow_fast.rewards import finite_psi, no_psi
from powerflow_fast.training.ahead import RolloutsAhead, check_ahead
from powerflow_fast.training.checkpoint import WholeCheckpoints, describe
from powerflow_fast.training.checks import check_arguments, check_policy, check_reference
from powerflow_fast.training.completion_table import CompletionTable
from powerflow_fast.training.config import PowerFlowConfig
from powerflow_fast.training.data_checks import check_datasets
from powerflow_fast.training.exact_merge import keep_base_exact
from powerflow_fast.training.given_back import given_back
from powerflow_fast.training.health import START_KL, Health, SoundSteps, check_start
from powerflow_fast.training.learned_log_z import LearnedLogZ
from powerflow_fast.training.metrics import LossFigures, over_rollouts
from powerflow_fast.training.progress import show_lines
from powerflow_fast.training.replay import Replay
from powerflow_fast.training.rollout import ScoredRollouts
from powerflow_fast.training.sampler import Sampler
from powerflow_fast.training.vllm_colocated import in_own_type

OWN_REFERENCE = "_powerflow_reference"  # says of a PeftModel that "ref" is an earlier trainer's


class PowerFlowTrainer(LossFigures, RolloutsAhead, WholeCheckpoints, ScoredRollouts):
    """Trains a causal language model to sample from a power of its own base, without labels.

    The reference is the model as it was given: the base under a disabled adapter (`peft_config`),
    a frozen copy of the adapter of a given PeftModel, or, for full fine-tuning, a second copy
    loaded from the model's path. Policy and reference backbones run inside the policy's (wrapped)
    forward and meet in one `fused_linear_tb_loss`; only counted completion tokens reach the head.

    Args:
        model: a path or name, a PreTrainedModel, or a PeftModel.
        args: options, `PowerFlowConfig`.
        train_dataset: with a column `prompt` (text, or a list of messages). Other columns go to
            `psi_funcs` only.
        psi_funcs: functions of TRL's reward signature; the weighted sum per completion is psi
            [nats/token], e.g. `powerflow_fast.rewards.missing_boxed`. Default: psi = 0.
        peft_config: e.g. `LoraConfig`; not on the head.
        **kwargs: every other argument of TRL's GRPOTrainer.

    Raises:
        ValueError: before any generation, for data, models and options it cannot train.
        TrainingStopped: from `train()`, where a run collapses, trains nothing or is not finite, or
            its sampler fails or samples something else than the policy.
        CheckpointError: from `train()`, where a checkpoint cannot be written.
    """

    args: PowerFlowConfig  # type: ignore[assignment]
    start_kl = START_KL  # nats/token: a run that starts further from its reference ends at once
    _tag_names = ["trl", "powerflow"]
    _name = "PowerFlow"

    def __init__(
        self,
        model,
        args: PowerFlowConfig | None = None,
        train_dataset=None,
        *,
        psi_funcs: RewardFunc | list[RewardFunc] | None = None,
        peft_config=None,
        **kwargs: Any,
    ) -> None:
        if "reward_funcs" in kwargs:
            raise ValueError("reward_funcs: there is no reward; a format term goes to psi_funcs")
        args = PowerFlowConfig("powerflow-output") if args is None else args
        if not isinstance(args, PowerFlowConfig):
            raise ValueError(f"args: expected a PowerFlowConfig, got {type(args).__name__}")
        check_arguments(args)
        check_reference(model, peft_config, args)
        adapted = peft_config is not None or isinstance(model, PeftModel)
        args = args.for_run(adapted)
        sampler = kwargs.get("rollout_func")
        check_ahead(args, sampler)
        if isinstance(sampler, Sampler):
            sampler.prepare(args, model, peft_config)
        others = kwargs.get("eval_dataset"), model, kwargs.get("processing_class"), args
        self._context = check_datasets(train_dataset, *others)
        with given_back(model):
            self._build(
                psi_funcs=psi_funcs,
                model=model,
                args=args,
                train_dataset=train_dataset,
                peft_config=peft_config,
                **kwargs,
            )
        if args.offload_reference:
            self.ref_model.to("cpu")
        self.sound = SoundSteps(self.accelerator, args.stop_on_collapse)
        self.add_callback(self.sound)  # before log Z' takes a step
        if args.log_z == "learned":
            size = base_model(self._policy()).config.get_text_config().hidden_size
            self.log_z = LearnedLogZ(size, args, self.accelerator)
            self.add_callback(self.log_z)
        self.start_figures()
        # Of training passes since the last log: [real, computed, saved by shared prompts].
        self._tokens: Tensor | None = None
        self.table = CompletionTable()
        self.replay = Replay(args.replay, args.seed)
        self.health = Health(args)
        self.add_callback(self.health)
        show_lines(self)
        self.record = RunRecord.of(self)
        if args.draw_curves:
            self.add_callback(Curves(self.record))
        engine = "FSDP" if self.is_fsdp_enabled else "none"
        engine = "DeepSpeed" if self.is_deepspeed_enabled else engine
        self._made_for = describe(self._policy()) | {"log_z": args.log_z, "engine": engine}

    def _build(self, *, psi_funcs, model, args: PowerFlowConfig, **kwargs: Any) -> None:
        """TRL's trainer around the model, and what is refused once it is there."""
        if getattr(model, OWN_REFERENCE, False) and "ref" in model.peft_config:
            model.delete_adapter("ref")
        args.beta = 1.0  # makes TRL build the reference; with 0 afterwards it skips its own pass
        given = trained_parameters(model) if isinstance(model, PeftModel) else {}
        given_values = {name: parameter.data for name, parameter in given.items()}
        given_psi = psi_funcs if isinstance(psi_funcs, list) else [psi_funcs or no_psi]
        reward_funcs = [finite_psi(function) for function in given_psi]
        with in_own_type(self):
            super().__init__(model=model, args=args, reward_funcs=reward_funcs, **kwargs)
        args.beta = self.beta = 0.0
        if isinstance(model, PeftModel):
            setattr(model, OWN_REFERENCE, "ref" in model.peft_config)
        if getattr(self.model, "is_quantized", False):
            keep_gradient(self.model)
            # TRL makes the adapter bf16: small updates are rounded away, and a resumed run, whose
            # checkpoint is loaded as float32, would be another one.
            for name, parameter in trained_parameters(self.model).items():
                parameter.data = given_values.get(name, parameter.data.float())
        if self.use_vllm and hasattr(self.model, "merge_adapter"):
            keep_base_exact(self.model)
        self.eos_token_ids = end_tokens(base_model(self._policy()), self._tokenizer)
        if not self.use_vllm:
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        for part in (self._policy(), self.ref_model):
            if part is not None:
                disable_dropout(part)
        check_policy(self, self._policy())
        self.choose_layout()

    def _compute_loss(self, model, inputs) -> Tensor:
        training = self.model.training
        normalizer = None
        if training:
            # Sequences per optimizer step, all micro-batches and ranks; DDP averages over ranks.
            share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            share /= self.accelerator.num_processes
            normalizer = inputs["num_sequences"].clamp(min=1) * share
        out = self._run(model, inputs, normalizer=normalizer)
        self._record(out, inputs, "train" if training else "eval")
        return out.loss.to(self.accelerator.device)

    @torch.no_grad()
    def _record(self, out: TBOutput, inputs, mode: str) -> None:
        self.sums[mode].add(out)
        if mode == "eval":
            return
        if self.log_completions:
            self.table.add(out, inputs["row"], self._gather)
        real = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
        tokens = torch.stack([real, *real.new_tensor(self.pass_tokens)])
        self._tokens = tokens if self._tokens is None else self._tokens + tokens.to(self._tokens)
        names = ("residual_mean", "residual_std", "kl")
        watched = torch.stack([out.metrics[name].float() for name in names])
        watched = self.accelerator.gather(watched[None].to(self.accelerator.device)).mean(0)
        figures = dict(zip(names, watched.tolist(), strict=True))
        self.health.check_loss(self.state.global_step, figures)
        if self._step == 0:
            adapted = hasattr(self._policy(), "peft_config")
            check_start(figures["kl"], adapted, self.start_kl)

    def training_step(self, *args: Any, **kwargs: Any):
        with self.health.phase("policy"):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        whole = over_rollouts(self._metrics[mode])
        self._metrics[mode].clear()
        if mode == "eval":
            whole = {f"{self._prefix}_{name}": value for name, value in whole.items()}
        steps = self.state.global_step - self._logged_step
        figures = whole | self.loss_figures()
        if mode == "train" and "loss" in logs:
            figures |= self._token_figures(steps)
            if self.accelerator.is_main_process:
                shown = min(self.args.sample_completions, self.num_generations)
                texts = self._logs["prompt"], self._logs["completion"]
                self.health.write_sample(self.state.global_step, *map(list, texts), shown)
        logs.update(figures)  # in place: what `evaluate` returns
        with self.table.in_place_of_rewards(self._logs, mode == "train"):
            super().log(logs, start_time)

    def _token_figures(self, steps: int) -> dict[str, float]:
        """Tokens of training passes over all ranks: a second, and a step where models computed."""
        real, computed, saved = 0, 0, 0
        if self._tokens is not None:
            real, computed, saved = self._gather(self._tokens[None]).sum(0).tolist()
            self._tokens = None
        figures = self.health.figures(real, steps)
        steps = max(steps, 1)
        return figures | {"tokens/computed": computed / steps, "tokens/saved": saved / steps}

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Our own in place of TRL's: alpha, prompts, and what was measured before and after."""
        self._write_record(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self._write_record(output_dir or self.args.output_dir)

    def _write_record(self, folder: str) -> None:
        if self.is_world_process_zero():
            self.record.steps = self.state.global_step
            self.record.save(folder)
