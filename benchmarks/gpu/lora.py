"""Stage `lora`: whole steps with LoRA, measured memory beside what `powerflow-fast plan` counts."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from benchmarks import llama_70b_step, method, training_step
from benchmarks.gpu.lines import Line
from benchmarks.gpu.worker import Run
from benchmarks.peers import PowerflowFast, Unavailable, require
from powerflow_fast.planning import memory

SECONDS = 2.0  # of rounds
TINY_70B = ["--scale", "20000", "--tokens", "16", "--steps", "1"]
FULL_70B = ["--tokens", "8192", "--steps", "2"]


def step(run: Run) -> Iterator[None]:
    """The part's model; one that does not fit keeps the layers that do."""
    import peft  # noqa: F401  (takes seconds)
    import transformers.models.llama.modeling_llama  # noqa: F401

    yield
    case = of_part(run)
    run.case(case.id, lambda: _measure(case, run.device, run.budget(SECONDS)))


def of_part(run: Run) -> training_step.StepCase:
    """The model that the part is named for, in the layers that fit; Unavailable where none does."""
    free = method.free_bytes(run.device)
    found = {case.name: case for case in training_step.cases(run.device, free, tiny=run.tiny)}
    if run.tiny:
        return next(iter(found.values()))
    if run.part not in found:
        raise Unavailable(f"no layer of the {run.part} shape fits into {free / 1e9:.3g} GB")
    return found[run.part]


def planned_bytes(case: training_step.StepCase) -> float:
    """Of the step alone: nothing is sampled."""
    width = {torch.bfloat16: "bf16", torch.float32: "fp32"}[case.dtype]
    setup = memory.Run(
        case.shape,
        weights=width,
        lora_rank=training_step.RANK,
        tokens=case.length,
        completions=1,
    )
    return memory.plan(setup, case.sequences).total


def _measure(case: training_step.StepCase, device: torch.device, budget: float) -> Line:
    one = training_step.TrainingStep(case, PowerflowFast(backend="triton"), device)
    one()
    on_gpu = device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    timed = method.quartiles(method.repeat(one, device, budget))
    return timed | {
        "model": case.id,
        "tokens": case.tokens,
        "tokens_per_second": case.tokens / timed["seconds"],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "planned_bytes": planned_bytes(case),
    }


def step_70b(run: Run) -> Iterator[None]:
    """All 80 layers in NF4 through `PowerFlowTrainer`, a line when the model stands and a step."""
    for package in ("trl", "peft", "bitsandbytes", "datasets"):
        require(package)
    output = ["--output-dir", str(run.folder / "llama-70b-step")]
    sizes = [*TINY_70B, "--device", run.device.type] if run.tiny else FULL_70B
    options = llama_70b_step.arguments([*sizes, *output])
    import powerflow_fast.training.trainer  # noqa: F401  (takes seconds)

    yield

    def report(row: Line) -> None:
        what = f"step {row['step']}" if "step" in row else "built"
        where = {"stage": run.stage, "part": run.part}
        run.write({**where, "case": f"{what}, {options.tokens} tokens a sequence", **row})

    needs = 60e9 if not run.tiny else 0  # the layers in NF4 with room for one step

    def train() -> Line:
        llama_70b_step.run(options, report)
        return {}

    run.case("70B, NF4", train, needs)
