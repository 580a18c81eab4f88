"""The stages, most valuable first: what runs, and how many seconds each may take.

The limits are for one Hopper GPU, where all of it takes about six minutes.
"""

from __future__ import annotations

from benchmarks.gpu import steps
from benchmarks.gpu.runner import Part, Stage

HERE = "benchmarks.gpu."


def _parts(function: str, names: tuple[str, ...], seconds: dict[str, float]) -> tuple[Part, ...]:
    default = seconds["default"]
    return tuple(Part(name, HERE + function, seconds.get(name, default)) for name in names)


STAGES = (
    Stage(
        "ceilings",
        "bare products and a copy",
        _parts("ceilings:ceilings", ("vendor",), {"default": 8}),
        prepare_seconds=4,
    ),
    Stage(
        "correct",
        "every kernel against float64; graphs, streams, synchronisation, memory; kernel tests",
        (
            Part("kernels", HERE + "correct:kernels", 20),
            Part("cuda", HERE + "correct:on_cuda", 15),
            Part("tests", HERE + "correct:kernel_tests", 120),
        ),
        prepare_seconds=4,
    ),
    Stage(
        "heads",
        "pair and LA-TB step, frozen head",
        _parts("steps:frozen", steps.FROZEN, {"default": 10} | steps.COMPILES_BY_SHAPE),
        prepare_seconds=40,
        early=True,
    ),
    Stage(
        "trained-head",
        "LA-TB step, trained head",
        _parts("steps:trained", steps.TRAINED, {"default": 10} | steps.COMPILES_BY_SHAPE),
        prepare_seconds=20,
        early=True,
    ),
    Stage(
        "kernels",
        "each kernel alone, beside the vendor's product",
        _parts("kernel_times:kernels", ("ours",), {"default": 30}),
        prepare_seconds=3,
    ),
    Stage(
        "lora",
        "whole steps with LoRA, memory beside the plan",
        (
            Part("Llama-3.2-1B", HERE + "lora:step", 8),
            Part("Llama-3-8B", HERE + "lora:step", 10),
            Part("Llama-3-70B", HERE + "lora:step", 15),
            Part("Llama-3-70B in NF4", HERE + "lora:step_70b", 110),
        ),
        prepare_seconds=20,
        early=True,
    ),
    Stage(
        "prompts",
        "whole steps, a prompt computed once or for each completion",
        (
            Part("Llama-3.2-1B", HERE + "prompts:step", 12),
            Part("Llama-3-8B", HERE + "prompts:step", 25),
        ),
        prepare_seconds=8,
        early=True,
    ),
    Stage(
        "whole-step",
        "optimizer steps with sampling, beside TRL's trainer",
        (
            Part("Qwen2.5-1.5B", HERE + "whole_step:step", 35),
            Part("Llama-3-8B", HERE + "whole_step:step", 50),
        ),
        prepare_seconds=15,
        early=True,
    ),
    Stage(
        "tuner",
        "candidate tiles, timed",
        _parts("tuner:tuner", ("ours",), {"default": 25}),
        prepare_seconds=3,
    ),
    Stage(
        "counters",
        "what the chip was busy with (Nsight Compute)",
        _parts("tools:counters", ("ncu",), {"default": 30}),
        prepare_seconds=2,
    ),
    Stage(
        "sanitizer",
        "memcheck and racecheck of small steps",
        _parts("tools:sanitizer", ("memcheck", "racecheck"), {"default": 1}),
        prepare_seconds=30,
    ),
)
