"""Prompts and questions from files and data sets, and their one way into token ids.

What is read, by `datasets`:

* `.txt`: one prompt a line; blank lines are skipped.
* `.jsonl`, `.json`, `.csv`, `.parquet` with a column `prompt`, `question` or `messages`: text, or a
  list of messages `{"role", "content"}`. Of `messages` the prompt is what stands before the last
  answer. A column `answers` or `answer` (a text, or a list of accepted ones) is what `eval`
  measures with; no answer ever reaches a trainer.
* a folder that `Dataset.save_to_disk` wrote, and the name of a data set on the Hub.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

DATA = Path(__file__).resolve().parent
QUESTIONS = DATA / "questions.jsonl"
OPEN_PROMPTS = DATA / "open_prompts.jsonl"
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PROMPTS = ("prompt", "question", "messages", "text")  # columns
ANSWERS = ("answers", "answer")
Prompt = str | list[dict[str, Any]]  # text, or messages


class PromptFileError(ValueError):
    """Data that cannot be used; the message names the file and, where it can, the row."""


@dataclass(frozen=True)
class Question:
    """A prompt; `answers` are used for measuring only and never reach the trainer."""

    prompt: Prompt
    answers: tuple[str, ...] = ()
    split: str = ""


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set hold what; None: the one of PROMPTS, of ANSWERS that is there."""

    prompt: str | None = None
    answers: str | None = None


def read_prompts(
    source: str | Path, split: str | None = None, columns: Columns = Columns()
) -> list[Prompt]:
    """As `read_questions`, without the answers: nothing downstream can train on them."""
    return [question.prompt for question in read_questions(source, split, columns)]


def read_questions(
    source: str | Path = QUESTIONS, split: str | None = None, columns: Columns = Columns()
) -> list[Question]:
    """The rows of a file, a folder or a data set of the Hub.

    Args:
        source: a path, or a Hub name, with a configuration after a colon (`openai/gsm8k:main`).
        split: rows whose column `split` is this; of a data set with splits, its split ("train").
        columns: where prompts and answers are.

    Raises:
        PromptFileError: naming the source and the row, for what it cannot read.
    """
    rows, by_column = _read(source, split)
    prompt_column = _column(source, rows, "prompt", columns.prompt, PROMPTS)
    answer_column = _column(source, rows, "answer", columns.answers, ANSWERS)
    questions = []
    for number, row in enumerate(rows, start=1):
        if by_column and split is not None and row.get("split") != split:
            continue
        if prompt_column == "text" and not str(row["text"]).strip():
            continue
        try:
            prompt = _prompt(row[prompt_column], prompt_column)
            answers = _answers(row.get(answer_column))
        except ValueError as error:
            raise PromptFileError(f"{source}: row {number}: {error}") from None
        questions.append(Question(prompt, answers, row.get("split") or ""))
    if not questions:
        what = "no row" if split is None else f"no row has split {split!r}"
        raise PromptFileError(f"{source}: {what}")
    if len({isinstance(question.prompt, str) for question in questions}) > 1:
        raise PromptFileError(f"{source}: text and message prompts in one file; use one form")
    return questions


