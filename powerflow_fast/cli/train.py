"""The command `powerflow-fast train`: flags and YAML to a trainer, everything checked first."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerflow_fast.cli.common import (
    SMOLLM2,
    Parser,
    UsageError,
    chat_of,
    check_output,
    load_model,
    load_tokenizer,
    say,
    unknown_option,
    user_input,
)

if TYPE_CHECKING:
    from powerflow_fast.data.prompts import Prompt, Question
    from powerflow_fast.evaluation.scores import Sampling
    from powerflow_fast.training.config import PowerFlowConfig


def _option(default: Any, text: str, *choices: str) -> Any:
    """A dataclass field with a help text and, where only some values are allowed, those."""
    metadata = {"help": text} | ({"choices": list(choices)} if choices else {})
    return field(default=default, metadata=metadata)


@dataclass
class TrainArguments:
    """Options of `train` beside those of PowerFlowConfig."""

    model: str = _option("", "Model folder or name; 'smollm2' is the packaged one.")
    data: str = _option(
        "", "Prompts: .txt, .jsonl, .json, .csv, .parquet, or a data set of the Hub (NAME:CONFIG)."
    )
    data_split: str | None = _option(None, "Split of the data set; rows of a file with this split.")
    prompt_column: str | None = _option(
        None, "Column of the prompts. Default: prompt, question, ..."
    )
    drop_long: bool = _option(
        False, "Leave out prompts that do not fit the model's context beside a completion."
    )
    questions: str | None = _option(
        None, "Questions to measure before and after, with or without answers; a file as --data."
    )
    chat: bool = _option(
        False, "Insist on the chat format. Default: where the tokenizer has a chat template."
    )
    raw: bool = _option(False, "Text prompts as they are, whatever chat template there is.")
    lora_rank: int = _option(16, "Rank of LoRA; 0 trains all parameters.")
    lora_alpha: int = _option(32, "LoRA's scale, divided by the rank.")
    lora_targets: str = _option("all-linear", "Modules for LoRA, separated by commas.")
    dora: bool = _option(False, "DoRA instead of LoRA.")
    quantize: str = _option("none", "Hold the base in 4 bits (QLoRA; bitsandbytes).", "none", "nf4")
    attn_implementation: str | None = _option(None, "flash_attention_2 (if installed), sdpa, ...")
    adapter_server: str | None = _option(
        None, "URL of a vLLM server that is sent the adapter alone; not with use_vllm."
    )
    adapter_server_timeout: float = _option(
        3600.0, "Seconds that a rollout of this server may take."
    )
    adapter_server_wait: float = _option(
        240.0, "Seconds to wait for this server where it is still starting."
    )
    adapter_server_key: str | None = _option(
        None, "Key of this server. Default: the variable VLLM_API_KEY."
    )
    boxed_penalty: float = _option(0.0, r"psi of completions without \boxed{}, e.g. -0.5; 0: off.")
    overwrite: bool = _option(False, "Write into an output folder that holds another run.")


@dataclass
class Prepared:
    """A trainer that is ready to train, and how to measure it."""

    trainer: Any
    questions: list[Question]  # empty: nothing is measured
    sampling: Sampling


def train(argv: list[str]) -> int:
    """Run `train` with its options `argv`; returns the exit code."""
    argv = [part for word in argv for part in _split_config(word)]
    asked = {word.replace("_", "-") for word in argv}
    if asked & {"-h", "--help", "--help-all"}:
        from powerflow_fast.cli.train_help import train_help

        print(train_help(TrainArguments, everything="--help-all" in asked))
        return 0
    prepared = user_input(_prepare_training, argv)
    if prepared is None:  # it is finished
        return 0
    from powerflow_fast.evaluation import comparison
    from powerflow_fast.evaluation.curves import save as save_curves
    from powerflow_fast.evaluation.measured_run import train_and_measure
    from powerflow_fast.training.checkpoint import CheckpointError
    from powerflow_fast.training.health import TrainingStopped

    trainer, config = prepared.trainer, prepared.trainer.args
    compared = None
    try:
        resume = config.resume_from_checkpoint
        if prepared.questions:
            compared = train_and_measure(trainer, prepared.questions, prepared.sampling, resume)
        else:
            trainer.train(resume_from_checkpoint=resume)
    except (CheckpointError, TrainingStopped) as error:
        if config.draw_curves and trainer.is_world_process_zero():
            save_curves(trainer.state.log_history, config.output_dir, trainer.record)
        print(f"powerflow-fast: stopped: {error}", file=sys.stderr)
        return 1
    trainer.save_model(config.output_dir)
    if compared is not None:
        say("", comparison.as_text(compared), "")
    _say_what_next(config.output_dir, trainer.record)
    return 0


def _say_what_next(folder: str, record) -> None:
    files = [name for name in ("curves.png", "samples.txt") if Path(folder, name).is_file()]
    what = "the adapter" if record.adapter else "the model"
    say(f"Saved to {folder}: {', '.join([what, 'its card (README.md)', *files])}", "Next:")
    given = f"--adapter {folder}" if record.adapter else f"--model {folder}"
    say(f"  powerflow-fast eval {given} --data questions.jsonl")
    if record.adapter:
        say(f"  powerflow-fast merge --adapter {folder} --output {folder}-merged")


def _parse(argv: list[str]) -> tuple[TrainArguments, PowerFlowConfig]:
    """The options from flags and YAML file; an error for an unknown one names the nearest."""
    _check_config_file(argv)
    from trl import TrlParser

    from powerflow_fast import PowerFlowConfig

    class TrainParser(TrlParser):
        error = Parser.error

    types: Any = (TrainArguments, PowerFlowConfig)
    parser = TrainParser(types, prog="powerflow-fast train")
    *found, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        raise UsageError(unknown_option(unknown[0], parser))
    options, config = found
    if not options.model or not options.data:
        raise UsageError("train needs --model and --data (or both in the --config file)")
    if options.chat and options.raw:
        raise UsageError("--chat, --raw: expected one of the two")
    for name, low in (("lora_rank", 0), ("lora_alpha", 1)):
        if (got := getattr(options, name)) < low:
            raise UsageError(f"--{name}: expected a whole number >= {low}, got {got}")
    if str(config.resume_from_checkpoint).lower() == "true":
        config.resume_from_checkpoint = "last"
    return options, config


def _prepare_training(argv: list[str]) -> Prepared | None:
    """The trainer that the options describe, with all input checked; None for a finished run."""
    options, config = _parse(argv)
    from datasets import Dataset

    from powerflow_fast import PowerFlowTrainer
    from powerflow_fast.data.prompts import in_chat, read_prompts
    from powerflow_fast.evaluation.scores import Sampling
    from powerflow_fast.rewards import missing_boxed
    from powerflow_fast.training.checks import TEXT, check_arguments
    from powerflow_fast.training.data_checks import check_enough, check_lengths

    check_arguments(config)
    prompts = read_prompts(options.data, options.data_split, options.prompt_column)
    of_this_run = config.process_index > 0  # the first rank may have begun to write there
    check_output(
        config.output_dir,
        options.overwrite or bool(config.resume_from_checkpoint) or of_this_run,
    )
    checkpoint = _checkpoint(options.model, config)
    if checkpoint and _is_finished(checkpoint, config):
        return None
    rollout = _adapter_rollout(options, config)
    loading = _loading(options)
    tokenizer = load_tokenizer(options.model)
    chat = chat_of(options)
    prompts = in_chat(prompts, tokenizer, chat)
    warnings.filterwarnings("ignore", message=TEXT)  # --raw has said so
    if options.drop_long:
        prompts = _that_fit(prompts, options.model, tokenizer, config)
    questions = _questions(options, config, tokenizer, chat)
    data = Dataset.from_dict({"prompt": prompts})
    check_enough(data, config)
    if Path(options.model).is_dir():  # else the trainer checks, once the model is loaded
        check_lengths({"train_dataset": data}, options.model, tokenizer, config)
    trainer = PowerFlowTrainer(
        model=load_model(options.model, tokenizer, loading),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=_lora(options),
        psi_funcs=missing_boxed(options.boxed_penalty) if options.boxed_penalty else None,
        rollout_func=rollout,
    )
    trainer.record.model, trainer.record.quantize = options.model, options.quantize
    _say_what_is_trained(options, trainer, chat)
    size = config.per_device_eval_batch_size or config.per_device_train_batch_size
    sampling = Sampling(
        samples=4,
        max_new_tokens=config.max_completion_length,
        batch_size=max(size, 8),
        seed=config.seed,
        temperature=config.temperature,
    )
    return Prepared(trainer, questions, sampling)


def _that_fit(prompts: list[Prompt], model: str, tokenizer, config) -> list[Prompt]:
    """The prompts that leave room for a completion; says how many do not."""
    from transformers import AutoConfig

    from powerflow_fast.data.prompts import prompt_ids
    from powerflow_fast.models.context import Context

    if model == SMOLLM2:
        raise UsageError("--drop_long: not with smollm2, whose configuration is not read")
    limit = Context(AutoConfig.from_pretrained(model), config.vllm_max_model_length).limit
    if limit is None:
        return prompts
    room = limit - config.max_completion_length
    lengths = map(len, prompt_ids(tokenizer, prompts))
    short = [p for p, length in zip(prompts, lengths, strict=True) if length <= room]
    if len(short) < len(prompts):
        say(f"{len(prompts) - len(short)} of {len(prompts)} prompts left out: over {room} tokens")
    if not short:
        raise UsageError(f"--drop_long: no prompt has at most {room} tokens")
    return short


def _say_what_is_trained(options: TrainArguments, trainer, chat: bool | None) -> None:
    record = trainer.record
    form = "messages of the chat template" if record.chat else "plain text"
    hint = " (--raw: as plain text)" if record.chat and chat is None else ""
    what = f"LoRA of rank {options.lora_rank}" if record.adapter else "all parameters"
    say(
        f"{options.model}: {what}, learning rate {trainer.args.learning_rate:g}, "
        f"alpha {record.alpha:g}",
        f"{record.prompts} prompts from {options.data}, as {form}{hint}; {record.num_generations} "
        f"completions each of at most {record.max_completion_length} tokens",
    )


def _questions(options: TrainArguments, config, tokenizer, chat: bool | None) -> list[Question]:
    """The questions of --questions, in the format of the prompts."""
    if options.questions is None:
        return []
    if config.world_size > 1:
        raise UsageError(
            f"--questions: expected one process, got {config.world_size}; measure afterwards with "
            "powerflow-fast eval"
        )
    from powerflow_fast.data.prompts import in_chat_all, read_questions

    return in_chat_all(read_questions(options.questions), tokenizer, chat)


def _lora(options: TrainArguments):
    from peft import LoraConfig

    if options.lora_rank < 1:
        return None
    targets = options.lora_targets
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        use_dora=options.dora,
    )


def _loading(options: TrainArguments) -> dict[str, Any]:
    """Keywords of `from_pretrained`: attention, type, and 4-bit weights for QLoRA."""
    import torch

    keywords: dict[str, Any] = {}
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    attention = options.attn_implementation or ("flash_attention_2" if flash else None)
    if attention:
        keywords["attn_implementation"] = attention
    if options.lora_rank < 1:  # bf16 weights would round away updates of a usual learning rate
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
    """The rollout function for --adapter_server, which has been checked; without it None, and TRL
    samples."""
    from powerflow_fast.training.ahead import check_ahead

    if not options.adapter_server:
        check_ahead(config, None)
        return None
    if options.lora_rank < 1 or config.use_vllm or options.dora:
        raise UsageError(
            "--adapter_server: expected LoRA (--lora_rank, no --dora), and use_vllm off"
        )
    for name in ("adapter_server_timeout", "adapter_server_wait"):
        if (got := getattr(options, name)) <= 0:
            raise UsageError(f"--{name}: expected seconds > 0, got {got:g}")
    from powerflow_fast.training.vllm_adapter import AdapterRollout

    rollout = AdapterRollout(
        options.adapter_server,
        str(Path(config.output_dir, "adapters")),
        options.adapter_server_timeout,
        server_timeout=options.adapter_server_wait,
        api_key=options.adapter_server_key,
    )
    rollout.fit(config, options.lora_rank)
    return rollout


def _checkpoint(model: str, config) -> str | None:
    """The checkpoint to go on from, if any, which fits the model as far as its config tells."""
    from powerflow_fast.training.checkpoint import check_made_for, config_facts, last_checkpoint

    checkpoint = config.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = last_checkpoint(config.output_dir)
    if not checkpoint:
        return None
    if not Path(checkpoint).is_dir():
        raise UsageError(f"--resume_from_checkpoint {checkpoint}: no such folder (or 'last')")
    if model != SMOLLM2:
        from transformers import AutoConfig

        check_made_for(checkpoint, config_facts(AutoConfig.from_pretrained(model)))
    return checkpoint


def _is_finished(checkpoint: str, config) -> bool:
    """Whether `checkpoint` is the run's last; says so."""
    state = Path(checkpoint, "trainer_state.json")
    if not state.is_file():
        return False
    saved = json.loads(state.read_text(encoding="utf-8"))
    step, epochs = saved["global_step"], saved.get("num_train_epochs", 0)
    last = config.max_steps if config.max_steps > 0 else saved["max_steps"]
    longer = config.max_steps <= 0 and config.num_train_epochs > epochs
    if step < last or longer:
        return False
    say(f"Already finished: {checkpoint} is step {step} of {last}. To go on, raise max_steps")
    return True


def _split_config(word: str) -> list[str]:
    """--config=FILE as two words, which is how TRL's parser looks for it."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _check_config_file(argv: list[str]) -> None:
    """UsageError where TRL's parser could not read the YAML file of --config."""
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
