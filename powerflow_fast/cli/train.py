"""The command `powerflow-fast train`: flags and YAML to a trainer, everything checked first."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powerflow_fast.cli.common import Parser, UsageError, check_output, load_model, user_input


@dataclass
class TrainArguments:
    """Options of `train` beside those of PowerFlowConfig."""

    model: str | None = field(
        default=None, metadata={"help": "Model folder or name; 'smollm2' is the packaged one."}
    )
    data: str | None = field(default=None, metadata={"help": "Prompt file, .txt or .jsonl."})
    chat: bool = field(
        default=False, metadata={"help": "Give text prompts to the chat template as user messages."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of LoRA; 0 trains all parameters."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale, divided by the rank."})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "Modules for LoRA, separated by commas."}
    )
    dora: bool = field(default=False, metadata={"help": "DoRA instead of LoRA."})
    quantize: str = field(
        default="none",
        metadata={
            "help": "Hold the base in 4 bits (QLoRA; bitsandbytes).",
            "choices": ["none", "nf4"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "flash_attention_2 (if installed), sdpa, ..."}
    )
    adapter_server: str | None = field(
        default=None,
        metadata={
            "help": "URL of a vLLM server that is sent the adapter alone; not with use_vllm."
        },
    )
    boxed_penalty: float = field(
        default=0.0, metadata={"help": r"psi of completions without \boxed{}, e.g. -0.5; 0 is off."}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Write into an output folder that holds another run."}
    )


def train(argv: list[str]) -> int:
    trainer = user_input(_prepare_training, argv)
    from powerflow_fast.checkpoint import CheckpointError
    from powerflow_fast.health import TrainingStopped

    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except (CheckpointError, TrainingStopped) as error:
        print(f"powerflow-fast: stopped: {error}", file=sys.stderr)
        return 1
    trainer.save_model(trainer.args.output_dir)
    print(f"Saved to {trainer.args.output_dir}")
    return 0


def _prepare_training(argv: list[str]):
    """The trainer that flags and YAML file describe; every check of input happens here."""
    # transformers' notes about TRL's own use of it would stand before the one line of an error.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    argv = [part for word in argv for part in _split_config(word)]
    _check_config_file(argv)
    from datasets import Dataset
    from peft import LoraConfig
    from trl import TrlParser

    from powerflow_fast import PowerFlowConfig, PowerFlowTrainer
    from powerflow_fast.data_checks import check_lengths
    from powerflow_fast.prompts import read_prompts
    from powerflow_fast.rewards import missing_boxed

    class TrainParser(TrlParser):
        error = Parser.error

    types: Any = (TrainArguments, PowerFlowConfig)
    parser = TrainParser(types, prog="powerflow-fast train")
    options, config = parser.parse_args_and_config(argv)
    if not options.model or not options.data:
        raise UsageError("train needs --model and --data (or both in the --config file)")
    for name, low in (("lora_rank", 0), ("lora_alpha", 1)):
        if getattr(options, name) < low:
            got = getattr(options, name)
            raise UsageError(f"--{name}: expected a whole number >= {low}, got {got}")
    records = read_prompts(options.data, options.chat)
    check_output(config.output_dir, options.overwrite or config.resume_from_checkpoint)
    if config.resume_from_checkpoint:
        _check_checkpoint(options.model, config)
    data = Dataset.from_list([{"prompt": r["prompt"]} for r in records])
    if Path(options.model).is_dir():  # else the trainer checks, once the model is there
        check_lengths({"train_dataset": data}, options.model, None, config)
    rollout = _adapter_rollout(options, config)
    model, tokenizer = load_model(options.model, _loading(options))
    lora = None
    if options.lora_rank > 0:
        targets = options.lora_targets.split(",")
        if config.learning_rate == PowerFlowConfig.learning_rate:
            note = f"learning_rate is {config.learning_rate:g}, meant for training all parameters"
            print(f"note: {note}; LoRA usually takes 1e-4 to 3e-4", file=sys.stderr)
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            use_dora=options.dora,
        )
    return PowerFlowTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        psi_funcs=missing_boxed(options.boxed_penalty) if options.boxed_penalty else None,
        rollout_func=rollout,
    )


def _loading(options: TrainArguments) -> dict[str, Any]:
    """Keywords of from_pretrained: attention, type, and 4-bit weights for QLoRA."""
    import torch

    keywords: dict[str, Any] = {}
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    attention = options.attn_implementation or ("flash_attention_2" if flash else None)
    if attention:
        keywords["attn_implementation"] = attention
    if options.lora_rank < 1:  # bf16 weights would round updates of a usual learning rate away
        keywords["dtype"] = torch.float32
    if options.quantize == "none":
        return keywords
    if options.lora_rank < 1:
        raise UsageError("--quantize nf4: 4-bit weights do not train; give a --lora_rank")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--quantize nf4 needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    keywords["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    return keywords


def _adapter_rollout(options: TrainArguments, config):
    """The rollout function for --adapter_server, or None: TRL samples."""
    if not options.adapter_server:
        return None
    if options.lora_rank < 1 or config.use_vllm:
        raise UsageError("--adapter_server: expected LoRA (--lora_rank), and use_vllm off")
    from powerflow_fast.adapter_rollout import AdapterRollout

    return AdapterRollout(options.adapter_server, str(Path(config.output_dir, "adapters")))


def _check_checkpoint(model: str, config) -> None:
    """The checkpoint to go on from exists and fits the model, as far as its configuration says."""
    from powerflow_fast.checkpoint import check_made_for, config_facts, last_checkpoint

    name = config.resume_from_checkpoint
    checkpoint = last_checkpoint(config.output_dir) if name == "last" else name
    if checkpoint and not Path(checkpoint).is_dir():
        raise UsageError(f"--resume_from_checkpoint {checkpoint}: no such folder (or 'last')")
    if checkpoint and model != "smollm2":
        from transformers import AutoConfig

        check_made_for(checkpoint, config_facts(AutoConfig.from_pretrained(model)))


def _split_config(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _check_config_file(argv: list[str]) -> None:
    """TRL's parser opens and reads the YAML file; say first, in one line, why it could not."""
    if "--config" not in argv:
        return
    rest = argv[argv.index("--config") + 1 :]
    if not rest or not Path(rest[0]).is_file():
        raise UsageError(f"--config {rest[0] if rest else ''}: no such file")
    import yaml

    try:
        yaml.safe_load(Path(rest[0]).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{rest[0]}: {where}not YAML") from error
