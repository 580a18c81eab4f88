"""`LATBTrainer`: LA-TB on completions that exist already, on transformers' Trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from powerflow_fast.checks import (
    check_adapter,
    check_pair,
    check_parallel,
    given_back,
    trial_ids,
)
from powerflow_fast.context import Context
from powerflow_fast.health import FiniteSteps
from powerflow_fast.integrations.head_patch import patch_head
from powerflow_fast.loss import tb_loss
from powerflow_fast.metrics import MetricSums
from powerflow_fast.model_head import base_model, disable_dropout, keep_gradient
from powerflow_fast.sampling import end_tokens


def _plain(value: Any) -> Any:
    """Lists and numbers, where a data set gives tensors or arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _token_ids(
    prompt: Any, completion: Any, tokenizer, ends: list[int]
) -> tuple[list[int], list[int]]:
    """Of text, of messages, or as they are; text and messages get an end token if they lack one."""
    prompt, completion = _plain(prompt), _plain(completion)
    messages = [x for x in (prompt, completion) if _is_messages(x)]
    if messages and not _is_messages(prompt):
        raise ValueError("prompt: expected messages, as the completion is, got text or token ids")
    if _is_messages(prompt):
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        if _is_messages(completion):
            whole = tokenizer.apply_chat_template([*prompt, *completion], return_dict=False)
            if whole[: len(start)] != start:
                raise ValueError(
                    "prompt: its chat template gives other tokens once the completion follows; "
                    "give token ids"
                )
            completion = whole[len(start) :]
            last = max((i for i, token in enumerate(completion) if token in ends), default=None)
            completion = completion if last is None else completion[: last + 1]
            return start, _ended(completion, tokenizer, ends)
        prompt = start
    if isinstance(prompt, str):
        prompt = tokenizer(prompt)["input_ids"]
    if isinstance(completion, str):
        completion = tokenizer(completion, add_special_tokens=False)["input_ids"]
        completion = _ended(completion, tokenizer, ends)
    return prompt, completion


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _ended(completion: list[int], tokenizer, ends: list[int]) -> list[int]:
    if completion and completion[-1] in ends:
        return completion
    return [*completion, tokenizer.eos_token_id]


