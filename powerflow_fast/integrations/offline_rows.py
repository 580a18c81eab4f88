"""The rows of `LATBTrainer`: prompts and completions as token ids, those of one prompt together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from powerflow_fast.logprobs.validation import is_finite
from powerflow_fast.models.context import Context

Item = dict[str, Any]  # prompt, completion: token ids; psi: number; old_logps: numbers or None


class RowReader:
    """Reads rows for one model and tokenizer.

    Args:
        tokenizer: of text and messages.
        ends: token ids that end a completion. A completion given as text or messages that ends with
            none of them gets the tokenizer's end token, or else the first of these.
        vocabulary: token ids are below it.
        context: the length that the model's positions allow.
    """

    def __init__(self, tokenizer: Any, ends: list[int], vocabulary: int, context: Context) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.vocabulary, self.context = vocabulary, context

    def groups(self, name: str, rows: Iterable[Mapping[str, Any]]) -> list[list[Item]]:
        """The rows of `name` by prompt.

        Raises:
            ValueError: naming the row and the column, for what it cannot use.
        """
        groups: dict[tuple[int, ...], list[Item]] = defaultdict(list)
        if isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
            raise ValueError(f"{name}: expected rows, got {type(rows).__name__}")
        given = set()
        for place, row in enumerate(rows):
            item = self._item(f"{name}: row {place}", row)
            given.add(item["old_logps"] is not None)
            groups[tuple(item["prompt"])].append(item)
        if not groups:
            raise ValueError(f"{name}: it is empty")
        if len(given) > 1:
            raise ValueError(f"{name}: old_logps: expected in every row or in none")
        return list(groups.values())

    def _item(self, at: str, row: Any) -> Item:
        if not isinstance(row, Mapping) or not {"prompt", "completion"} <= row.keys():
            got = sorted(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ValueError(f"{at}: expected columns prompt and completion, got {got}")
        values = {name: _plain(row[name]) for name in ("prompt", "completion")}
        for name, value in values.items():
            if not (isinstance(value, str) or _is_messages(value) or self._is_ids(value)):
                raise ValueError(
                    f"{at}: {name}: expected text, messages or token ids below {self.vocabulary}, "
                    f"got {_short(value)}"
                )
        prompt, completion = self._token_ids(at, **values)
        if not prompt:
            raise ValueError(f"{at}: prompt: expected at least one token, got {row['prompt']!r}")
        old, psi = _plain(row.get("old_logps")), _plain(row.get("psi"))
        psi = 0.0 if psi is None else psi
        if not is_finite(psi):
            raise ValueError(f"{at}: psi: expected a finite number, got {_short(psi)}")
        if old is not None:
            if not isinstance(old, list) or not all(map(is_finite, old)):
                raise ValueError(f"{at}: old_logps: expected finite numbers, got {_short(old)}")
            if len(old) != len(completion):
                raise ValueError(
                    f"{at}: old_logps: expected one per completion token, {len(completion)}, got "
                    f"{len(old)}"
                )
        self.context.check(at, len(prompt) + len(completion))
        return {"prompt": prompt, "completion": completion, "psi": psi, "old_logps": old}

    def _is_ids(self, value: Any) -> bool:
        return isinstance(value, list) and all(
            type(x) is int and 0 <= x < self.vocabulary for x in value
        )

    def _token_ids(self, at: str, prompt: Any, completion: Any) -> tuple[list[int], list[int]]:
        """Token ids of text or messages; ids that are given stay as they are."""
        if _is_messages(completion) and not _is_messages(prompt):
            raise ValueError(f"{at}: prompt: expected messages, as the completion is")
        if _is_messages(prompt):
            template = self.tokenizer.apply_chat_template
            start = template(prompt, add_generation_prompt=True, return_dict=False)
            if _is_messages(completion):
                whole = template([*prompt, *completion], return_dict=False)
                if whole[: len(start)] != start:
                    raise ValueError(
                        f"{at}: prompt: its chat template gives other tokens once the completion "
                        "follows; give token ids"
                    )
                completion = whole[len(start) :]
                last = max((i for i, t in enumerate(completion) if t in self.ends), default=None)
                completion = completion if last is None else completion[: last + 1]
                return start, self._ended(completion)
            prompt = start
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        if isinstance(completion, str):
            completion = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            completion = self._ended(completion)
        return prompt, completion

    def _ended(self, completion: list[int]) -> list[int]:
        if completion and completion[-1] in self.ends:
            return completion
        of_tokenizer = self.tokenizer.eos_token_id
        if of_tokenizer is None and not self.ends:
            raise ValueError(
                "processing_class: expected an end-of-sequence token, got none, and the model "
                "names none either; set tokenizer.eos_token"
            )
        return [*completion, self.ends[0] if of_tokenizer is None else of_tokenizer]


def _plain(value: Any) -> Any:
    """Lists and numbers, where a data set gives tensors or arrays."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[:width]}..."
