"""What the commands share: errors of the user, options, loading a model, the output folder."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import socket
import tempfile
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from powerflow_fast import needs
from powerflow_fast.models.smollm2 import NAME as SMOLLM2


class UsageError(Exception):
    """What the user can put right; its message is printed without a traceback."""


def usable_cores() -> int:
    """That this process may use; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    """Errors in one line, the nearest name for a wrong one, and both spellings of options."""

    commands: Any = None  # the subparsers, of the parser that has them

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args([_hyphens(word) for word in args], namespace)
        if unknown:
            parser = self.commands.choices[found.command] if self.commands else self
            known = [name for action in parser._actions for name in action.option_strings]
            self.error(unknown_option(unknown[0], known))
        return found


def _hyphens(word: str) -> str:
    """--max_new_tokens=4 as --max-new-tokens=4; a value stays as it is."""
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    return name.replace("_", "-") + sign + value


def unknown_option(word: str, known: Iterable[str]) -> str:
    """An error for an option that there is not, with the nearest that there is."""
    if not word.startswith("-"):
        return f"{word!r}: expected an option, which begins with --"
    name = word.partition("=")[0]
    names = {_hyphens(other): other for other in known}
    near = difflib.get_close_matches(_hyphens(name), names, 1, 0.7)
    return f"{name}: no such option" + (f"; did you mean {names[near[0]]}?" if near else "")


def quiet() -> None:
    """Nothing in a command's output that its user cannot act on: of libraries about others."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
    for message in (
        ".*pin_memory.*",  # on a machine without an accelerator
        "Could not find a config file in.*",  # of PEFT, which asks the Hub about a base in memory
        ".*Unable to fetch remote file.*",  # likewise
    ):
        warnings.filterwarnings("ignore", message=message)
    # bitsandbytes asks for a kernel of the Hub when it is imported, on a CPU, and logs that it
    # could not be had; what it falls back to works.
    for name in ("kernels", "bitsandbytes.backends"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def offline_without_hub() -> None:
    """Where the Hub cannot be reached, its cache alone is asked, at once and not after retries.

    To be called before anything imports huggingface_hub, which reads the variable then.
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
    """Of a folder, a Hub name, or 'smollm2'; pads on the left."""
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
    """--chat or --raw; None: as the tokenizer is."""
    return True if given.chat else False if given.raw else None


def load_model(name: str, tokenizer, keywords: dict[str, Any] | None = None):
    """The model of a folder, a Hub name, or 'smollm2'; float32 unless a GPU is there.

    `tokenizer` is the model's own, of `load_tokenizer`.
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


def check_output(folder: str, overwrite: bool) -> None:
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
    """Run a step that only reads what the user gave: its errors are the user's to put right."""
    try:
        return step(*arguments)
    except ImportError as error:
        raise UsageError(needs(error)) from error
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error.__cause__ or error).__name__


def say(*lines: str) -> None:
    """Print, on one of several ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(*lines, sep="\n", flush=True)