@torch.no_grad()
def _scores(model: PreTrainedModel) -> Tensor:
    """[1, T] log-probs of a few tokens, as training scores them."""
    ids = trial_ids(base_model(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return model(**inputs, fused_lm_head=True).log_probs


class LATBTrainer(Trainer):
    """Trains on (prompt, completion) rows that some sampler wrote, without sampling any.

    Rows of one prompt are kept together: a batch size counts prompts, not completions. The loss is
    the mean over all completions of an optimizer step, whatever the micro-batches and ranks.

    Args:
        model: a causal language model with `ref_model`, or a PeftModel, whose base without its
            adapter is the reference.
        args: TrainingArguments; `remove_unused_columns` is set to False.
        train_dataset, eval_dataset: rows with `prompt` and `completion` (text, messages, or token
            ids), and optionally `old_logps` (one log-prob [nats] per completion token, from the
            policy that sampled; they give clipped importance weights) and `psi` (format term,
            nats/token). A completion given as text or messages gets the tokenizer's
            end-of-sequence token, unless it ends with one of the model's already.
        processing_class: the tokenizer.
        ref_model: the frozen reference where it is not the base of `model`.
        alpha, log_z, clip_eps: as in `tb_loss`; "group" needs two completions of every prompt.
        temperature: at which the completions were sampled.
        head: further options of `patch_head`: `backend`, `grad_tolerance`, `round_logits`. Those
            that the model was patched with before stay.
        **kwargs: every other argument of Trainer.

    Raises:
        ValueError: for rows it cannot use, a missing reference, or a head `patch_head` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Iterable[Mapping[str, Any]],
        *,
        processing_class,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        ref_model: PreTrainedModel | None = None,
        alpha: float = 4.0,
        log_z: float | str = "group",
        clip_eps: float = 0.2,
        temperature: float = 1.0,
        head: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if ref_model is None and not hasattr(model, "disable_adapter"):
            raise ValueError("ref_model: expected a model, or a PeftModel as `model`, got neither")
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("model: nothing to train, every parameter is frozen")
        for adapter in getattr(model, "peft_config", {}).values():
            check_adapter(adapter)
        self._grouped, self._pad = log_z == "group", processing_class.pad_token_id or 0
        ends = end_tokens(model, processing_class)
        check_parallel(args)
        self._context = Context(model.config)
        train_items = self._encode(train_dataset, processing_class, ends)
        eval_items = None
        if eval_dataset is not None:
            eval_items = self._encode(eval_dataset, processing_class, ends)
        args.remove_unused_columns = False
        with given_back(model), given_back(ref_model):
            for part in (model, ref_model):
                if part is not None:
                    patch_head(part, temperature, **(head or {}))
                    disable_dropout(part)
                    keep_gradient(part)
            super().__init__(
                model,
                args,
                self._collate,
                train_items,
                eval_items,
                processing_class=processing_class,
                **kwargs,
            )
            for part in (model, ref_model):
                if part is not None:
                    check_pair(part, trial=partial(_scores, part))
        self.add_callback(FiniteSteps(self.accelerator))
        self.loss_is_scaled_for_ga = True
        self.loss_options = {"alpha": alpha, "log_z": log_z, "clip_eps": clip_eps}
        self.ref_model = None
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(
                ref_model.eval().requires_grad_(False), evaluation_mode=True
            )
        self.sums = {"train": MetricSums(), "eval": MetricSums()}
        self._logged_step = 0

    def _encode(
        self, rows: Iterable[Mapping[str, Any]], tokenizer, ends: list[int]
    ) -> list[list[dict[str, Any]]]:
        """Rows as token ids, those of one prompt together."""
        groups: dict[tuple[int, ...], list[dict[str, Any]]] = defaultdict(list)
        for place, row in enumerate(rows):
            if not {"prompt", "completion"} <= row.keys():
                raise ValueError(
                    f"row {place}: expected columns prompt and completion, got {sorted(row)}"
                )
            prompt, completion = _token_ids(row["prompt"], row["completion"], tokenizer, ends)
            old = _plain(row.get("old_logps"))
            if not len(prompt) or (old is not None and len(old) != len(completion)):
                raise ValueError(
                    f"row {place}: expected a prompt and one of old_logps per completion token, "
                    f"got {len(prompt)} prompt tokens, {len(completion)} completion tokens and "
                    f"{'no' if old is None else len(old)} old_logps"
                )
            self._context.check(f"row {place}", len(prompt) + len(completion))
            psi = _plain(row.get("psi"))
            psi = 0.0 if psi is None else psi
            for name, values in (("psi", [psi]), ("old_logps", old or [])):
                if not all(map(math.isfinite, values)):
                    raise ValueError(f"row {place}: {name}: expected finite numbers, got {values}")
            item = {"prompt": prompt, "completion": completion, "psi": psi}
            groups[tuple(prompt)].append(item | {"old_logps": old})
        if self._grouped:
            for group in groups.values():
                if len(group) < 2:
                    raise ValueError(
                        "log_z='group': expected at least 2 completions of every prompt, got one "
                        f"of {tokenizer.decode(group[0]['prompt'])!r}; or give log_z a number"
                    )
        items = [item for group in groups.values() for item in group]
        if len({item["old_logps"] is None for item in items}) > 1:
            raise ValueError("old_logps: expected in every row or in none")
        return list(groups.values())

    def _collate(self, groups: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """Right-padded tensors [S, T]; old_logps [S, T - 1] lie where log-probs will."""
        items = [item for group in groups for item in group]
        width = max(len(item["prompt"]) + len(item["completion"]) for item in items)
        ids = torch.full((len(items), width), self._pad)
        labels, old = torch.full_like(ids, -100), torch.zeros(len(items), width - 1)
        attention_mask = torch.zeros_like(ids)
        for i, item in enumerate(items):
            start, end = len(item["prompt"]), len(item["prompt"]) + len(item["completion"])
            ids[i, :end] = torch.tensor([*item["prompt"], *item["completion"]])
            labels[i, start:end] = ids[i, start:end]
            attention_mask[i, :end] = 1
            if item["old_logps"] is not None:
                old[i, start - 1 : end - 1] = torch.tensor(item["old_logps"])
        batch = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        batch["psi"] = torch.tensor([float(item["psi"]) for item in items])
        if self._grouped:
            sizes = torch.tensor([len(group) for group in groups])
            batch["group_ids"] = torch.arange(len(groups)).repeat_interleave(sizes)
        if items[0]["old_logps"] is not None:
            batch["old_logps"] = old
        return batch

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Micro-batches of one step, and how many completions they hold on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum((batch["labels"] != -100).any(1).sum() for batch in batches)
        count = self.accelerator.gather(torch.as_tensor(count, device=device)).sum()
        return batches, count.clamp(min=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        names = ("old_logps", "psi", "group_ids")
        options = {name: inputs.pop(name) for name in names if name in inputs}
        normalizer = None  # an evaluation counts its own sequences
        if self.model.training:  # DDP averages gradients over ranks
            normalizer = num_items_in_batch / self.accelerator.num_processes
        with torch.no_grad():
            if self.ref_model is not None:
                reference = self.ref_model(**inputs, fused_lm_head=True)
            else:
                with self.accelerator.unwrap_model(model).disable_adapter():
                    reference = model(**inputs, fused_lm_head=True)
        scored = model(**inputs, fused_lm_head=True)
        out = tb_loss(
            scored.log_probs,
            reference.log_probs.to(scored.log_probs.device),
            mask=scored.label_mask,
            normalizer=normalizer,
            **self.loss_options,
            **{name: value.to(scored.log_probs.device) for name, value in options.items()},
        )
        self.sums["train" if self.model.training else "eval"].add(out)
        return (out.loss, scored) if return_outputs else out.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss's metrics since the last log, over all ranks, by PowerFlowTrainer's names.

        Those of an evaluation begin with `eval_`.
        """
        mode = "train" if self.model.training else "eval"
        steps = self.state.global_step - self._logged_step if mode == "train" else 1
        figures = self.sums[mode].figures(self._gather, steps)
        if mode == "train":
            self._logged_step = self.state.global_step
        else:
            figures = {f"eval_{name}": value for name, value in figures.items()}
        logs.update(figures)  # in place: what `evaluate` returns
        super().log(logs, start_time)

    def _gather(self, values: Tensor) -> Tensor:
        return self.accelerator.gather(values.to(self.accelerator.device))
