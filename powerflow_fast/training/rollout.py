"""The rollouts of `PowerFlowTrainer`: prompts in, scored completions and their figures out.

TRL draws the completions and keeps them in a dictionary, padded to [B, T]. Added here are psi,
alpha, the log-probs that an update needs but can no longer compute, and the watch for collapse.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from powerflow_fast.loss import tb_loss
from powerflow_fast.models.context import Context
from powerflow_fast.models.lm_head import base_model
from powerflow_fast.models.prefill import prompts_once
from powerflow_fast.models.sampling import generation_config
from powerflow_fast.rewards import no_psi
from powerflow_fast.training.ahead import as_sent, is_whole
from powerflow_fast.training.completion_table import CompletionTable
from powerflow_fast.training.data_checks import LONG, check_prompt
from powerflow_fast.training.forward import LossInForward, counted_mask
from powerflow_fast.training.health import RolloutFigures, SoundSteps, check_sampler
from powerflow_fast.training.metrics import ROLLOUT_SIZES
from powerflow_fast.training.replay import Kept, Replay
from powerflow_fast.training.sampler import Sampler

SAMPLER_GAP = "sampling/sampling_logp_difference"  # in the logs, as TRL's
DRIFT = "sampling/drift"  # in the logs: the same of a rollout that an earlier policy drew


class ScoredRollouts(LossInForward):
    """TRL's trainer whose rollouts carry what the LA-TB loss needs of each completion."""

    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    eos_token_ids: list[int]
    sound: SoundSteps
    table: CompletionTable
    replay: Replay
    _context: Context

    def train(self, *args: Any, **kwargs: Any):
        """As transformers'. vLLM is sent the weights at the first rollout, and at the first after.

        TRL sends them where the step is not that of the last time, by which a second run, and the
        best checkpoint loaded at the end, can pass for what was sent.
        """
        self._last_loaded_step = -1
        try:
            return super().train(*args, **kwargs)
        finally:
            self._last_loaded_step = -1

    def _prepare_inputs(self, generation_batch):
        """As TRL's, but without its shuffle: the completions of a prompt stay together, for group
        log Z' and for what they share."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = split_tensor_dict(batch, steps)
            self.replay.kept.append(Kept(self.state.global_step, batch))
        elif self.args.replay and self._step % steps == 0:
            self._buffered_inputs = split_tensor_dict(self._replayed(), steps)
        return self._buffered_inputs[self._step % steps]

    def _replayed(self) -> dict[str, Any]:
        """One of the last rollouts, its log Z' estimated anew by the policy of now; importance
        weights stay those of the policy that drew it."""
        step, rollout = self.replay.choose(self._step // self.args.steps_per_generation)
        self._metrics["train"]["replay/age"].append(float(self.state.global_step - step))
        alpha = self.args.alpha_at(self.state.global_step)
        rollout = rollout | {"alpha": torch.full_like(rollout["psi"], alpha)}
        if self.log_z is None:
            now = rollout | {"old_per_token_logps": self._score(rollout)[0]}
            size = self._group_size()
            rollout["group_log_z"] = group_log_z(now, size, self.args, self.accelerator)
        return rollout

    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _groups_are_whole(self) -> bool:
        """Whether every micro-batch holds all completions of its prompts, for the group log Z'."""
        mode = "train" if self.model.training else "eval"
        size = getattr(self.args, f"per_device_{mode}_batch_size")
        return self.args.log_z == "group" and size % self._group_size() == 0

    def _tokenize_prompts(self, prompts: list):
        """As TRL's, and checked: a stream's prompts are seen here for the first time."""
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
        """TRL's rollout plus per-sequence tensors, which survive its split.

        Always: psi, alpha, group and row [B], and num_sequences (not empty, over all ranks).
        Where micro-batches split a prompt's completions, or a rollout serves several updates:
        group_log_z [B], so that the split does not matter. Where a rollout serves several updates,
        or the reference is on the device only now: old_ and ref_per_token_logps [B, T].
        """
        self._ref_logps = None
        base = base_model(self._policy())
        ends = {"eos_token_id": self.eos_token_ids, "pad_token_id": self._tokenizer.pad_token_id}
        with self.health.phase("rollout"), generation_config(base, **ends), prompts_once(base):
            output = super()._generate_and_score_completions(inputs)
        count, rank = len(inputs), self.accelerator.process_index
        rows = torch.arange(rank * count, (rank + 1) * count, device=self._psi.device)
        output["row"] = rows  # this rank's, of the whole rollout's
        output["psi"], output["group"] = self._psi[rows], rows // self._group_size()
        output["alpha"] = torch.full_like(output["psi"], self.args.alpha_at(self.state.global_step))
        sequences = counted_mask(output).any(1).sum()
        output["num_sequences"] = self.accelerator.gather(sequences).sum()
        several = self.model.training and (
            self.args.steps_per_generation * self.num_iterations
            > self.args.gradient_accumulation_steps
            or self.args.replay > 0
        )
        estimated = self.log_z is None and (several or not self._groups_are_whole())
        fresh = self.log_z is not None and not self.log_z.started
        if self._ref_logps is not None:  # TRL has asked for the old policy's
            output["ref_per_token_logps"] = self._ref_logps
        elif several or estimated or fresh or "sampling_per_token_logps" in output:
            scores = self._score(output)
            output["old_per_token_logps"], output["ref_per_token_logps"] = scores
        elif self.args.offload_reference:
            output["ref_per_token_logps"] = self._offloaded_reference(output)
        if estimated or fresh:
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
            figures |= self._sampler_figures(output)
        figures["alpha"] = output["alpha"][0].item()
        figures[ROLLOUT_SIZES] = float(len(ids) * self.accelerator.num_processes)
        for name, value in figures.items():
            metrics[name].append(value)
        if gaps := metrics.get(f"{SAMPLER_GAP}/mean"):
            check_sampler(gaps[-1], self.args.max_sampler_gap)
        if mode == "train":
            self.table.clear()
            self.sound.alpha = figures["alpha"]
            names = ("mean_length", "distinct_ngrams", "distinct_per_prompt", "empty")
            seen = RolloutFigures(*(metrics[f"completions/{name}"][-1] for name in names))
            self.health.check_rollout(self.state.global_step, seen)

    def _sampler_figures(self, output: dict[str, Any]) -> dict[str, float]:
        """How far the sampler's log-probs are from those of the policy that drew, over all ranks,
        and for a rollout drawn ahead how far the policy has moved since."""
        sampler: Any = self.rollout_func
        asked = sampler.drawn if isinstance(sampler, Sampler) else None
        far = sampler_gap(output, self.accelerator)
        if asked is None or asked.step == self.state.global_step:
            return {f"{SAMPLER_GAP}/{name}": value for name, value in far.items()}
        figures = {f"{DRIFT}/{name}": value for name, value in far.items()}
        weights = sampler.weights(asked.policy) if is_whole(self._policy()) else None
        if all(gather_object([weights is not None])):
            assert weights is not None
            row = counted_mask(output).any(1).int().argmax()
            one = {k: v[row : row + 1] if v.ndim else v for k, v in output.items()}
            with as_sent(self._policy(), weights):
                one["old_per_token_logps"] = self._score(one)[0]
            gap = sampler_gap(one, self.accelerator)
            figures |= {f"{SAMPLER_GAP}/{name}": value for name, value in gap.items()}
        return figures

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


