"""Whole optimizer steps, sampling included: PowerFlowTrainer, and TRL's GRPOTrainer.

Both have the same model with LoRA on every linear layer, the same prompts, one a step for a group
of completions, and completions of the same length. GRPO runs with beta > 0, since only then does it
compute a reference, as PowerFlow always does. There is no activation checkpointing, and nothing is
logged to the outside.

A step lasts from the end of the one before to its own. Its phases are two methods that both
trainers have, timed from outside: `_generate` is sampling; the rest of `training_step`, forward and
backward of policy and reference, is the update; what remains is the optimizer, data and logs.

Memory is the peak of the process from the first step to the last beside what it held before, which
is the model, and vLLM's copy of it. On a CPU it is resident memory, with what the C library keeps
of freed blocks: with blocks given back at once, as elsewhere here, steps take up to twice the time.

Settings that were tried for TRL 1.16 on two threads, prompts of 256 and completions of 64 tokens:
micro-batches of 1, 2, 4 and 8 (31, 26, 28 and 29 s a step), a static cache (30 s), continuous
batching (51 s). Its fused head is on by itself; GRPO has no `padding_free`; the kernels of
`use_liger_kernel` and `use_kernels` are for GPUs. Ours with a prompt for each takes 34 s in
micro-batches of 2, 23 s in one of 8.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, step_models

PHASES = ("sampling", "update", "rest")
METHODS = ("_generate", "training_step")  # the second calls the first
LENGTH = "completions/mean_length"
OURS, EACH, TRL, TRL_WHOLE = (
    "powerflow-fast",
    "powerflow-fast, a prompt for each",
    "GRPOTrainer",
    "GRPOTrainer, one micro-batch",
)
TRAINERS = (OURS, TRL, EACH)
MICRO_BATCH = {OURS: 8, EACH: 8, TRL: 2, TRL_WHOLE: 8}  # on a CPU; see above
VLLM = {  # for a CPU
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Case:
    """One trainer with one sampler on one size, in tokens; `model` as `step_models.load` has it."""

    model: str
    trainer: str
    sampler: str  # "transformers" or "vLLM"
    prompt: int
    completion: int
    group: int = 8

    @property
    def id(self) -> str:
        return ", ".join((self.model, self.size, self.sampler, self.trainer))

    @property
    def size(self) -> str:
        return f"{self.prompt} + {self.group} x {self.completion}"

    @property
    def tokens(self) -> int:
        """Real ones of a step: each completion with its prompt."""
        return self.group * (self.prompt + self.completion)

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward and backward pass; a GPU takes them all."""
        most = self.group if torch.cuda.is_available() else MICRO_BATCH[self.trainer]
        return min(most, self.group)


def row(case: Case, folder: Path, **limits: float) -> dict[str, Any]:
    """Of a results file: the case, and what `measure` finds in a process of its own."""
    found = memory.in_child(partial(measure, **limits), case, folder)
    return vars(case) | {"tokens": case.tokens, "micro_batch": case.micro_batch} | found


def measure(case: Case, folder: Path, most: int = 3, enough: float = 50.0) -> dict[str, Any]:
    """Up to `most` steps, none after `enough` seconds; `folder` is one for all cases.

    A step of few tokens, by a trainer of its own, comes first and loads libraries. Of vLLM's steps
    the first does not count either: its engine starts within it.
    """
    if case.sampler == "vLLM":
        use_vllm(folder)
    few = replace(case, prompt=8, completion=4, sampler="transformers")
    _trainer(few, 1, folder).train()
    gc.collect()
    uncounted = int(case.sampler == "vLLM")
    trainer = _trainer(case, most + uncounted, folder)
    watch = Watch(trainer, enough, uncounted)
    trainer.train()
    lengths = [row[LENGTH] for row in trainer.state.log_history if LENGTH in row]
    if min(lengths) < 0.9 * case.completion:
        raise RuntimeError(f"expected completions of {case.completion} tokens, got {lengths}")
    return {
        "seconds": [sum(step.values()) for step in watch.steps],
        "phases": {name: [step[name] for step in watch.steps] for name in PHASES},
        "peak_bytes": _peak() - watch.held_bytes,
        "held_bytes": watch.held_bytes,
    }


