"""Stage `prompts`: whole steps in which a prompt is computed once, or for each completion."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks import method
from benchmarks.gpu.lines import Line
from benchmarks.gpu.lora import of_part
from benchmarks.gpu.worker import Run
from benchmarks.peers import PowerflowFast
from benchmarks.training_step import PromptCase, PromptStep, StepCase
from powerflow_fast.models.packing import Layout

SECONDS = 1.5  # of rounds
SIZES = ((256, 64), (256, 256), (1024, 256))  # tokens of a prompt, of a completion
TINY_SIZES = ((8, 4),)
GROUP = 8
LAYOUTS: dict[Layout, str] = {"padded": "for each", "shared": "once"}


def step(run: Run) -> Iterator[None]:
    """The part's model, in the layers that fit; both ways have the same weights and tokens."""
    import transformers.models.llama.modeling_llama  # noqa: F401  (takes seconds)

    yield
    model, one = of_part(run), None
    for prompt, completion in TINY_SIZES if run.tiny else SIZES:
        losses: dict[Layout, float] = {}
        for layout, words in LAYOUTS.items():
            case = prompt_case(model, prompt, completion, layout)
            one = one or PromptStep(case, PowerflowFast(), run.device)
            name = f"{case.id}, computed {words}"
            run.case(name, partial(_measure, run, one, case, losses))


def prompt_case(model: StepCase, prompt: int, completion: int, layout: Layout) -> PromptCase:
    sizes = dict(sequences=GROUP, length=prompt + completion)
    return PromptCase(**vars(replace(model, **sizes)), prompt=prompt, layout=layout)


def _measure(run: Run, one: PromptStep, case: PromptCase, losses: dict[Layout, float]) -> Line:
    one.use(case)
    losses[case.layout] = one().item()
    first, rounding = losses["padded"], torch.finfo(case.dtype).eps
    if abs(losses[case.layout] - first) > 16 * rounding * abs(first):
        raise ArithmeticError(f"loss {losses[case.layout]:.6g}, with a row each {first:.6g}")
    on_gpu = run.device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timed = method.quartiles(method.repeat(one, run.device, run.budget(SECONDS)))
    scored = case.sequences * (case.length - case.prompt)
    return timed | {
        "model": case.id,
        "layout": case.layout,
        "completion_tokens_per_second": scored / timed["seconds"],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "first_loss": losses[case.layout],
    }
