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
from trl.models.utils import _ForwardRedirection
from trl.trainer.grpo_trainer import RewardFunc
from trl.trainer.utils import maybe_gather_lm_head_ctx, split_tensor_dict, use_adapter

from powerflow_fast.evaluation.curves import Curves
from powerflow_fast.evaluation.record import RunRecord
from powerflow_fast.loss import TBOutput, fused_linear_tb_loss
from powerflow_fast.models.lm_head import (
    ModelHead,
    base_model,
    disable_dropout,
    keep_gradient,
    last_hidden_state,
    read_head,
    through_head,
)
from powerflow_fast.models.packing import packed_hidden_state
from powerflow_fast.models.sampling import end_tokens, generation_config
from powerflow_fast.rewards import finite_psi, no_psi
from powerflow_fast.training.checkpoint import WholeCheckpoints, describe
from powerflow_fast.training.checks import (
    check_arguments,
    check_policy,
    check_reference,
    given_back,
)
from powerflow_fast.training.completion_table import CompletionTable
from powerflow_fast.training.config import PowerFlowConfig
from powerflow_fast.training.data_checks import LONG, check_datasets, check_prompt
from powerflow_fast.training.exact_merge import keep_base_exact
from powerflow_fast.training.health import (
    START_KL,
    Health,
    Rollout,
    SoundSteps,
    check_sampler,
    check_start,
)
from powerflow_fast.training.learned_log_z import LearnedLogZ
from powerflow_fast.training.metrics import SIZES, LossFigures, over_rollouts
from powerflow_fast.training.progress import show_lines
from powerflow_fast.training.rollout import (
    SAMPLER_GAP,
    counted,
    counted_mask,
    group_log_z,
    sampler_gap,
)

OWN_REFERENCE = "_powerflow_reference"  # says of a PeftModel that "ref" is an earlier trainer's


