"""The rows of `LATBTrainer`: what is read as tokens, and what is refused by row and column."""

import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from datasets import Dataset  # noqa: E402

from powerflow_fast.integrations.transformers import LATBTrainer  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import ROWS, adapted, arguments, offline  # noqa: E402


def as_messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def test_messages_and_tensors_are_rows_like_text(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} <eos> sea"
        "{% else %} {% endif %}{% endfor %}"
    )
    text = offline(tmp_path)
    ids = [
        {
            "prompt": torch.tensor(tokenizer(r["prompt"])["input_ids"]),
            "completion": torch.tensor([*tokenizer(r["completion"])["input_ids"], tiny.EOS]),
            "psi": torch.tensor(0.0),
        }
        for r in ROWS
    ]
    found = []
    for rows in (list(map(as_messages, ROWS)), ids):
        trainer = LATBTrainer(adapted(), arguments(tmp_path), rows, processing_class=tokenizer)
        found.append(trainer.train_dataset)
    assert found[0] == found[1] == text.train_dataset


def test_any_iterable_of_rows(tmp_path):
    expected = offline(tmp_path).train_dataset
    data = Dataset.from_list(ROWS)
    for rows in (data, data.to_iterable_dataset(), iter(ROWS), tuple(ROWS)):
        assert offline(tmp_path, rows).train_dataset == expected


GOOD = {"prompt": "rain", "completion": "sea"}
WITH_OLD = GOOD | {"old_logps": [-1.0, -1.0]}
BAD = [
    ([{"prompt": "rain"}], "row 0: expected columns prompt and completion, got .'prompt'"),
    (["rain"], "row 0: expected columns prompt and completion, got a str"),
    ("rain", "expected rows, got str"),
    (3, "expected rows, got int"),
    ([], "it is empty"),
    ([GOOD], "at least 2 completions of every prompt, got one of 'rain'"),
    ([GOOD, GOOD | {"prompt": None}], "row 1: prompt: expected text, .* below 20, got None"),
    ([GOOD, GOOD | {"prompt": ""}], "row 1: prompt: expected at least one token, got ''"),
    ([GOOD, GOOD | {"completion": None}], "row 1: completion: expected text, .* got None"),
    ([GOOD, GOOD | {"completion": 3}], "row 1: completion: expected text, .* got 3"),
    ([GOOD, GOOD | {"completion": [2, 20]}], "row 1: completion: .* below 20, got .2, 20."),
    ([GOOD, GOOD | {"completion": [2, -1]}], "row 1: completion: .* got .2, -1."),
    ([GOOD, GOOD | {"prompt": [3.5]}], "row 1: prompt: .* got .3.5."),
    ([GOOD, GOOD | {"prompt": [[3]]}], "row 1: prompt: .* got ..3.."),
    ([GOOD, GOOD | {"psi": math.nan}], "row 1: psi: expected a finite number, got nan"),
    ([GOOD, GOOD | {"psi": [0.0]}], "row 1: psi: expected a finite number, got .0.0."),
    ([WITH_OLD, WITH_OLD | {"old_logps": [-1.0]}], "row 1: old_logps: .* per .* token, 2, got 1"),
    ([WITH_OLD, WITH_OLD | {"old_logps": [-1.0, None]}], "row 1: old_logps: expected finite"),
    ([WITH_OLD, WITH_OLD | {"old_logps": [-math.inf, -1.0]}], "row 1: old_logps: expected finite"),
    ([WITH_OLD, WITH_OLD | {"old_logps": -1.0}], "row 1: old_logps: expected finite"),
    ([WITH_OLD, GOOD], "old_logps: expected in every row or in none"),
    (
        [GOOD | {"completion": [{"role": "assistant", "content": "sea"}]}] * 2,
        "row 0: prompt: expected messages, as the completion is",
    ),
]


@pytest.mark.parametrize(("rows", "said"), BAD, ids=range(len(BAD)))
def test_rows_that_cannot_be_used_are_named(rows, said, tmp_path):
    with pytest.raises(ValueError, match=f"^train_dataset: .*{said}"):
        offline(tmp_path, rows)
    with pytest.raises(ValueError, match=f"^eval_dataset: .*{said}"):
        offline(tmp_path, eval_dataset=rows)
    with pytest.raises(ValueError, match=rf"^eval_dataset\['hard'\]: .*{said}"):
        offline(tmp_path, eval_dataset={"easy": ROWS, "hard": rows})


def test_rows_beyond_the_context_are_named(tmp_path):
    rows = [ROWS[0] | {"completion": "sea " * 30}] * 2
    with pytest.raises(ValueError, match="row 0 has 36 tokens: beyond the context of 16"):
        offline(tmp_path, rows, adapted(tiny.model(max_position_embeddings=16)))


def test_a_tokenizer_without_an_end_takes_the_models(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    options = dict(args=arguments(tmp_path), train_dataset=ROWS, processing_class=tokenizer)
    rows = LATBTrainer(adapted(), **options).train_dataset
    assert all(item["completion"][-1] == tiny.EOS for group in rows for item in group)
    model = adapted(tiny.model(eos_token_id=None))
    with pytest.raises(ValueError, match="processing_class: expected an end-of-sequence token"):
        LATBTrainer(model, **options)
