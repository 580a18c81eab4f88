"""Prompts and questions from files and data sets, and how they become token ids.

`datasets` reads:

* `.txt`: one prompt a line; blank lines are skipped.
* `.jsonl`, `.json`, `.csv`, `.parquet` with a column `prompt`, `question` or `messages`: text, or a
  list of messages `{"role", "content"}`. The prompt of `messages` ends before the last answer. A
  column `answers` or `answer` (a text, or a list of accepted ones) is for measuring with `eval`;
  no answer ever reaches a trainer.
* a folder that `Dataset.save_to_disk` wrote, and the name of a data set on the Hub.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerflow_fast.data.errors import did_you_mean, one_line

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
    """Data that cannot be used; the message names the file and, where possible, the row."""


@dataclass(frozen=True)
class Question:
    """A prompt; `answers` are used for measuring only and never reach the trainer."""

    prompt: Prompt
    answers: tuple[str, ...] = ()  # accepted ones; empty: none are known
    split: str = ""  # the row's column `split`


def read_prompts(
    source: str | Path, split: str | None = None, prompt_column: str | None = None
) -> list[Prompt]:
    """`read_questions` without the answers: nothing downstream can train on them."""
    return [question.prompt for question in read_questions(source, split, prompt_column)]


def read_questions(
    source: str | Path = QUESTIONS,
    split: str | None = None,
    prompt_column: str | None = None,
    answer_column: str | None = None,
) -> list[Question]:
    """The rows of a file, a folder or a data set of the Hub.

    Args:
        source: a path, or a Hub name, with a configuration after a colon (`openai/gsm8k:main`).
        split: of a file, the rows whose column `split` is this (all); of a folder or a data set of
            the Hub, the name of its split ("train").
        prompt_column: its name; default: the one of PROMPTS that is there.
        answer_column: its name; default: the first of ANSWERS that is there, if any.

    Returns:
        At least one question, all of them with text prompts or all with messages.

    Raises:
        PromptFileError: for data that cannot be read; it names the source and the row.
    """
    rows, by_column = _read(source, split)
    names = rows.column_names
    for name in (prompt_column, answer_column):
        if name is not None and name not in names:
            hint = did_you_mean(name, names)
            raise PromptFileError(f"{source}: no column {name!r} among {', '.join(names)}{hint}")
    prompt_column = prompt_column or _prompt_column(source, names)
    answer_column = answer_column or next((name for name in ANSWERS if name in names), None)
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


def evenly_spaced(questions: Sequence[Question], most: int) -> list[Question]:
    """At most `most` of the questions, at equal distances."""
    return list(questions[:: max(1, len(questions) // most)][:most])


def in_chat(prompts: Sequence[Prompt], tokenizer: Any, chat: bool | None = None) -> list[Prompt]:
    """The prompts in the form that a model is asked in: as messages of its chat format, or as text.

    Args:
        prompts: texts, or lists of messages.
        tokenizer: the model's.
        chat: text becomes a user's message (True), stays as it is (False), or becomes a message if
            the tokenizer has a chat template (None).

    Raises:
        ValueError: for messages without a chat template, or with `chat=False`.
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
    """The questions, with `in_chat` applied to their prompts."""
    prompts = in_chat([question.prompt for question in questions], tokenizer, chat)
    return [replace(q, prompt=prompt) for q, prompt in zip(questions, prompts, strict=True)]


def prompt_ids(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, as in training.

    Text begins with the tokenizer's own first token (BOS), if it adds one; messages go through the
    chat template. `prompts` are all text or all messages.
    """
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    template = tokenizer.apply_chat_template
    return template(list(prompts), add_generation_prompt=True, return_dict=True)["input_ids"]


def text_of(prompt: Prompt) -> str:
    """A prompt to read: text as it is, a single message's content, or messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content"))
    return "\n".join(f"[{message['role']}] {message.get('content')}" for message in prompt)


def _read(source: str | Path, split: str | None) -> tuple[Dataset, bool]:
    """Rows, and whether their column `split` says which of them are asked for."""
    path = Path(source)
    if path.is_file():
        return _read_file(path), True
    if path.is_dir():
        return _read_folder(source, split), False
    if path.suffix in READERS or path.is_absolute() or str(source).startswith("."):
        raise PromptFileError(f"{source}: no such file")
    name, _, config = str(source).partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise PromptFileError(f"{source}: no such file, and no name of a data set")
    from datasets import load_dataset

    try:
        return load_dataset(name, config or None, split=split or "train"), False
    except Exception as error:  # of half a dozen libraries
        raise PromptFileError(
            f"{source}: no such file, nor a data set ({one_line(error)})"
        ) from error


def _read_folder(source: str | Path, split: str | None) -> Dataset:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(source))
    except Exception as error:  # of half a dozen libraries
        raise PromptFileError(f"{source}: no folder of a data set ({one_line(error)})") from error
    if isinstance(found, Dataset):
        return found
    name = split or ("train" if "train" in found else next(iter(found)))
    if name not in found:
        raise PromptFileError(f"{source}: no split {name!r}; it has {', '.join(found)}")
    return found[name]


def _read_file(path: Path) -> Dataset:
    """The reader is chosen by suffix, and leaves nothing in a cache."""
    import datasets
    import pandas
    from datasets import Dataset

    reader = READERS.get(path.suffix)
    if reader is None:
        raise PromptFileError(
            f"{path}: expected a file that ends in {', '.join(READERS)}, got {path.suffix!r}"
        )
    if not path.stat().st_size:
        raise PromptFileError(f"{path}: the file is empty")
    # Windows' editors begin a file with a mark (BOM).
    options = {"encoding": "utf-8-sig"} if reader == "text" else {}
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if reader == "csv":  # `datasets`' own reader would make 3.0 of an answer 3
            table = pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
            return Dataset.from_pandas(table, preserve_index=False)
        with tempfile.TemporaryDirectory() as cache:
            read = getattr(Dataset, f"from_{reader}")
            return read(os.fspath(path), cache_dir=cache, keep_in_memory=True, **options)
    except Exception as error:  # datasets', pyarrow's and pandas'
        raise PromptFileError(f"{path}: {_what_is_wrong(path, error)}") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _what_is_wrong(path: Path, error: BaseException) -> str:
    """The first bad line of a `.jsonl` file, if there is one; else the reader's own reason."""
    try:
        text = path.read_text(encoding="utf-8-sig") if path.suffix != ".parquet" else ""
    except UnicodeDecodeError as wrong:
        return f"not UTF-8 text ({wrong.reason})"
    if path.suffix == ".jsonl" and (found := _bad_line(text)):
        return found
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error) if str(error).strip() else "it holds no rows"


def _bad_line(text: str) -> str | None:
    """Says of the first line that is no object, or has a column of another type, what is wrong."""
    first: dict[str, tuple[int, Any]] = {}  # line and value of each column
    # Not splitlines: JSON may have U+2028 and the like within a line.
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
                kind, other_kind = type(value).__name__, type(other).__name__
                return f"line {number}: {name} is {kind}, but {other_kind} in line {at}"
    return None


def _prompt_column(source: str | Path, names: Sequence[str]) -> str:
    found = [name for name in PROMPTS if name in names]
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