def spread(questions: Sequence[Question], most: int) -> list[Question]:
    """At most so many of them, evenly spread."""
    return list(questions[:: max(1, len(questions) // most)][:most])


def in_chat(prompts: Sequence[Prompt], tokenizer: Any, chat: bool | None = None) -> list[Prompt]:
    """The prompts as a model is asked: in its chat format, or as they are.

    Args:
        prompts: texts, or lists of messages.
        tokenizer: of the model.
        chat: text becomes a user's message (True), stays as it is (False), or becomes one where
            the tokenizer has a chat template (None).

    Raises:
        ValueError: where messages are asked for, and there is no chat template.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    messages = any(not isinstance(prompt, str) for prompt in prompts)
    if (chat or messages) and not has_template:
        raise ValueError("chat: the tokenizer has no chat template, so there is no format for it")
    if chat is False and messages:
        raise ValueError("raw: the prompts are messages, which need the chat template")
    if not (has_template if chat is None else chat):
        return list(prompts)
    return [
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def in_chat_all(
    questions: Sequence[Question], tokenizer: Any, chat: bool | None = None
) -> list[Question]:
    """The questions with their prompts `in_chat`."""
    prompts = in_chat([question.prompt for question in questions], tokenizer, chat)
    return [replace(q, prompt=prompt) for q, prompt in zip(questions, prompts, strict=True)]


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, as training has them: text with the tokenizer's own first token
    (BOS), messages through its chat template."""
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    template = tokenizer.apply_chat_template
    return template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]


def text_of(prompt: Prompt) -> str:
    """For reading: the text, or the messages with their roles; one user's message alone."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content"))
    return "\n".join(f"[{message['role']}] {message.get('content')}" for message in prompt)


def _read(source: str | Path, split: str | None) -> tuple[Dataset, bool]:
    """Rows, and whether a split is a column of theirs."""
    path = Path(source)
    if path.is_file():
        return _read_file(path), True
    if path.suffix in READERS or path.is_absolute() or str(source).startswith("."):
        if not path.is_dir():
            raise PromptFileError(f"{source}: no such file")
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if path.is_dir():
            found = load_from_disk(str(path))
            if isinstance(found, DatasetDict):
                found = _split(source, found, split)
            return found, False
        name, _, config = str(source).partition(":")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise PromptFileError(f"{source}: no such file, and no name of a data set")
        return load_dataset(name, config or None, split=split or "train"), False
    except PromptFileError:
        raise
    except Exception as error:  # of half a dozen libraries
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        what = "no folder of a data set" if path.is_dir() else "no such file, nor a data set"
        raise PromptFileError(f"{source}: {what} ({reason})") from error


def _split(source: str | Path, found: Any, split: str | None) -> Dataset:
    name = split or ("train" if "train" in found else next(iter(found)))
    if name not in found:
        raise PromptFileError(f"{source}: no split {name!r}; it has {', '.join(found)}")
    return found[name]


def _read_file(path: Path) -> Dataset:
    """By suffix; nothing is left in a cache."""
    import datasets
    import pandas
    from datasets import Dataset

    reader = READERS.get(path.suffix)
    if reader is None:
        raise PromptFileError(
            f"{path}: expected a file that ends in {', '.join(READERS)}, got {path.suffix!r}"
        )
    # Windows' editors begin with a mark.
    options = {"encoding": "utf-8-sig"} if reader == "text" else {}
    if not path.stat().st_size:
        raise PromptFileError(f"{path}: the file is empty")
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if reader == "csv":  # not `datasets`' own: an answer 3 would come as 3.0
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            return Dataset.from_pandas(table, preserve_index=False)
        with tempfile.TemporaryDirectory() as cache:
            read = getattr(Dataset, f"from_{reader}")
            return read(os.fspath(path), cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:  # its own, pyarrow's and pandas'
        raise PromptFileError(f"{path}: {_what_is_wrong(path, error)}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _what_is_wrong(path: Path, error: Exception) -> str:
    """The first bad line, where it can be found; else what the reader said last."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.suffix != ".parquet" else ""
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 text ({wrong.reason})"
    if path.suffix == ".jsonl" and (found := _bad_line(text)):
        return found
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return next(iter(str(cause).splitlines()), "") or "it holds no rows"


def _bad_line(text: str) -> str | None:
    """What is wrong with the first line that is no object, or has a column of another type."""
    first: dict[str, tuple[int, Any]] = {}  # line and value of each column
    # Not splitlines: U+2028 and the like may stand within a line of JSON.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as wrong:
            return f"line {number}: not JSON ({wrong.msg} at column {wrong.colno})"
        if not isinstance(row, dict):
            return f"line {number}: expected an object {{...}}, got {line.strip()[:60]}"
        for name, value in row.items():
            at, other = first.setdefault(name, (number, value))
            if None not in (value, other) and type(value) is not type(other):
                kinds = type(value).__name__, type(other).__name__
                return f"line {number}: {name} is {kinds[0]}, but {kinds[1]} in line {at}"
    return None


def _column(
    source: str | Path, rows: Dataset, what: str, given: str | None, known: tuple[str, ...]
) -> str | None:
    """The name of the column, None for answers that nobody gives."""
    names = rows.column_names
    if given is not None:
        if given in names:
            return given
        near = difflib.get_close_matches(given, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise PromptFileError(f"{source}: no column {given!r} among {', '.join(names)}{hint}")
    found = [name for name in known if name in names]
    if what == "answer":
        return found[0] if found else None
    if len(found) != 1:
        raise PromptFileError(
            f"{source}: expected one column of {', '.join(PROMPTS)}, got columns "
            f"{', '.join(names)}; name the prompts' column (--prompt-column)"
        )
    return found[0]


def _prompt(value: Any, column: str) -> Prompt:
    if isinstance(value, str) and value.strip():
        return value.strip() if column == "text" else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"the prompt is empty or not text, got {value!r}")
    if not all(isinstance(m, dict) and m.get("role") and "content" in m for m in value):
        raise ValueError(f"expected messages with 'role' and 'content', got {value!r:.80}")
    if column == "messages":
        while len(value) > 1 and value[-1]["role"] == "assistant":
            value = value[:-1]
    return value


def _answers(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    answers = value if isinstance(value, list) else [value]
    answers = [str(answer) for answer in answers if isinstance(answer, (str, int, float))]
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"expected an answer, or a list of accepted answers, got {value!r}")
    return tuple(answers)
