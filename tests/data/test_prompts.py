"""Prompts: what is read, in which format it is asked, and that a bad line is named."""

import json

import pytest

pytest.importorskip("datasets")

from datasets import Dataset, DatasetDict  # noqa: E402

from powerflow_fast.data.prompts import (  # noqa: E402
    OPEN_PROMPTS,
    QUESTIONS,
    PromptFileError,
    Question,
    in_chat,
    read_prompts,
    read_questions,
)
from powerflow_fast.evaluation.scores import words  # noqa: E402
from tests.helpers import tiny  # noqa: E402


def write(tmp_path, text, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file_is_one_prompt_per_line(tmp_path):
    path = write(tmp_path, "Hello there\n\n  Who are you? \n\n", "prompts.txt")
    assert read_prompts(path) == ["Hello there", "Who are you?"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    path = write(tmp_path, "\ufeffrain\r\nsea\r\n", "prompts.txt")
    assert read_prompts(path) == ["rain", "sea"]
    assert read_prompts(write(tmp_path, '\ufeff{"prompt": "rain"}\n')) == ["rain"]
    assert read_prompts(write(tmp_path, "\ufeffprompt\nrain\n", "p.csv")) == ["rain"]


def test_prompts_of_questions_carry_no_answers(tmp_path):
    path = write(tmp_path, json.dumps({"question": "2 + 3?", "answers": ["5"], "topic": "sum"}))
    assert read_prompts(path) == ["2 + 3?"]
    assert read_questions(path)[0].answers == ("5",)


MESSAGES = [{"role": "user", "content": "2 + 3?"}]
ROWS = [{"prompt": "2 + 3?", "answer": "5"}, {"prompt": "1 + 1?", "answer": "2"}]


def test_every_form_of_a_file_gives_the_same(tmp_path):
    """JSON lines, a JSON list, CSV (a 5 stays 5), parquet, and a folder of a data set."""
    data = Dataset.from_list(ROWS)
    forms = [
        write(tmp_path, "".join(json.dumps(row) + "\n" for row in ROWS)),
        write(tmp_path, json.dumps(ROWS), "rows.json"),
        write(tmp_path, "prompt,answer\n2 + 3?,5\n1 + 1?,2\n", "rows.csv"),
        tmp_path / "rows.parquet",
        tmp_path / "folder",
        tmp_path / "splits",
    ]
    data.to_parquet(forms[3])
    data.save_to_disk(forms[4])
    DatasetDict({"test": data, "train": data}).save_to_disk(forms[5])
    expected = [Question("2 + 3?", ("5",)), Question("1 + 1?", ("2",))]
    for form in forms:
        assert read_questions(form) == expected, form
    with pytest.raises(PromptFileError, match="no split 'valid'; it has test, train"):
        read_questions(forms[5], "valid")


def test_named_columns(tmp_path):
    path = write(tmp_path, "problem,solution,note\n2 + 3?,5,x\n", "rows.csv")
    columns = ("problem", "solution")
    assert read_questions(path, None, *columns) == [Question("2 + 3?", ("5",))]
    with pytest.raises(PromptFileError, match="columns problem, solution, note; name the prompts'"):
        read_questions(path)
    with pytest.raises(PromptFileError, match="no column 'problems' among .*mean problem"):
        read_questions(path, prompt_column="problems")


def test_message_rows(tmp_path):
    """For eval, too; of a whole conversation the prompt is what stands before the last answer."""
    path = write(tmp_path, json.dumps({"prompt": MESSAGES, "answers": ["5"]}))
    assert read_questions(path) == [Question(MESSAGES, ("5",))]
    whole = [*MESSAGES, {"role": "assistant", "content": "5"}]
    assert read_prompts(write(tmp_path, json.dumps({"messages": whole}))) == [MESSAGES]


def test_a_data_set_of_the_hub(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list([{"question": "2 + 3?", "answer": "5"}])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert read_prompts("openai/gsm8k:main", "test") == ["2 + 3?"]
    assert read_prompts("someone/prompts") == ["2 + 3?"]
    assert asked == [("openai/gsm8k", "main", "test"), ("someone/prompts", None, "train")]


BAD_LINES = {
    "{broken": "line 2: not JSON",
    "[1, 2]": "line 2: expected an object",
    '{"text": "a"}': "expected one column of prompt, question, messages, text, got",
    '{"prompt": "a", "question": "b"}': "expected one column of prompt, question",
    '{"prompt": "  "}': "row 2: the prompt is empty",
    '{"prompt": 3}': "line 2: prompt is int, but str in line 1",
    '{"prompt": [{"role": "user"}]}': "line 2: prompt is list, but str in line 1",
    '{"prompt": "a", "answers": []}': "row 2: expected an answer",
    '{"prompt": "a", "answers": [""]}': "row 2: expected an answer",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    fine = '{"prompt": "fine"}\n'
    path = write(tmp_path, f"{fine}{line}\n{fine}\n\n")
    with pytest.raises(PromptFileError) as error:
        read_prompts(path)
    assert BAD_LINES[line] in str(error.value) and str(path) in str(error.value)


def test_unusable_files(tmp_path):
    with pytest.raises(PromptFileError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptFileError, match="no such file, and no name of a data set"):
        read_prompts("what is this")
    with pytest.raises(PromptFileError, match="the file is empty"):
        read_prompts(write(tmp_path, ""))
    with pytest.raises(PromptFileError, match=r"ends in .txt, .jsonl.* got '.docx'"):
        read_prompts(write(tmp_path, "rain", "prompts.docx"))
    with pytest.raises(PromptFileError, match="no row"):
        read_prompts(write(tmp_path, "\n\n", "prompts.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(PromptFileError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    bare = write(tmp_path, json.dumps({"prompt": [{"role": "user"}]}))
    with pytest.raises(PromptFileError, match="row 1: expected messages with 'role' and"):
        read_prompts(bare)
    mixed = '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}'
    with pytest.raises(PromptFileError, match="one form"):
        read_prompts(write(tmp_path, mixed))
    with pytest.raises(PromptFileError, match="split"):
        read_questions(write(tmp_path, '{"prompt": "a"}'), split="heldout")


def test_chat_or_raw():
    """By default in the chat format where there is one; never messages without it."""
    plain, chatty = tiny.tokenizer(), tiny.tokenizer()
    chatty.chat_template = "{{ messages }}"
    assert in_chat(["rain"], plain) == ["rain"] == in_chat(["rain"], chatty, False)
    asked = [[{"role": "user", "content": "rain"}]]
    assert in_chat(["rain"], chatty) == asked == in_chat(asked, chatty, True)
    with pytest.raises(ValueError, match="no chat template"):
        in_chat(["rain"], plain, True)
    with pytest.raises(ValueError, match="no chat template"):
        in_chat(asked, plain)
    with pytest.raises(ValueError, match="raw: the prompts are messages"):
        in_chat(asked, chatty, False)


def test_committed_questions_are_fair():
    """300 and more, none twice, and no question gives its own answer away."""
    train, held_out = read_questions(split="train"), read_questions(split="heldout")
    assert len(train) + len(held_out) >= 300 and len(held_out) >= 80
    assert len({q.prompt for q in train + held_out}) == len(train) + len(held_out)
    assert len(read_prompts(QUESTIONS)) == len(train) + len(held_out)
    for question in train + held_out:
        inside = set(words(question.prompt))
        assert question.answers
        assert not any(set(words(answer)) <= inside for answer in question.answers), question


def test_committed_open_prompts():
    prompts = read_questions(OPEN_PROMPTS)
    assert len(prompts) >= 40 and len({p.prompt for p in prompts}) == len(prompts)
    assert {p.split for p in prompts} == {"train", "heldout"}


def test_a_line_separator_within_json_is_no_end_of_line(tmp_path):
    """JavaScript's writers leave U+2028 unescaped; only a newline ends a line of JSON lines."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two\x85three"}\n{"prompt": "four"}\r\n', encoding="utf-8")
    assert read_prompts(path) == ["one\u2028two\x85three", "four"]