@torch.no_grad()
def group_log_z(rollout: dict[str, Any], group_size: int, args, accelerator) -> Tensor:
    """[B] each prompt's log Z' estimate [nats/token]; all ranks together hold whole groups."""
    mask = counted_mask(rollout)
    scored = tb_loss(
        rollout["old_per_token_logps"],
        rollout["ref_per_token_logps"],
        mask=mask,
        log_z=0.0,  # the residual is then minus the estimate
        alpha=rollout["alpha"],
        psi=rollout["psi"],
        balance=args.balance,
        backend=args.loss_backend,
        check_finite=False,
    )
    residual = accelerator.gather(scored.residual)
    not_empty = accelerator.gather(mask.any(1)).view(-1, group_size)
    total = -residual.view_as(not_empty).where(not_empty, 0.0).sum(1)
    return (total / not_empty.sum(1).clamp(min=1))[rollout["group"]]


def sampler_gap(rollout: dict[str, Any], accelerator) -> dict[str, float]:
    """|log-prob of the policy - of the sampler| per counted token: mean and max over all ranks."""
    sampled = rollout["sampling_per_token_logps"]
    gap = (rollout["old_per_token_logps"] - sampled).abs()
    gap = gap[counted_mask(rollout) & ~sampled.isnan()]  # NaN: the sampler could not say
    largest = gap.max() if len(gap) else gap.sum()
    figures = torch.stack([gap.sum(), gap.new_tensor(len(gap)), largest])
    figures = accelerator.gather(figures[None])  # [ranks, 3]
    mean = figures[:, 0].sum() / figures[:, 1].sum().clamp(min=1)
    return {"mean": mean.item(), "max": figures[:, 2].max().item()}
