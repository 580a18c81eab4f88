"""Prompt files: what is read, and that a bad line is named by its number."""

import json

import pytest

from powerflow_fast.evaluation import words
from powerflow_fast.prompts import (
    OPEN_PROMPTS,
    QUESTIONS,
    PromptFileError,
    read_prompts,
    read_questions,
)
from powerflow_fast.rewards import missing_boxed, missing_pattern, truncated


def write(tmp_path, text, name="prompts.jsonl"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_file_is_one_prompt_per_line(tmp_path):
    path = write(tmp_path, "Hello there\n  Who are you? \n", "prompts.txt")
    assert read_prompts(path) == [{"prompt": "Hello there"}, {"prompt": "Who are you?"}]
    chat = read_prompts(path, chat=True)
    assert chat[1] == {"prompt": [{"role": "user", "content": "Who are you?"}]}


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    assert read_prompts(write(tmp_path, "\ufeffrain\r\nsea\r\n", "prompts.txt")) == [
        {"prompt": "rain"},
        {"prompt": "sea"},
    ]
    assert read_prompts(write(tmp_path, '\ufeff{"prompt": "rain"}\n')) == [{"prompt": "rain"}]


def test_prompts_of_questions_carry_no_answers(tmp_path):
    path = write(tmp_path, json.dumps({"question": "2 + 3?", "answers": ["5"], "topic": "sum"}))
    assert read_prompts(path) == [{"prompt": "2 + 3?", "topic": "sum"}]
    assert read_questions(path)[0].answers == ("5",)


BAD_LINES = {
    "": "line 2 is empty",
    "   ": "line 2 is empty",
    "{broken": "line 2: not JSON",
    "[1, 2]": "line 2: expected an object",
    '{"text": "a"}': "line 2: expected an object with either 'prompt' or 'question'",
    '{"prompt": "a", "question": "b"}': "line 2: expected an object with either",
    '{"prompt": "  "}': "line 2: the prompt is empty",
    '{"prompt": 3}': "line 2: the prompt is empty or not text",
    '{"prompt": [{"role": "user"}]}': "line 2: expected messages",
    '{"question": "a", "answers": "b"}': "line 2: expected 'answers' to be a list",
    '{"question": "a", "answers": []}': "line 2: 'answers' is an empty list",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = write(tmp_path, '{"prompt": "fine"}\n' + line + '\n{"prompt": "fine"}\n')
    with pytest.raises(PromptFileError) as error:
        read_prompts(path)
    assert BAD_LINES[line] in str(error.value) and str(path) in str(error.value)


def test_unusable_files(tmp_path):
    with pytest.raises(PromptFileError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(PromptFileError, match="the file is empty"):
        read_prompts(write(tmp_path, ""))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(PromptFileError, match="UTF-8"):
        read_prompts(tmp_path / "latin.txt")
    mixed = '{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}'
    with pytest.raises(PromptFileError, match="one form"):
        read_prompts(write(tmp_path, mixed))
    with pytest.raises(PromptFileError, match="split"):
        read_questions(write(tmp_path, '{"prompt": "a"}'), split="heldout")


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


def test_psi_functions():
    boxed = missing_boxed()
    texts = [r"so \boxed{5}", "so 5", r"\boxed{ }", r"\boxed {x}"]
    assert boxed(completions=texts, prompts=[""] * 4) == [0.0, -0.5, -0.5, 0.0]
    chat = [[{"role": "assistant", "content": r"\boxed{1}"}], [{"role": "assistant"}]]
    assert boxed(completions=chat) == [0.0, -0.5]
    ends = missing_pattern(r"\.$", penalty=-1.0)
    assert ends(completions=["Yes.", "Yes"]) == [0.0, -1.0]
    assert truncated([1, 2])(completion_ids=[[5, 1], [5, 2], [5], []]) == [0.0, 0.0, -0.5, -0.5]
    with pytest.raises(ValueError, match="penalty"):
        missing_boxed(penalty=0.5)


def test_a_line_separator_within_json_is_no_end_of_line(tmp_path):
    """JavaScript's writers leave U+2028 unescaped; only a newline ends a line of JSON lines."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one\u2028two\x85three"}\n{"prompt": "four"}\r\n', encoding="utf-8")
    assert [r["prompt"] for r in read_prompts(path)] == ["one\u2028two\x85three", "four"]
