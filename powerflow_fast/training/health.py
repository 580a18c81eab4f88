"""What a run reports about itself, and when it ends itself.

Repetition, distinct and empty completions, seconds per phase, tokens per second, peak memory, and a
sample of completions to read. A run whose completions collapse, whose steps train nothing, or whose
loss is no longer a number, ends with `TrainingStopped` before the optimizer can make it worse.
All of it only reads; samples.txt is the one file written.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from powerflow_fast.data.prompts import text_of
from powerflow_fast.evaluation.scores import ngrams

SAMPLES = "samples.txt"
NGRAM = 4  # tokens
PATIENCE = 3  # bad rollouts, or steps of no gradient, in a row
EMPTY = 0.5  # share of completions that hold nothing but an end token, above which they are empty
SHORT = 2  # mean length in tokens up to which a warning asks whether that is meant
START_KL = 1e-2  # nats/token between policy and reference, above which a run does not start
NEAR_KL = 1e-3  # nats/token between the two above which a run warns
NOT_FINITE = (
    "Lower learning_rate, set max_grad_norm, prefer bf16 to fp16, and look for -inf in the "
    "sampler's or psi's values"
)


class TrainingStopped(RuntimeError):
    """The run ended itself; the message says what happened and what to change."""


Named = Iterable[tuple[str, torch.nn.Parameter]]


def check_start(kl: float, adapted: bool, limit: float = START_KL) -> None:
    """Whether the policy starts at the reference, by the KL [nats/token] of the first batch.

    Raises:
        TrainingStopped: for a KL above `limit`, with the likely cause.
    """
    if not kl > NEAR_KL:
        return
    cause = "the reference was loaded from other weights than the model's own"
    if adapted:
        cause = "the adapter does not start at zero, or changes the base (PiSSA, OLoRA)"
    text = f"policy and reference differ before the first step (KL {kl:.3g} nats/token): {cause}"
    if kl > limit:
        raise TrainingStopped(f"{text}; expected 0, and at most {limit:g}")
    warnings.warn(text, stacklevel=3)


def check_gradients(step: int, named: Named, gather) -> float:
    """The largest entry of all gradients; TrainingStopped, on all ranks, where one is not finite.

    Reads one number. `gather` collects a tensor [1] from every rank.
    """
    gradients = ((name, p.grad) for name, p in named if p.grad is not None)
    largest, found = _largest(gradients, gather)
    if found is not None:
        raise TrainingStopped(
            f"the gradient{found} at step {step} is not finite; parameters are as they were before "
            f"this step. {NOT_FINITE}"
        )
    return largest


def check_parameters(step: int, named: Named, gather) -> None:
    """TrainingStopped, on all ranks, where a trained parameter is not finite: an update overflowed.

    `gather` as in `check_gradients`.
    """
    _, found = _largest(((name, p) for name, p in named if p.requires_grad), gather)
    if found is not None:
        raise TrainingStopped(
            f"a parameter{found} is not finite after step {step}, and is not saved; go back to an "
            f"earlier checkpoint. {NOT_FINITE}"
        )


def _largest(tensors: Iterable[tuple[str, Any]], gather) -> tuple[float, str | None]:
    """The largest absolute entry on all ranks (NaN without any tensor), and whose entry is not
    finite: " of <name>", "" for another rank's tensor, None where all are finite."""
    plain = {name: _plain(x) for name, x in tensors}
    if not plain:  # on every rank alike
        return math.nan, None
    device = next(iter(plain.values())).device
    # A rank may have no part of a small parameter, but takes part in the answer.
    parts = [x.abs().amax().float().to(device) for x in plain.values() if x.numel()]
    of_this_rank = torch.stack([*parts, torch.zeros((), device=device)]).max()
    largest = gather(of_this_rank[None]).max().item()  # NaN is the largest
    if math.isfinite(largest):
        return largest, None
    return largest, next((f" of {name}" for name, x in plain.items() if not x.isfinite().all()), "")


