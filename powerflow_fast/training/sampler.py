"""Rollouts that are drawn elsewhere: asked for, waited for, and scored by what drew them.

`Sampler` keeps the order: which policy draws which rollout, with which seeds, how stale a rollout
is when it comes, and what of it a checkpoint holds. What draws it is a subclass's matter;
`vllm_adapter.AdapterRollout` is the one for a vLLM server.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from powerflow_fast.training.agreement import on_every_rank
from powerflow_fast.training.health import TrainingStopped


class SamplerError(TrainingStopped):
    """The sampler is gone, refuses, or answers otherwise than it must."""


@dataclass
class Asked:
    """A rollout that was asked for: this rank's rows."""

    prompt_ids: list[list[int]]
    policy: str  # name of what draws it; "" where a checkpoint had it
    step: int  # updates that this policy had seen
    answers: list[Future]  # {"token_ids": [...], "logprobs": [...]} of every row
    at: float = field(default_factory=time.monotonic)


class Sampler(ABC):
    """What draws the rollouts of a `PowerFlowTrainer`, as its `rollout_func`.

    Every method is called on all ranks alike, each with its own rows.
    """

    def __init__(self) -> None:
        self.asked: dict[int, Asked] = {}  # by number of the rollout
        self.drawn: Asked | None = None  # the one that was handed out last
        self.policy = ""  # name of the newest policy that was sent
        self.failed = False
        self._restored: dict[int, dict[str, Any]] = {}
        self._sent: tuple[Any, int] | None = None  # state and step of the newest policy
        self._last_answer = 0.0  # when it came

    def prepare(self, args, model, peft_config) -> None:
        """Before a trainer is built: `fit` to the adapter that it will train."""
        given = getattr(model, "peft_config", {}).get("default") if peft_config is None else None
        adapter = peft_config or given
        if adapter is None:
            raise ValueError(
                f"rollout_func: {type(self).__name__} sends an adapter, and there is none; pass a "
                "peft_config, or a PeftModel"
            )
        ranks = [getattr(adapter, "r", 1), *(getattr(adapter, "rank_pattern", None) or {}).values()]
        self.fit(args, max(ranks))

    def fit(self, args, rank: int) -> None:
        """`check`, whose limit becomes the run's context length."""
        limits = self.check(args, rank), args.vllm_max_model_length
        args.vllm_max_model_length = min((n for n in limits if n), default=None)

    @abstractmethod
    def check(self, args, rank: int) -> int | None:
        """Tokens that a prompt and its completion may have together, None for any; ValueError
        where it cannot serve a run with the options `args` and adapters of `rank`."""

    @abstractmethod
    def put(self, trainer) -> str:
        """Send the policy of now; returns the name that it got."""

    @abstractmethod
    def draw(self, prompt_ids: list[list[int]], seeds: list[int], trainer) -> list[Future]:
        """Begin to draw a completion of each prompt by the newest policy."""

    @abstractmethod
    def wait(self, asked: Asked) -> list[dict[str, Any]]:
        """The answers to a rollout; SamplerError where they do not come."""

    @abstractmethod
    def retire(self, needed: set[str]) -> None:
        """Drop all policies but those of these names."""

    def weights(self, policy: str) -> dict[str, Any] | None:
        """The adapter's tensors of a policy that was sent, by PEFT's names, while they are kept."""
        return None

    def close(self) -> None:
        """At the end of `train()`: leave nothing behind; the next rollout sends its policy anew."""
        self.asked, self.drawn, self._restored = {}, None, {}
        self.policy, self._sent, self.failed = "", None, False

    def __call__(self, prompts: list, trainer) -> dict[str, Any]:
        """TRL's form of a rollout: prompt_ids and completion_ids, a list of token ids for each row,
        and logprobs, the sampler's [nats] of the completion's tokens, which become `old_logps`."""
        training = trainer.model.training
        number = trainer.rollout_number() if training else -1
        if number not in self.asked:
            self.ask(number, prompts, trainer)
        self.drawn = asked = self.asked.pop(number)
        began = time.monotonic()
        answers, problem = on_every_rank(lambda: self.wait(asked), (SamplerError,))
        if problem is not None:
            self.failed = True
            raise SamplerError(problem.text) from problem.error
        assert answers is not None
        metrics = trainer._metrics["train" if training else "eval"]
        metrics["sampling/staleness"].append(float(trainer.state.global_step - asked.step))
        metrics["sampling/trainer_waits"].append(time.monotonic() - began)
        return {
            "prompt_ids": asked.prompt_ids,
            "completion_ids": [answer["token_ids"] for answer in answers],
            "logprobs": [answer["logprobs"] for answer in answers],
        }

    def ask(self, number: int, prompts: list, trainer) -> None:
        """Have the policy of now draw the rollout `number`, in the background."""
        self._send(trainer)
        prompt_ids = trainer._tokenize_prompts(prompts)[0]
        found = self._restored.pop(number, None)
        if found is not None and found["prompt_ids"] == prompt_ids:
            answers = [done(answer) for answer in found["answers"]]
            self.asked[number] = Asked(prompt_ids, "", found["step"], answers)
            return
        step, rank = trainer.state.global_step, trainer.accelerator.process_index
        what = (trainer.args.seed, number if number >= 0 else f"evaluation {step}")
        rows = enumerate(prompt_ids, start=rank * len(prompts))  # places over all ranks
        if number >= 0:
            trainer._metrics["train"]["sampling/sampler_waits"].append(self._idle())
        answers = self.draw(prompt_ids, [seed_of(*what, *row) for row in rows], trainer)
        for answer in answers:
            answer.add_done_callback(self._answered)
        self.asked[number] = Asked(prompt_ids, self.policy, step, answers)

    def _answered(self, _: Future) -> None:
        self._last_answer = time.monotonic()

    def _idle(self) -> float:
        """Seconds for which nothing has been asked for."""
        busy = any(not f.done() for asked in self.asked.values() for f in asked.answers)
        return 0.0 if busy or not self._last_answer else time.monotonic() - self._last_answer

    def _send(self, trainer) -> None:
        """Send the policy unless this update's is there; drop those that nothing waits for."""
        state, step = trainer.state, trainer.state.global_step
        if self._sent is not None and self._sent[0] is state and self._sent[1] == step:
            return
        self.policy, self._sent = self.put(trainer), (state, step)
        self.retire({self.policy, *(asked.policy for asked in self.asked.values())})

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """This rank's rollouts in flight, which are waited for; those that fail are left out, and
        drawn again after a resume."""
        state = {}
        for number, asked in self.asked.items():
            try:
                if self.failed and not all(answer.done() for answer in asked.answers):
                    continue
                answers = self.wait(asked)
            except SamplerError:
                continue
            state[number] = {
                "prompt_ids": asked.prompt_ids,
                "step": asked.step,
                "answers": answers,
            }
        return state

    def load_state_dict(self, state: dict[int, dict[str, Any]]) -> None:
        self._restored = dict(state)


def seed_of(*what: Any) -> int:
    """A seed for what these words and numbers name, in 48 bits."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def done(result: Any) -> Future:
    """A future that has this result already."""
    future: Future = Future()
    future.set_result(result)
    return future
