"""Prompt and question files, read strictly: a bad line is an error that names its number.

Three forms, by suffix and first line:

* `.txt`: one prompt per line.
* `.jsonl` with `prompt`: text, or a list of messages `{"role", "content"}`; other keys are kept.
* `.jsonl` with `question` and `answers` (a list of accepted answers): what `eval` measures with.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
QUESTIONS = DATA / "questions.jsonl"
OPEN_PROMPTS = DATA / "open_prompts.jsonl"


class PromptFileError(ValueError):
    """A prompt file that cannot be used; the message names the file and, where it can, the line."""


@dataclass(frozen=True)
class Question:
    """A prompt; `answers` are used for measuring only and never reach the trainer."""

    prompt: str
    answers: tuple[str, ...] = ()
    split: str = ""


def read_records(path: str | Path) -> list[dict]:
    """One dict per line; PromptFileError for a missing, empty or malformed file or line."""
    path = Path(path)
    if not path.is_file():
        raise PromptFileError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: not UTF-8 text ({error.reason})") from None
    # Not splitlines: U+2028 and the like may stand within a line of JSON.
    lines = text.removesuffix("\n").split("\n") if text else []
    if not lines:
        raise PromptFileError(f"{path}: the file is empty")
    parse = _parse_json if path.suffix in (".jsonl", ".json") else _parse_text
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise PromptFileError(f"{path}: line {number} is empty")
        try:
            records.append(parse(line))
        except ValueError as error:
            raise PromptFileError(f"{path}: line {number}: {error}") from None
    return records


def read_prompts(path: str | Path, chat: bool = False) -> list[dict]:
    """Records with a key `prompt`; `chat` turns text into one user message for a chat template.

    Questions lose their answers here, so that nothing downstream can train on them.
    """
    records = []
    for record in read_records(path):
        prompt = record.pop("question", None) or record.pop("prompt")
        record.pop("answers", None)
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        records.append({"prompt": prompt, **record})
    if len({isinstance(record["prompt"], str) for record in records}) > 1:
        raise PromptFileError(f"{path}: text and message prompts in one file; use one form")
    return records


def read_questions(path: str | Path = QUESTIONS, split: str | None = None) -> list[Question]:
    """Questions with accepted answers, or open prompts without; of one `split` if given."""
    questions = []
    for number, record in enumerate(read_records(path), start=1):
        prompt = record.get("question") or record["prompt"]
        if not isinstance(prompt, str):
            raise PromptFileError(f"{path}: line {number}: expected a text prompt, got messages")
        answers = tuple(record.get("answers", ()))
        questions.append(Question(prompt, answers, record.get("split", "")))
    if split is not None:
        questions = [question for question in questions if question.split == split]
    if not questions:
        raise PromptFileError(f"{path}: no question has split {split!r}")
    return questions


def _parse_text(line: str) -> dict:
    return {"prompt": line.strip()}


def _parse_json(line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict) or ("prompt" in record) == ("question" in record):
        raise ValueError("expected an object with either 'prompt' or 'question'")
    prompt = record.get("prompt", record.get("question"))
    if isinstance(prompt, list) and prompt:
        if not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt):
            raise ValueError("expected messages with 'role' and 'content'")
    elif not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt is empty or not text")
    answers = record.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError("expected 'answers' to be a list of non-empty texts")
    if "answers" in record and not answers:
        raise ValueError("'answers' is an empty list")
    return record
