"""What the commands share: errors of the user, loading a model, the output folder."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class UsageError(Exception):
    """What the user can put right; its message is printed without a traceback."""


def usable_cores() -> int:
    """That this process may use; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def load_model(name: str, keywords: dict[str, Any] | None = None):
    """(model, tokenizer) of a folder, a Hub name, or 'smollm2'; float32 unless a GPU is there."""
    if name == "smollm2":
        from powerflow_fast.smollm2 import load_smollm2

        return load_smollm2()
    folder = Path(name)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or folder.exists()):
        raise UsageError(f"--model {name}: no such folder")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = "auto" if torch.cuda.is_available() else torch.float32
    keywords = {"dtype": dtype, **(keywords or {})}
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name, **keywords), tokenizer


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
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error.__cause__ or error).__name__