def _plain(tensor: Any) -> torch.Tensor:
    """Without its graph; of a DTensor, this rank's part."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def check_sampler(gap: float, limit: float) -> None:
    """Whether a sampler draws from the policy, by the mean distance of their log-probs.

    Args:
        gap: that distance, nats/token.
        limit: what rounding may make of it.

    Raises:
        TrainingStopped: above the limit, with the likely causes.
    """
    if gap == math.inf:
        raise TrainingStopped(
            "the sampler gave a log-prob of -inf for a token that it drew; expected finite numbers"
        )
    if gap > limit:
        raise TrainingStopped(
            f"the sampler's log-probs are {gap:.3g} nats/token off the policy's, at most {limit:g} "
            "is expected of rounding: it samples something else. Is its base the same model, in "
            "the same quantisation (an NF4 trainer wants an NF4 server)? Are its log-probs of the "
            "processed logits (vLLM: --logprobs-mode processed_logprobs), at the same temperature? "
            "Is the adapter the newest? If all of this is so, raise max_sampler_gap"
        )


class SoundSteps(TrainerCallback):
    """`check_gradients` before every optimizer step, `check_parameters` before a checkpoint and at
    the end. PATIENCE steps in a row whose gradient is 0 end the run, too.

    fp16's scaler skips steps that are not finite: there gradients are left alone. DeepSpeed hides
    its gradients: there the loss alone is checked.

    Args:
        accelerator: of the trainer.
        stop: whether steps of no gradient end the run.
    """

    def __init__(self, accelerator, stop: bool = True) -> None:
        self.accelerator, self.stop = accelerator, stop
        self.alpha = 0.0  # of this step; at 1 the base is the target, and a gradient of 0 right
        self.still = 0  # steps of no gradient in a row

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if getattr(self.accelerator, "scaler", None) is not None:
            return
        step, gather = state.global_step, self.accelerator.gather
        largest = check_gradients(step, model.named_parameters(), gather)
        self.still = self.still + 1 if largest == 0 and self.alpha != 1 else 0
        if self.stop and self.still >= PATIENCE:
            raise TrainingStopped(
                f"nothing is trained: the gradient was 0 in the {PATIENCE} steps up to {step}. Are "
                "all completions of a prompt alike (samples.txt), or empty? Start again from the "
                "base, with the chat template if it is an instruct model, or bring alpha nearer "
                "to 1 (stop_on_collapse)"
            )

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if control.should_save:
            check_parameters(state.global_step, model.named_parameters(), self.accelerator.gather)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        check_parameters(state.global_step, model.named_parameters(), self.accelerator.gather)


class RolloutFigures(NamedTuple):
    """The figures of a rollout that show a collapse, over all ranks."""

    length: float  # mean, tokens
    distinct_ngrams: float  # share of different n-grams within completions
    distinct_per_prompt: float  # different completions among those of a prompt
    empty: float  # share of completions that hold nothing but an end token


class Health(TrainerCallback):
    """Watches rollouts and losses; every rank sees the same figures, so all stop together."""

    def __init__(self, args) -> None:
        self.args = args
        self.start_length = 0.0  # mean length of the first rollout, tokens
        self.bad: dict[str, int] = {}  # rollouts in a row, by sign of collapse
        self.phases: dict[str, float] = defaultdict(float)  # seconds since the last log
        self._running: list[str] = []
        self._mark = self._logged = time.perf_counter()

    def check_rollout(self, step: int, seen: RolloutFigures) -> None:
        """Raise where completions have collapsed, in PATIENCE rollouts in a row."""
        if not self.start_length and seen.length <= SHORT:
            warnings.warn(
                f"completions have {seen.length:.3g} tokens on average. If that is not meant: does "
                "the model expect its chat template, or is it asked to answer in a word?",
                stacklevel=2,
            )
        self.start_length = self.start_length or seen.length
        if not self.args.stop_on_collapse:
            return
        limit = self.args.min_length_share * self.start_length
        signs = {
            "length": (
                seen.length < limit,
                f"length collapse at step {step}: completions have {seen.length:.3g} tokens on "
                f"average, {self.start_length:.3g} at the start",
                "keep balance='length', or give short completions a psi (min_length_share)",
            ),
            "repetition": (
                seen.distinct_ngrams < self.args.min_distinct,
                f"repetition at step {step}: {seen.distinct_ngrams:.0%} of the {NGRAM}-grams in a "
                "completion are distinct",
                "keep balance='length', or shorten max_completion_length (min_distinct)",
            ),
            "empty": (
                seen.empty > EMPTY,
                f"empty completions at step {step}: {seen.empty:.0%} hold nothing but an end token",
                "give an instruct model its chat template (messages as prompts)",
            ),
            "alike": (
                seen.distinct_per_prompt == 1,
                f"alike at step {step}: the completions of every prompt are all the same, so no "
                "difference is left to learn from (arrived, or collapsed? samples.txt tells)",
                "or take the last checkpoint, if its answers are good",
            ),
        }
        for name, (bad, what, cure) in signs.items():
            self.bad[name] = self.bad.get(name, 0) + 1 if bad else 0
            if self.bad[name] >= PATIENCE:
                raise TrainingStopped(
                    f"{what}; in {PATIENCE} rollouts in a row. Go back to an earlier checkpoint; "
                    f"lower learning_rate, bring alpha nearer to 1, {cure}"
                )

    def check_loss(self, step: int, figures: dict[str, float]) -> None:
        """Raise where residuals are not finite; called before the backward pass."""
        if not math.isfinite(figures["residual_mean"] + figures["residual_std"]):
            raise TrainingStopped(
                f"the loss at step {step} is not finite; parameters are as they were before this "
                f"step. {NOT_FINITE}"
            )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`'s, not as that of a phase around it."""
        self._switch([*self._running, name])
        try:
            yield
        finally:
            self._switch(self._running[:-1])

    def _switch(self, running: list[str]) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # a few times a micro-batch, beside its metrics' own
        now = time.perf_counter()
        if self._running:
            self.phases[self._running[-1]] += now - self._mark
        self._mark, self._running = now, running

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._switch([*self._running, "optimizer"])

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._switch(self._running[:-1])

    def figures(self, tokens: int, steps: int) -> dict[str, float]:
        """Seconds a step of each phase, tokens/s (prompts and completions, all ranks), peak memory.

        `tokens` and optimizer `steps` are those of the policy's training since the last call.
        """
        now = time.perf_counter()
        figures = {f"time/{name}": t / max(steps, 1) for name, t in sorted(self.phases.items())}
        figures["tokens_per_second"] = tokens / (now - self._logged)
        figures["memory/peak_gb"] = peak_memory() / 1e9
        self.phases.clear()
        self._logged = now
        return figures

    @staticmethod
    def rollout_figures(
        sequences: Sequence[Sequence[int]], ends: Sequence[int], group_size: int, accelerator
    ) -> dict[str, float]:
        """Repetition and diversity of this rank's completions' token ids, over all ranks.

        `ends` are the tokens that end a text.
        """
        distinct = torch.tensor([distinct_token_ngrams(sequences)], device=accelerator.device)
        empty = torch.tensor([set(ids) <= set(ends) for ids in sequences])
        empty = empty.to(accelerator.device).float()
        hashes = torch.tensor([hash(tuple(ids)) for ids in sequences], device=accelerator.device)
        groups = accelerator.gather(hashes).view(-1, group_size).tolist()
        return {
            "completions/distinct_ngrams": accelerator.gather(distinct).mean().item(),
            "completions/distinct_per_prompt": sum(len(set(g)) for g in groups) / len(groups),
            "completions/empty": accelerator.gather(empty).mean().item(),
        }

    def write_sample(self, step: int, prompts: list, completions: list, shown: int) -> None:
        """Append the first `shown` completions of one prompt to samples.txt in the run's folder."""
        if not (shown and completions):
            return
        lines = [f"=== step {step}", f"prompt: {text_of(prompts[0])}"]
        lines += [f"--- {i}: {text_of(c)}" for i, c in enumerate(completions[:shown], start=1)]
        try:
            os.makedirs(self.args.output_dir, exist_ok=True)
            with open(os.path.join(self.args.output_dir, SAMPLES), "a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n\n")
        except OSError as error:  # no reason to stop; the next checkpoint will be one
            warnings.warn(f"{SAMPLES} could not be written: {error}", stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        return {"start_length": self.start_length, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_length, self.bad = state["start_length"], dict(state["bad"])


def distinct_token_ngrams(sequences: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """Mean over sequences of different token n-grams / all; 1 where none has n tokens."""
    shares = []
    for ids in sequences:
        if grams := ngrams(ids, n):
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 1.0


def peak_memory() -> int:
    """Bytes: the most this process allocated on its accelerator, or else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