def _trained(model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


class PowerFlowTrainer(LossFigures, WholeCheckpoints):
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
    """

    args: PowerFlowConfig  # type: ignore[assignment]
    ref_model: Any  # the second copy, for full fine-tuning
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
        self._tokens: Tensor | None = None  # of training passes since the last log
        self.table = CompletionTable()
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
        given = {n: p.data for n, p in _trained(model)} if isinstance(model, PeftModel) else {}
        given_psi = psi_funcs if isinstance(psi_funcs, list) else [psi_funcs or no_psi]
        reward_funcs = [finite_psi(function) for function in given_psi]
        super().__init__(model=model, args=args, reward_funcs=reward_funcs, **kwargs)
        args.beta = self.beta = 0.0
        if isinstance(model, PeftModel):
            setattr(model, OWN_REFERENCE, "ref" in model.peft_config)
        if getattr(self.model, "is_quantized", False):
            keep_gradient(self.model)
            # TRL makes the adapter bf16: small updates are rounded away, and a resumed run, whose
            # checkpoint is loaded as float32, would be another one.
            for name, parameter in _trained(self.model):
                parameter.data = given[name] if name in given else parameter.data.float()
        if self.use_vllm and hasattr(self.model, "merge_adapter"):
            keep_base_exact(self.model)
        self.eos_token_ids = end_tokens(base_model(self._policy()), self._tokenizer)
        if not self.use_vllm:
            self.generation_config.eos_token_id = self.eos_token_ids
            self.generation_kwargs["eos_token_id"] = self.eos_token_ids
        self._redirect = _ForwardRedirection()
        for part in (self._policy(), self.ref_model):
            if part is not None:
                disable_dropout(part)
        check_policy(self, self._policy())

    def _policy(self):
        return self.accelerator.unwrap_model(self.model)

    @staticmethod
    def as_reference(policy: PeftModel):
        """The context in which `policy` is the reference: a frozen copy of its adapter, or none."""
        return use_adapter(policy, "ref" if "ref" in policy.peft_config else None)

    def _prepare_inputs(self, generation_batch):
        """As TRL's, but without its shuffle where that would break up groups that log Z' needs."""
        if not (self.model.training and self._groups_are_whole()):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(batch, steps)
        return self._buffered_inputs[self._step % steps]

    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _groups_are_whole(self) -> bool:
        """Whether every micro-batch holds all completions of its prompts, for the group log Z'."""
        mode = "train" if self.model.training else "eval"
        size = getattr(self.args, f"per_device_{mode}_batch_size")
        return self.args.log_z == "group" and size % self._group_size() == 0

    def _tokenize_prompts(self, prompts: list):
        """As TRL's; here a stream's prompts are seen first."""
        for prompt in prompts:
            check_prompt("prompt", prompt)
        ids, *others = super()._tokenize_prompts(prompts)
        for row in ids:
            self._context.check("prompt", len(row), self.max_completion_length, LONG)
        return ids, *others

    def _calculate_rewards(self, *args, **kwargs):
        values = super()._calculate_rewards(*args, **kwargs)  # [B of all ranks, functions]
        for function, name, column in zip(
            self.reward_funcs, self.reward_func_names, values.T, strict=True
        ):
            if isinstance(function, torch.nn.Module) and not column.isfinite().all():
                raise ValueError(f"psi_funcs: {name} gave {column.tolist()}; expected finite ones")
        self._psi = (values * self.reward_weights.to(values.device)).nansum(1)
        return values

    def _generate_and_score_completions(self, inputs):
        """TRL's rollout plus per-sequence tensors, which survive its shuffle and split.

        Added: psi, alpha and group [B], num_sequences (not empty, over all ranks); group_log_z [B]
        where groups are split over micro-batches, or serve several updates: the rollout's, for all
        of them, whatever the split; old_ and ref_per_token_logps [B, T] where they serve several
        updates, or the reference comes to the device only now.
        """
        self._ref_logps = None
        base = base_model(self._policy())
        ends = {"eos_token_id": self.eos_token_ids, "pad_token_id": self._tokenizer.pad_token_id}
        with self.health.phase("rollout"), generation_config(base, **ends):
            output = super()._generate_and_score_completions(inputs)
        count, rank = len(inputs), self.accelerator.process_index
        own = torch.arange(rank * count, (rank + 1) * count, device=self._psi.device)
        output["psi"], output["group"] = self._psi[own], own // self._group_size()
        output["row"] = own  # of the whole rollout's
        output["alpha"] = torch.full_like(output["psi"], self.args.alpha_at(self.state.global_step))
        sequences = counted_mask(output).any(1).sum()
        output["num_sequences"] = self.accelerator.gather(sequences).sum()
        several = self.model.training and (
            self.args.steps_per_generation * self.num_iterations
            > self.args.gradient_accumulation_steps
        )
        noted = self.log_z is None and (several or not self._groups_are_whole())
        fresh = self.log_z is not None and not self.log_z.started
        if self._ref_logps is not None:  # TRL has asked for the old policy's
            output["ref_per_token_logps"] = self._ref_logps
        elif several or noted or fresh or "sampling_per_token_logps" in output:
            scores = self._score(output)
            output["old_per_token_logps"], output["ref_per_token_logps"] = scores
        elif self.args.offload_reference:
            output["ref_per_token_logps"] = self._offloaded_reference(output)
        if noted or fresh:
            size = self._group_size()
            output["group_log_z"] = group_log_z(output, size, self.args, self.accelerator)
        if fresh:
            self.log_z.start(output["group_log_z"])
        self._watch(output)
        return output

    def _watch(self, output: dict[str, Any]) -> None:
        """Metrics of a rollout; raises TrainingStopped where it has collapsed."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if self.reward_funcs == [no_psi]:  # TRL's reward figures would be those of no_psi
            for name in [key for key in metrics if "reward" in key]:
                del metrics[name]
        # Completions that are masked because they were cut off were sampled all the same.
        drawn = output["completion_mask"].bool()
        padding = output["completion_ids"] == self._tokenizer.pad_token_id
        drawn = drawn.where(drawn.any(1, keepdim=True), ~padding)
        rows = zip(output["completion_ids"], drawn, strict=True)
        ids = [row[mask].tolist() for row, mask in rows]
        group = self._group_size()
        figures = self.health.rollout_figures(ids, self.eos_token_ids, group, self.accelerator)
        if "sampling_per_token_logps" in output and not self.use_vllm:  # with vLLM TRL measures it
            figures |= sampler_gap(output, self.accelerator)
        figures["alpha"] = output["alpha"][0].item()
        figures[SIZES] = float(len(ids) * self.accelerator.num_processes)
        for name, value in figures.items():
            metrics[name].append(value)
        if gaps := metrics.get(f"{SAMPLER_GAP}/mean"):
            check_sampler(gaps[-1])
        if mode == "train":
            self.table.clear()
            self.sound.alpha = figures["alpha"]
            names = ("mean_length", "distinct_ngrams", "distinct_per_prompt", "empty")
            seen = Rollout(*(metrics[f"completions/{name}"][-1] for name in names))
            self.health.check_rollout(self.state.global_step, seen)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **_: Any
    ):
        """TRL asks for the sampling policy's log-probs; the reference's come along with them."""
        tensors = {}
        for kind, values in (("ids", input_ids), ("mask", attention_mask)):
            tensors[f"prompt_{kind}"] = values[:, :-logits_to_keep]
            tensors[f"completion_{kind}"] = values[:, -logits_to_keep:]
        logps, self._ref_logps = self._score(tensors)
        return logps, None, None

    def _score(self, rollout: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B, T] log-probs of policy and reference, 0 where not counted."""
        if self.args.offload_reference:
            rollout = rollout | {"ref_per_token_logps": self._offloaded_reference(rollout)}
        return self._logps(self.model, rollout)

    def _offloaded_reference(self, rollout: dict[str, Any]) -> Tensor:
        """[B, T] log-probs of the reference, which is on the device for this pass alone."""
        none = torch.zeros(rollout["completion_ids"].shape, device=self.accelerator.device)
        self.ref_model.to(self.accelerator.device)
        try:
            with self.health.phase("reference"):  # scored as a policy, which has no reference
                return self._logps(self.ref_model, rollout | {"ref_per_token_logps": none})[0]
        finally:
            self.ref_model.to("cpu")

    @torch.no_grad()
    def _logps(self, model, rollout: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B, T] log-probs of `model` and of its reference, computed in micro-batches."""
        size = self.args.per_device_train_batch_size
        count, parts = len(rollout["completion_ids"]), []
        for start in range(0, count, size):
            part = {k: v[start : start + size] if v.ndim else v for k, v in rollout.items()}
            parts.append(self._run(model, part, log_z=0.0))
        mask = counted_mask(rollout)
        policy, reference = (torch.zeros(mask.shape, device=mask.device) for _ in range(2))
        policy[mask] = torch.cat([out.logps for out in parts]).to(mask.device)
        reference[mask] = torch.cat([out.ref_logps for out in parts]).to(mask.device)
        return policy, reference

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

    def _run(self, model, inputs, **options: Any) -> TBOutput:
        """The loss of one micro-batch, entered through the wrapped model's own forward."""
        policy = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            return self._redirect(model, policy, self._loss_in_forward, policy, inputs, **options)

    def _loss_in_forward(self, policy, inputs, *, log_z=None, normalizer=None) -> TBOutput:
        args = self.args
        prompt_length = inputs["prompt_ids"].shape[1]
        mask = counted_mask(inputs)  # [B, T]
        head = read_head(base_model(policy))
        reference = self._reference(policy, inputs, mask, head)
        hidden = self._hidden(base_model(policy), inputs)
        # A model split over devices (`device_map`) may end on another one than it starts.
        device = head.weight.device
        inputs = {k: v.to(device) for k, v in inputs.items() if isinstance(v, Tensor)}
        mask = mask.to(device)
        if log_z is None:
            log_z = self._estimate_log_z(hidden[:, :prompt_length], inputs)
        group_ids = inputs["group"] if isinstance(log_z, str) else None
        out = None

        def loss_of_head(hidden, head) -> Tensor:
            nonlocal out
            out = fused_linear_tb_loss(
                hidden,
                head.weight,
                inputs["completion_ids"][mask],
                **{k: None if v is None else v.to(device) for k, v in reference.items()},
                cu_seqlens=torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int(),
                alpha=inputs.get("alpha", args.alpha),
                psi=inputs.get("psi"),
                old_logps=self._old_logps(inputs, mask),
                clip_eps=args.clip_eps,
                balance=args.balance,
                normalizer=normalizer,
                bias=head.bias,
                temperature=self.temperature,
                return_entropy="detached",
                backend=args.loss_backend,
                grad_tolerance=args.grad_tolerance,
                round_logits=args.round_logits,
                check_finite=False,  # SoundSteps stops on all ranks together
                log_z=log_z,
                group_ids=group_ids,
                **head.transform,
            )
            return out.loss

        ref_head = reference.get("ref_weight"), reference.get("ref_bias")
        with maybe_gather_lm_head_ctx(*ref_head):
            rows = counted(hidden, mask, head)
            loss = through_head(base_model(policy), head, loss_of_head, rows)
        return out._replace(loss=loss)

    def _hidden(self, base, inputs) -> Tensor:  # [B, L, H]
        forward = packed_hidden_state if self.args.padding_free else last_hidden_state
        pairs = (("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask"))
        return forward(base, *(torch.cat([inputs[a], inputs[b]], dim=1) for a, b in pairs))

    def _reference(self, policy, inputs, mask, own: ModelHead) -> dict[str, Any]:
        """The loss's keywords of the reference, whose pass is before the policy's."""
        if "ref_per_token_logps" in inputs:
            return {"ref_logps": inputs["ref_per_token_logps"][mask]}
        with torch.no_grad(), self.health.phase("reference"):
            if self.ref_model is not None:
                base = self.accelerator.unwrap_model(self.ref_model)
                hidden = self._redirect(self.ref_model, base, self._hidden, base, inputs)
                head = read_head(base)
            else:
                base = base_model(policy)
                with self.as_reference(policy):
                    hidden = self._hidden(base, inputs)
                    head = read_head(base)
        keywords = {"ref_hidden": counted(hidden, mask, head)}
        if head.weight is not own.weight:
            keywords |= {"ref_weight": head.weight, "ref_bias": head.bias}
        return keywords

    def _estimate_log_z(self, prompt_hidden: Tensor, inputs) -> Tensor | str:
        if self.log_z is not None:
            mask = inputs["prompt_mask"].to(self.accelerator.device)
            log_z = self.log_z.head(prompt_hidden.detach().to(mask.device), mask)
            return log_z.to(inputs["prompt_mask"].device)
        return inputs.get("group_log_z", "group")

    def _old_logps(self, inputs, mask) -> Tensor | None:
        """[N] log-probs by the policy that sampled: the sampler's own, else the old policy's."""
        old = inputs.get("old_per_token_logps")
        sampled = inputs.get("sampling_per_token_logps")
        if sampled is not None and self.vllm_importance_sampling_correction and old is not None:
            old = torch.where(sampled.isnan(), old, sampled)  # NaN: the sampler could not say
        return None if old is None else old[mask]

    @torch.no_grad()
    def _record(self, out: TBOutput, inputs, mode: str) -> None:
        self.sums[mode].add(out)
        if mode == "eval":
            return
        if self.log_completions:
            self.table.add(out, inputs["row"], self._gather)
        tokens = inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()
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
            tokens = 0 if self._tokens is None else int(self._gather(self._tokens[None]).sum())
            self._tokens = None
            figures |= self.health.figures(tokens, steps)
            if self.accelerator.is_main_process:
                shown = min(self.args.sample_completions, self.num_generations)
                texts = self._logs["prompt"], self._logs["completion"]
                self.health.write_sample(self.state.global_step, *map(list, texts), shown)
        logs.update(figures)  # in place: what `evaluate` returns
        with self.table.in_place_of_rewards(self._logs, mode == "train"):
            super().log(logs, start_time)

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
