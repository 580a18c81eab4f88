"""`LATBTrainer`: LA-TB on completions that exist already, on transformers' Trainer.

Both models are patched with `patch_head`; no completion is drawn and nothing else is changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from powerflow_fast.integrations.offline_rows import Item, RowReader
from powerflow_fast.integrations.patch_head import patch_head
from powerflow_fast.logprobs.validation import check_choice, check_number, is_finite
from powerflow_fast.loss import tb_loss
from powerflow_fast.models.context import Context
from powerflow_fast.models.lm_head import base_model, trial_ids
from powerflow_fast.models.packing_check import SHARED_PROMPT, LayoutChoice, choose_layout
from powerflow_fast.models.parameters import disable_dropout, keep_gradient, trained_parameters
from powerflow_fast.models.sampling import end_tokens
from powerflow_fast.training.checks import check_adapter, check_arguments
from powerflow_fast.training.given_back import given_back
from powerflow_fast.training.health import SoundSteps
from powerflow_fast.training.metrics import LossFigures
from powerflow_fast.training.progress import show_lines
from powerflow_fast.training.trials import check_pair

Rows = Iterable[Mapping[str, Any]]


@torch.no_grad()
def _scores(model: PreTrainedModel) -> Tensor:
    """[1, T] log-probs of a few tokens, as training scores them."""
    ids = trial_ids(base_model(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return model(**inputs, fused_lm_head=True).log_probs


def _check_options(alpha: float, log_z: float | str, clip_eps: float, shared_prompt: str) -> None:
    check_choice("shared_prompt", shared_prompt, SHARED_PROMPT)
    check_number("alpha", alpha, positive=True)
    check_number("clip_eps", clip_eps)
    if log_z != "group" and (not is_finite(log_z) or isinstance(log_z, bool)):
        raise ValueError(f"log_z: expected 'group' or a finite number, got {log_z!r}")


def _try(models: list[PreTrainedModel], shared_prompt: str) -> LayoutChoice:
    """The layout for all; ValueError for a model that is no policy or no reference."""
    choices = []
    for model in models:
        check_pair(model, trial=partial(_scores, model))
        choices.append(choose_layout(base_model(model), shared_prompt))
    worst = next((choice for choice in choices if choice.best == "padded"), choices[0])
    if worst.reason:
        warnings.warn(worst.reason, stacklevel=4)
    return worst


def _check_models(model: PreTrainedModel, ref_model: PreTrainedModel | None) -> None:
    """ValueError where `model` cannot be trained, or its reference would not stay what it is."""
    if ref_model is None and not hasattr(model, "disable_adapter"):
        raise ValueError("ref_model: expected a model, or a PeftModel as `model`, got neither")
    trained = trained_parameters(model)
    if not trained:
        raise ValueError("model: nothing to train, every parameter is frozen")
    for adapter in getattr(model, "peft_config", {}).values():
        check_adapter(adapter)
    if ref_model is None:
        return
    fixed = {id(p) for p in ref_model.parameters()}
    shared = next((name for name, p in trained.items() if id(p) in fixed), None)
    if shared is not None:
        raise ValueError(
            f"ref_model: it shares {shared} with the model that is trained, so it would move with "
            "it; load a second copy, or leave it out beside a PeftModel"
        )
    sizes = [base_model(m).config.get_text_config().vocab_size for m in (model, ref_model)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"ref_model: expected a vocabulary of {sizes[0]}, got one of {sizes[1]}")


class LATBTrainer(LossFigures):
    """Trains on (prompt, completion) rows that some sampler wrote, without sampling any.

    Rows of one prompt stay together: a batch size counts prompts, not completions. The loss (LA-TB,
    arXiv 2603.18363, eq. 10) is the mean over all completions of an optimizer step, whatever the
    micro-batches and ranks.

    Args:
        model: a causal language model with `ref_model`, or a PeftModel, whose base without its
            adapter is the reference.
        args: TrainingArguments; `remove_unused_columns` is set to False.
        train_dataset, eval_dataset: rows with `prompt` and `completion` (text, messages, or token
            ids), and optionally `old_logps` (one log-prob [nats] per completion token, from the
            policy that sampled; they give clipped importance weights) and `psi` (format term,
            nats/token). A completion given as text or messages gets the tokenizer's
            end-of-sequence token, unless it ends with one of the model's already. `eval_dataset`
            may be a dict of data sets; figures in the logs then carry their names.
        processing_class: the tokenizer.
        ref_model: the frozen reference where it is not the base of `model`.
        alpha, log_z, clip_eps: as in `tb_loss`; "group" needs two completions of every prompt.
        temperature: the one the completions were sampled at, > 0.
        shared_prompt: compute a prompt once for its completions in a micro-batch: "auto" where the
            models can and it pays, "on" or an error, "off".
        head: further options of `patch_head`: `backend`, `grad_tolerance`, `round_logits`. Options
            of an earlier `patch_head` of the model stay.
        **kwargs: every other argument of Trainer.

    Raises:
        ValueError: for rows it cannot use, a missing reference, or a head `patch_head` refuses.
        TrainingStopped: from `train()`, where loss, gradient or a parameter is not finite, or the
            gradient stays 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Rows,
        *,
        processing_class,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        ref_model: PreTrainedModel | None = None,
        alpha: float = 4.0,
        log_z: float | str = "group",
        clip_eps: float = 0.2,
        temperature: float = 1.0,
        shared_prompt: str = "auto",
        head: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_models(model, ref_model)
        _check_options(alpha, log_z, clip_eps, shared_prompt)
        self._grouped, self._pad = log_z == "group", processing_class.pad_token_id or 0
        check_arguments(args)
        config, ends = base_model(model).config, end_tokens(model, processing_class)
        vocabulary = config.get_text_config().vocab_size
        self._reader = RowReader(processing_class, ends, vocabulary, Context(config))
        train_items = self._read("train_dataset", train_dataset)
        eval_items = self._read_all("eval_dataset", eval_dataset)
        args.remove_unused_columns = False
        parts = [model] if ref_model is None else [model, ref_model]
        with given_back(model), given_back(ref_model):
            for part in parts:
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
            self._layout = _try(parts, shared_prompt)
        sound = SoundSteps(self.accelerator)
        sound.alpha = alpha
        self.add_callback(sound)
        show_lines(self)
        self.loss_is_scaled_for_ga = True
        self.loss_options: dict[str, Any] = dict(
            alpha=alpha,
            log_z=log_z,
            clip_eps=clip_eps,
            check_finite=False,  # SoundSteps stops on all ranks together
        )
        self.ref_model = None
        if ref_model is not None:
            self.ref_model = self.accelerator.prepare_model(
                ref_model.eval().requires_grad_(False), evaluation_mode=True
            )
        self.start_figures()

    def _read_all(self, name: str, rows: Rows | Mapping[str, Rows] | None) -> Any:
        """A data set, or each of a dict."""
        if isinstance(rows, Mapping):
            return {key: self._read(f"{name}[{key!r}]", part) for key, part in rows.items()}
        return None if rows is None else self._read(name, rows)

    def _read(self, name: str, rows: Rows) -> list[list[Item]]:
        groups = self._reader.groups(name, rows)
        alone = next((group[0] for group in groups if len(group) < 2), None)
        if self._grouped and alone is not None:
            raise ValueError(
                f"{name}: log_z='group': expected at least 2 completions of every prompt, got one "
                f"of {self._reader.tokenizer.decode(alone['prompt'])!r}; or give log_z a number"
            )
        return groups

    def _collate(self, groups: list[list[Item]]) -> dict[str, Tensor]:
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
        batch["prompt_lengths"] = torch.tensor([len(item["prompt"]) for item in items])
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
        if self._layout.of(inputs["input_ids"]) != "shared":
            del inputs["prompt_lengths"]
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
        """Adds the loss's metrics since the last log, over all ranks, by PowerFlowTrainer's names;
        names of an evaluation begin with `eval_`.
        """
        logs.update(self.loss_figures())  # in place: what `evaluate` returns
        super().log(logs, start_time)
