"""What the commands share: user errors, options, models and tokenizers, folders of runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import tempfile
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from powerflow_fast import needs
from powerflow_fast.data.errors import did_you_mean
from powerflow_fast.models.smollm2 import HUB_NAME
from powerflow_fast.models.smollm2 import NAME as SMOLLM2

if TYPE_CHECKING:
    from powerflow_fast.evaluation.record import RunRecord

SPINS = 10_000  # of a thread that waits: about a tenth of a millisecond


class UsageError(Exception):
    """An error that the user can put right; its message is printed without a traceback."""


def usable_cores() -> int:
    """CPU cores that this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Errors in one line, the nearest name for a wrong option, and - or _ within options."""

    commands: Any = None  # the subparsers, of the parser that has them

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args([_hyphens(word) for word in args], namespace)
        if unknown:
            parser = self.commands.choices[found.command] if self.commands else self
            self.error(unknown_option(unknown[0], parser))
        return found


def _hyphens(word: str) -> str:
    """--max_new_tokens=4 becomes --max-new-tokens=4; values are left alone."""
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value


def unknown_option(word: str, parser: argparse.ArgumentParser) -> str:
    """The error for a word that `parser` does not know, with the nearest of its options."""
    if not word.startswith("-"):
        return f"{word!r}: expected an option, which begins with --"
    name = word.partition("=")[0]
    known = [known for action in parser._actions for known in action.option_strings]
    hint = did_you_mean(_hyphens(name), known, cutoff=0.7)
    return f"{name}: no such option{hint}"


def fields_given(args: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The options in `args` that are fields of the dataclass `settings`."""
    known = {field.name for field in fields(settings)}
    return {name: value for name, value in vars(args).items() if name in known}


def quiet() -> None:
    """Hide warnings of libraries that the user of a command can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
    for message in (
        ".*pin_memory.*",  # on a machine without an accelerator
        # PEFT asks the Hub about a base that is in memory.
        "Could not find a config file in.*",
        ".*Unable to fetch remote file.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    # On a CPU, bitsandbytes asks the Hub for a kernel when it is imported, and logs that it could
    # not be had; its fallback works.
    for name in ("kernels", "bitsandbytes.backends"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def let_threads_sleep() -> None:
    """Have threads that wait for each other soon sleep, unless the environment says how they wait.

    By default GNU's OpenMP, the one in torch's wheels for Linux, has them spin 300,000 times. That
    is milliseconds, and takes the cores from the threads they wait for wherever other programs run
    too. To sleep at once makes sampling a third slower: a token is a thousand short waits. To be
    called before torch is imported, whose OpenMP reads the variables.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def offline_without_hub() -> None:
    """Set HF_HUB_OFFLINE where the Hub cannot be reached: its cache is used at once, no retries.

    To be called before huggingface_hub is imported, which reads the variable only then.
    """
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if proxied or "HF_HUB_OFFLINE" in os.environ:
        return
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=2).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def load_tokenizer(name: str):
    """The tokenizer of a folder, a Hub name, or 'smollm2'; it pads on the left."""
    if name == SMOLLM2:
        from powerflow_fast.models.smollm2 import load_smollm2_tokenizer

        return load_smollm2_tokenizer()
    _check_folder(name)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_of(given: Any) -> bool | None:
    """True for --chat, False for --raw; None: the tokenizer decides."""
    return True if given.chat else False if given.raw else None


def load_model(name: str, tokenizer, keywords: dict[str, Any] | None = None):
    """The model of a folder, a Hub name, or 'smollm2'; in its own type on a GPU, else float32.

    Args:
        name: of the model.
        tokenizer: the model's own, from `load_tokenizer`.
        keywords: further ones of `from_pretrained`.
    """
    keywords = dict(keywords or {})
    if name == SMOLLM2:
        from powerflow_fast.models.smollm2 import load_smollm2_model

        if "quantization_config" in keywords:
            raise UsageError(
                "--quantize: not with smollm2, whose packed weights are unpacked to float32"
            )
        keywords.pop("dtype", None)  # it is float32
        return load_smollm2_model(tokenizer, **keywords)
    _check_folder(name)
    import torch
    from transformers import AutoModelForCausalLM

    dtype = "auto" if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": dtype, **keywords})


def _check_folder(name: str) -> None:
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or folder.exists()):
        raise UsageError(f"--model {name}: no such folder")


def run_of(folder: str | None) -> RunRecord | None:
    """The record of the run that wrote `folder`, or of the run whose checkpoint `folder` is."""
    if folder is None or not Path(folder).is_dir():
        return None
    from powerflow_fast.evaluation.record import RunRecord

    return RunRecord.load(folder) or RunRecord.load(Path(folder).absolute().parent)


def base_of(adapter: str | None, run: RunRecord | None) -> str:
    """The base of an adapter's folder, whose record is `run`; without one the packaged model."""
    if adapter is None:
        return SMOLLM2
    path = Path(adapter) / "adapter_config.json"
    if not path.is_file():
        raise UsageError(f"--adapter {adapter}: no adapter_config.json there")
    named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    name = (run.model if run else None) or named
    if not name:
        raise UsageError(f"--model: {path} names no base; give its folder or name")
    return SMOLLM2 if name == HUB_NAME else name


def check_output(folder: str, overwrite: bool) -> None:
    """UsageError where a run cannot be written to `folder`, or would overwrite another one."""
    path = Path(folder)
    existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    try:
        if existing.is_dir():
            with tempfile.TemporaryFile(dir=existing):
                pass
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written ({error.strerror})") from error
    if path.exists() and not path.is_dir():
        raise UsageError(f"{folder}: exists and is not a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UsageError(f"{folder}: holds another run; name another folder, or pass --overwrite")


def user_input(step: Callable, *arguments: Any):
    """`step(*arguments)`, which only reads the user's input; its errors become UsageErrors."""
    try:
        return step(*arguments)
    except ImportError as error:
        raise UsageError(needs(error)) from error
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def say(*lines: str) -> None:
    """Print on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)
