"""The help of `train`: our options first, all of TRL's on request."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

# TRL's and transformers' that a first run needs.
COMMON = (
    "output_dir max_steps num_train_epochs num_generations per_device_train_batch_size "
    "gradient_accumulation_steps max_completion_length temperature learning_rate "
    "gradient_checkpointing bf16 save_strategy save_steps resume_from_checkpoint seed report_to "
    "run_name log_completions use_vllm vllm_mode"
).split()
WIDTH = 100


def train_help(arguments: type, everything: bool = False) -> str:
    """The text; `arguments` is the dataclass of `train`'s own options."""
    from powerflow_fast import PowerFlowConfig

    every = {f.name: f for f in fields(PowerFlowConfig)}
    own = [every[name] for name in PowerFlowConfig.__annotations__ if name not in COMMON]
    common = [every[name] for name in COMMON]
    shown = {f.name for f in (*own, *common)}
    rest = [f for name, f in every.items() if name not in shown]
    parts = [
        "usage: powerflow-fast train --model MODEL --data FILE [options], or --config FILE.yaml\n",
        "Train a model to sample from the alpha-power of itself, without labels. Options may be\n"
        "written with - or _, and stand in the YAML file with _; a flag wins over the file.",
        _section("model, data, adapter", fields(arguments)),
        _section("objective and watch", own),
        _section("run (TRL and transformers)", common),
    ]
    if everything:
        parts.append(_section("everything else of TRL and transformers", rest))
    else:
        parts.append(f"\n{len(rest)} more options of TRL and transformers: --help-all")
    return "\n".join(parts)


def _section(title: str, options: Iterable[Field]) -> str:
    lines = [f"\n{title}:"]
    for option in options:
        text = " ".join(str(option.metadata.get("help", "")).split()).replace("%%", "%")
        default = _default(option)
        if default not in (None, "", []):
            text += f" [{default}]"
        head = f"  --{option.name}"
        body = textwrap.wrap(text, WIDTH - 34) or [""]
        if len(head) > 32:
            lines.append(head)
            head = ""
        lines.append(f"{head:<33} {body[0]}".rstrip())
        lines += [" " * 34 + line for line in body[1:]]
    return "\n".join(lines)


def _default(option: Field) -> Any:
    if option.default is not MISSING:
        return option.default
    return option.default_factory() if option.default_factory is not MISSING else None