class Watch:
    """Seconds of a trainer's steps by phase, and the memory held before the first.

    It ends the run after `enough` seconds; the first `uncounted` steps do not count.
    """

    def __init__(self, trainer, enough: float, uncounted: int = 0) -> None:
        from transformers import TrainerCallback

        self.steps: list[dict[str, float]] = []
        self.held_bytes = 0
        self._seconds = dict.fromkeys(METHODS, 0.0)
        for method in METHODS:
            setattr(trainer, method, self._timed(getattr(trainer, method), method))

        class Ends(TrainerCallback):
            def on_train_begin(callback, *_, **__):
                self.held_bytes = _held()
                self._mark = self._began = _now()

            def on_step_end(callback, args, state, control, **__):
                self._end_step()
                if state.global_step <= uncounted:
                    self.steps, self._began = [], self._mark
                control.should_training_stop |= self._mark - self._began > enough

        trainer.add_callback(Ends())

    def _timed(self, method: Callable, name: str) -> Callable:
        @wraps(method)
        def timed(*args, **kwargs):
            began = _now()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds[name] += _now() - began

        return timed

    def _end_step(self) -> None:
        now = _now()
        sampling, inside = (self._seconds[method] for method in METHODS)
        parts = (sampling, inside - sampling, now - self._mark - inside)
        self.steps.append(dict(zip(PHASES, parts, strict=True)))
        self._seconds, self._mark = dict.fromkeys(METHODS, 0.0), now


def why_not_vllm() -> str:
    """The reason where vLLM cannot sample here, or else nothing."""
    if torch.cuda.is_available():
        return "the models of random weights are in no folder that it could load"
    found = find_spec("vllm") or (_vllm_folder() / "vllm").is_dir()
    return "" if found else "not installed, and POWERFLOW_VLLM names no folder with it"


def why_not_unsloth() -> str:
    if not torch.cuda.is_available():
        return "it needs a GPU"
    if find_spec("unsloth") is None:
        return "it is not installed"
    return "it patches its peers' trainers, which would no longer be measured as they are"


def use_vllm(folder: Path) -> None:
    """In this process: in float32 like the trainers, and taking the weights that TRL sends it.

    vLLM packs the weights of its products on a CPU and drops the parameters that new ones would go
    to; here it keeps them. TRL names no type, by which vLLM would take bfloat16.
    """
    if (_vllm_folder() / "vllm").is_dir():
        sys.path.insert(0, str(_vllm_folder()))
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of what vLLM starts
    caches = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    os.environ.update(VLLM | {name: str(folder / at) for name, at in caches.items()})
    import vllm.model_executor.layers.utils as layers
    from trl.generation import vllm_generation

    def keep_weights(layer, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = keep_weights
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32")


def _vllm_folder() -> Path:
    return Path(os.environ.get("POWERFLOW_VLLM", "none")).resolve()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _held() -> int:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    memory.give_back()
    memory.reset_resident_peak()
    return memory.resident("VmRSS")


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return memory.resident("VmHWM")


def _trainer(case: Case, steps: int, folder: Path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer

    loaded = step_models.load(case.model, folder / case.model)
    texts = step_models.texts(loaded.tokenizer, case.prompt, steps)
    common = dict(
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=loaded.tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    options = _options(case, steps, folder)
    if case.trainer in (TRL, TRL_WHOLE):
        rewards = lambda completions, **_: [float(i % 2) for i in range(len(completions))]  # noqa: E731
        return GRPOTrainer(loaded.model, rewards, GRPOConfig(**options, beta=0.04), **common)
    options["shared_prompt"] = "on" if case.trainer == OURS else "off"
    args = PowerFlowConfig(**options, sample_completions=0, draw_curves=False)
    return PowerFlowTrainer(loaded.model, args, **common)


def _options(case: Case, steps: int, folder: Path) -> dict[str, Any]:
    options = dict(
        output_dir=str(folder / "run"),
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=case.group // case.micro_batch,
        num_generations=case.group,
        max_completion_length=case.completion,
        max_steps=steps,
        logging_steps=1,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    if case.sampler == "vLLM":
        length = case.prompt + case.completion
        options |= dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=length)
    return options
