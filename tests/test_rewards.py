"""Format terms: 0 for the right form, else a penalty."""

import pytest

from powerflow_fast.rewards import missing_boxed, missing_pattern, truncated


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
